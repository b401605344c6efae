"""Documents inside one file: plain text, JSON lines, Parquet."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stackwise.data.corpus import PIECE, Document, split_text
from stackwise.errors import UserError
from stackwise.reading import JSONError, json_type, parse_json


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the system says against reading a file into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def stat_of(path: Path) -> os.stat_result:
    with reading(path):
        return path.stat()


def text_document(path: Path) -> Iterator[Document]:
    if stat_of(path).st_size:
        yield _file_pieces(path)


def _file_pieces(path: Path) -> Document:
    """A file of UTF-8 text, split at line ends (inside a line only where it is longer than a piece)."""
    with reading(path), open(path, "rb") as file:
        offset, rest = 0, b""
        while chunk := file.read(PIECE - len(rest)):
            rest += chunk
            if len(rest) < PIECE:
                continue
            cut = rest.rfind(b"\n") + 1 or _character_boundary(rest)
            yield _decode(rest[:cut], path, offset)
            offset, rest = offset + cut, rest[cut:]
        if rest:
            yield _decode(rest, path, offset)


def _character_boundary(data: bytes) -> int:
    """The last place in ``data``, short of its end, where a character of UTF-8 starts (its end where there is none)."""
    for cut in range(len(data) - 1, len(data) - 5, -1):
        if data[cut] & 0xC0 != 0x80:
            return cut
    return len(data)


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text: the byte 0x{data[error.start]:02x} at offset {offset + error.start:,}"
        ) from None


def json_lines_documents(path: Path, text_field: str) -> Iterator[Document]:
    offset = 0
    with reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            content = _decode(line, path, offset)
            offset += len(line)
            if not content.strip():
                continue
            try:
                record = parse_json(content, foreign_fields=True)
            except JSONError as error:
                raise UserError(f"{where}: {error}") from None
            if not isinstance(record, dict):
                raise UserError(f"{where}: not a record: it is {json_type(record)}, not an object with fields")
            if text := text_of(record, text_field, where):
                yield split_text(text)


def text_of(record: dict[str, Any], text_field: str, where: str) -> str:
    if text_field not in record:
        raise UserError(no_field(text_field, record, where))
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: the field {text_field!r} (data.text_field) is {json_type(text)}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: the field {text_field!r} holds half of a surrogate pair ({text[error.start]!r})"
        ) from None
    return text


def no_field(text_field: str, fields: Any, where: str) -> str:
    names = ", ".join(map(repr, fields)) or "none"
    return f"{where}: no field {text_field!r} (data.text_field); its fields: {names}"


def parquet_documents(path: Path, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'stackwise[parquet]'") from None
    try:
        with reading(path), pyarrow.parquet.ParquetFile(path) as file:
            fields = file.schema_arrow.names
            if text_field not in fields:
                raise UserError(no_field(text_field, fields, str(path)))
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    where = f"{path}, row {row}"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError:
                        raise UserError(f"{where}: the field {text_field!r} is not UTF-8 text") from None
                    if text := text_of({text_field: text}, text_field, where):
                        yield split_text(text)
    except pyarrow.ArrowException as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"{path}: not a Parquet file that can be read ({problem})") from None
