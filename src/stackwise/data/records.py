"""Documents inside one file: plain text, JSON lines, Parquet."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
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
    for where, record in json_lines_records(path):
        if text := text_of(record, text_field, where):
            yield split_text(text)


def json_lines_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, the object) of each line that is not blank."""
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
            yield where, record


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
    def fields(names: list[str]) -> list[str]:
        if text_field not in names:
            raise UserError(no_field(text_field, names, str(path)))
        return [text_field]

    for where, values in parquet_rows(path, fields):
        if text := text_of({text_field: values[0]}, text_field, where):
            yield split_text(text)


def parquet_rows(path: Path, choose: Callable[[list[str]], list[str]]) -> Iterator[tuple[str, list[Any]]]:
    """(where it stands, its values in the columns that ``choose`` picks among the file's) of each row."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'stackwise[parquet]'") from None
    try:
        with reading(path), pyarrow.parquet.ParquetFile(path) as file:
            wanted = choose(file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                columns = [batch.column(name) for name in wanted]
                for i in range(batch.num_rows):
                    row += 1
                    where, values = f"{path}, row {row}", []
                    for name, column in zip(wanted, columns):
                        try:
                            values.append(column[i].as_py())
                        except UnicodeDecodeError:
                            raise UserError(f"{where}: the field {name!r} is not UTF-8 text") from None
                    yield where, values
    except pyarrow.ArrowException as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"{path}: not a Parquet file that can be read ({problem})") from None
