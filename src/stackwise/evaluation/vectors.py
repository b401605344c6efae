"""Files of texts in, and of their vectors out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackwise.config.data import ColumnsConfig
from stackwise.data.records import text_document
from stackwise.data.tables import SUFFIXES, Row, rows_of
from stackwise.errors import RunError, UserError, allowed
from stackwise.files import reason, write_atomic

FORMATS = (".npy", ".parquet", ".jsonl")


def texts_in(path: Path, column: str | None = None) -> list[Row]:
    """The texts of a file: its rows where it has columns, else its lines that are not blank.

    Raises:
        UserError: it cannot be read, or has no text.
    """
    if path.suffix.lower() in SUFFIXES:
        return list(rows_of(path, ColumnsConfig(text=column), labelled=False))
    if column is not None:
        raise UserError(f"--column: {column!r}, but {path} has no columns ({', '.join(SUFFIXES)} have)")
    lines = "".join(piece for document in text_document(path) for piece in document).splitlines()
    rows = [Row(f"{path}, line {i}", (line,)) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: it has no text")
    return rows


def check_place(path: Path) -> None:
    """UserError where ``path`` has no format of vectors, or what that needs is missing."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--out: {str(path)!r} ends in {path.suffix!r}; {allowed(path.suffix, FORMATS)}")
    if path.suffix.lower() == ".parquet":
        _parquet()


def write_vectors(path: Path, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
    """Writes the vectors (N, C) of ``rows`` to ``path``, whole or not at all. RunError where it cannot be written."""
    match path.suffix.lower():
        case ".npy":
            buffer = BytesIO()
            np.save(buffer, vectors, allow_pickle=False)
            chunks = [buffer.getvalue()]
        case ".jsonl":
            lines = ({"text": _text(row), "embedding": vector.tolist()} for row, vector in zip(rows, vectors))
            chunks = [(json.dumps(line) + "\n").encode() for line in lines]
        case _:
            pyarrow, parquet = _parquet()
            flat = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.ravel()), vectors.shape[1])
            table = pyarrow.table({"text": pyarrow.array(list(map(_text, rows))), "embedding": flat})
            buffer = BytesIO()
            parquet.write_table(table, buffer)
            chunks = [buffer.getvalue()]
    try:
        write_atomic(path, chunks)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {reason(error)}") from error


def _text(row: Row) -> str:
    """The text of a row; of a pair both, on a line each."""
    return row.texts[0] if len(row.texts) == 1 else "\n".join(row.texts)


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("writing Parquet needs pyarrow: pip install 'stackwise[parquet]'") from None
    return pyarrow, pyarrow.parquet
