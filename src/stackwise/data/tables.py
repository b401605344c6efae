"""Rows of labelled files: .tsv, .csv, .jsonl and .parquet, with the columns that are wanted found by their names.

A .csv follows RFC 4180. In a .tsv a quote is a character like others, as in the files of GLUE (1804.07461), whose
columns are known by name; CoLA's has no line of names and is known by its look.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from stackwise.config.data import ColumnsConfig
from stackwise.data.records import json_lines_records, parquet_rows, reading
from stackwise.errors import UserError, allowed
from stackwise.reading import json_type

TEXTS = (
    ("sentence1", "sentence2"),  # STS-B, MRPC, RTE, WNLI; MNLI's own files
    ("premise", "hypothesis"),  # MNLI
    ("question1", "question2"),  # QQP
    ("question", "sentence"),  # QNLI
    ("#1 String", "#2 String"),  # MRPC's own files
    ("sentence",),  # SST-2, CoLA
    ("text",),
)
"""Columns of text that are known, the first that a file has all of."""
LABELS = ("label", "gold_label", "score", "is_duplicate", "Quality")
SUFFIXES = (".tsv", ".csv", ".jsonl", ".ndjson", ".parquet")

_NONE: Literal[3] = csv.QUOTE_NONE
_MINIMAL: Literal[0] = csv.QUOTE_MINIMAL
_COLA = ["source", "label", "star", "sentence"]
_KEYS = "data.columns.text, data.columns.label"


@dataclass(frozen=True)
class Row:
    """One row of a file: where it stands, its one or two texts, and its label as the file has it."""

    where: str
    texts: tuple[str, ...]
    label: Any = None


def rows_of(path: Path, columns: ColumnsConfig, *, labelled: bool = True) -> Iterator[Row]:
    """The rows of a file, in order.

    Args:
        columns: names of the columns; those that it leaves open are found.
        labelled: whether a label is wanted.

    Raises:
        UserError: the file is none of ``SUFFIXES``, cannot be read, lacks a column or holds no row, or a row is not
            whole.
    """

    def choose(names: Sequence[str]) -> list[str]:
        texts = _texts(names, columns, path)
        return [*texts, _label(names, texts, columns, path)] if labelled else texts

    found = False
    for where, values in _records(path, choose):
        found = True
        *texts, label = values if labelled else [*values, None]
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"{where}: a text is {json_type(text)}, not text")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise UserError(f"{where}: its text holds half of a surrogate pair") from None
        if not any(texts):
            raise UserError(f"{where}: the text is empty")
        if labelled and label in (None, ""):
            raise UserError(f"{where}: it has no label")
        yield Row(where, tuple(texts), label)
    if not found:
        raise UserError(f"{path}: it has no rows")


def class_name(row: Row) -> str:
    """The class of a row, as text: of 1, true and "yes" it is 1, true and yes."""
    label = row.label
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, str | int):
        return str(label)
    raise UserError(
        f"{row.where}: the label {label!r} is no class: a class is text, a whole number, true or false (regression "
        "takes other numbers)"
    )


def number(row: Row) -> float:
    """The number that a row is labelled with."""
    label = row.label
    try:
        value = math.nan if isinstance(label, bool) else float(label)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{row.where}: the label {label!r} is not a finite number (classification takes classes)")
    return value


def sorted_names(names: set[str]) -> tuple[str, ...]:
    """Class names in the order of their ids: by value where all are whole numbers, else by their characters."""
    try:
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(names))


def _texts(names: Sequence[str], columns: ColumnsConfig, path: Path) -> list[str]:
    if columns.text is not None:
        wanted = [columns.text] if columns.pair is None else [columns.text, columns.pair]
        for key, name in zip(("text", "pair"), wanted):
            if name not in names:
                raise UserError(f"{path}: no column {name!r} (data.columns.{key}); {allowed(name, names)}")
        return wanted
    for known in TEXTS:
        if set(known) <= set(names):
            return list(known)
    raise UserError(
        f"{path}: no column of text is known by its name; name it with data.columns.text=NAME (columns: "
        f"{', '.join(map(repr, names))})"
    )


def _label(names: Sequence[str], texts: list[str], columns: ColumnsConfig, path: Path) -> str:
    if columns.label is not None:
        if columns.label not in names:
            raise UserError(
                f"{path}: no column {columns.label!r} (data.columns.label); {allowed(columns.label, names)}"
            )
        return columns.label
    for known in LABELS:
        if known in names and known not in texts:
            return known
    raise UserError(
        f"{path}: no column of labels is known by its name; name it with data.columns.label=NAME (columns: "
        f"{', '.join(map(repr, names))})"
    )


_Choose = Callable[[Sequence[str]], list[str]]


def _records(path: Path, choose: _Choose) -> Iterator[tuple[str, list[Any]]]:
    """(where it stands, its values in the columns that ``choose`` picks) of each row."""
    match path.suffix.lower():
        case ".tsv":
            return _delimited(path, choose, "\t")
        case ".csv":
            return _delimited(path, choose, ",")
        case ".jsonl" | ".ndjson":
            return _json_lines(path, choose)
        case ".parquet":
            return parquet_rows(path, choose)
    raise UserError(f"{path}: labelled rows come in {', '.join(SUFFIXES)} files; this name ends in {path.suffix!r}")


def _delimited(path: Path, choose: _Choose, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    quoted = delimiter != "\t"
    try:
        with reading(path), open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, quoting=_MINIMAL if quoted else _NONE, strict=True)
            names = next(reader, None)
            if names is None:
                raise UserError(f"{path}: it is empty")
            rows: Iterator[list[str]] = iter(reader)
            if _is_cola(names):
                names, rows = _COLA, chain([names], reader)
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise UserError(f"{path}, line 1: two columns are called {twice!r}")
            index = [names.index(name) for name in choose(names)]
            for row in rows:
                if not row:
                    continue
                where = f"{path}, line {reader.line_num}"
                if len(row) != len(names):
                    raise UserError(
                        f"{where}: it has {len(row)} columns, and the file {len(names)}; mend or delete this line"
                    )
                yield where, [row[i] for i in index]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; mend or delete this line") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: the byte 0x{error.object[error.start]:02x}") from None


def _is_cola(first: list[str]) -> bool:
    """Whether the first line is a row of CoLA's own files: source, label, the linguists' star or nothing, sentence."""
    return len(first) == len(_COLA) and first[1] in ("0", "1") and first[2] in ("", "*")


def _json_lines(path: Path, choose: _Choose) -> Iterator[tuple[str, list[Any]]]:
    wanted: list[str] | None = None
    for where, record in json_lines_records(path):
        wanted = wanted or choose(list(record))
        lacking = [name for name in wanted if name not in record]
        if lacking:
            raise UserError(f"{where}: no field {lacking[0]!r}; its fields: {', '.join(map(repr, record)) or 'none'}")
        yield where, [record[name] for name in wanted]
