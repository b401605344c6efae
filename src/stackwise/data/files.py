"""Files, folders and globs as a corpus."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise.config.data import SourceConfig
from stackwise.data.corpus import Corpus, Document, Progress
from stackwise.data.records import (
    json_lines_documents,
    parquet_documents,
    reading,
    stat_of,
    text_document,
)
from stackwise.errors import RunError, UserError
from stackwise.files import remove_leftovers, write_atomic
from stackwise.reading import from_home, read_json

TEXT_SUFFIXES = frozenset(
    (
        *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".html", ".htm", ".xml", ".css", ".csv", ".tsv"),
        *(".yaml", ".yml", ".toml", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".kt"),
        *(".scala", ".js", ".mjs", ".ts", ".tsx", ".jsx", ".go", ".rs", ".rb", ".php", ".pl", ".lua", ".r", ".jl"),
        *(".swift", ".hs", ".ml", ".sh", ".sql"),
    )
)
JSON_LINES_SUFFIXES = frozenset((".jsonl", ".ndjson"))
PARQUET_SUFFIX = ".parquet"
"""A folder gives its files with these suffixes; a file, a glob or a list gives whatever it names."""

_HASH_CHUNK = 1 << 20
_SETTLED_NS = 2_000_000_000
"""A file changed less than this ago may change again within the clock's tick; its hash is not remembered."""


def files_of(config: SourceConfig, memo: Path) -> FileCorpus:
    """The corpus of ``data.path``: a file, a folder, a glob, or a list of them."""
    assert config.path is not None
    paths = [config.path] if isinstance(config.path, str) else list(config.path)
    return open_files(paths, config.text_field, memo, key="data.path")


def open_files(paths: Sequence[str], text_field: str, memo: Path | None = None, *, key: str = "--data") -> FileCorpus:
    """The corpus of files, folders and globs.

    Args:
        text_field: of the records of JSON-lines and Parquet files.
        memo: folder where hashes of files are remembered.
        key: what gave the paths, for error messages.
    """
    files: dict[Path, Path] = {}
    for entry in paths:
        for file in expand(entry, key):
            files.setdefault(file.resolve(), file)
    sources = [_source(file, text_field) for file in files.values()]
    if not any(source.size for source in sources):
        raise UserError(f"{key}: {', '.join(map(repr, paths))}: contains no text: every file is empty")
    return FileCorpus(sources, ", ".join(map(str, paths)), memo)


def expand(entry: str, key: str) -> list[Path]:
    """The files that a path or glob names, sorted."""
    path = from_home(entry, key)
    if path.is_file():
        return [path]
    if path.is_dir():
        wanted = TEXT_SUFFIXES | JSON_LINES_SUFFIXES | {PARQUET_SUFFIX}
        found = [
            folder / name
            for folder, names in _folders(path, recursive=True)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in wanted and (folder / name).is_file()
        ]
        if not found:
            raise UserError(
                f"{key}: {entry!r}: no text, .jsonl or .parquet file in this folder; "
                "name files of other suffixes with a glob"
            )
        return sorted(found)
    if glob.has_magic(entry):
        _refuse_unreadable(Path(path.anchor or "."), path.parts[1:] if path.anchor else path.parts)
        matches = [Path(p) for p in glob.glob(str(path), recursive=True)]
        found = [p for p in matches if p.is_file()]
        if not found:
            raise UserError(f"{key}: {entry!r}: no file matches")
        return sorted(found)
    raise UserError(f"{key}: {entry!r}: no such file or folder")


def _folders(folder: Path, recursive: bool) -> Iterator[tuple[Path, list[str]]]:
    """``folder`` and the names in it, then the same of each folder below that is neither hidden nor a link.

    UserError when one cannot be read: its files would be missing without a word.
    """
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        with reading(folder), os.scandir(folder) as found:
            entries = list(found)
        yield folder, [entry.name for entry in entries]
        for entry in entries if recursive else ():
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                waiting.append(folder / entry.name)


def _refuse_unreadable(folder: Path, pattern: tuple[str, ...]) -> None:
    """UserError when a folder in which files may match ``pattern`` cannot be read; ``glob`` passes over it."""
    if not pattern or not folder.is_dir():
        return
    head, rest = pattern[0], pattern[1:]
    if not glob.has_magic(head):
        _refuse_unreadable(folder / head, rest)
        return
    for below, names in _folders(folder, recursive=head == "**"):
        if head == "**":
            _refuse_unreadable(below, rest)
        else:
            for name in fnmatch.filter(names, head) if rest else ():
                if not name.startswith(".") or head.startswith("."):
                    _refuse_unreadable(below / name, rest)


@dataclass(frozen=True)
class SourceFile:
    """A file and how its documents are read. ``form`` says all that the reading depends on, for the fingerprint."""

    path: Path
    form: str
    read: Callable[[Path], Iterator[Document]]

    @property
    def size(self) -> int:
        return stat_of(self.path).st_size


def _source(path: Path, text_field: str) -> SourceFile:
    suffix = path.suffix.lower()
    if suffix in JSON_LINES_SUFFIXES:
        return SourceFile(path, f"jsonl {text_field}", lambda p: json_lines_documents(p, text_field))
    if suffix == PARQUET_SUFFIX:
        return SourceFile(path, f"parquet {text_field}", lambda p: parquet_documents(p, text_field))
    return SourceFile(path, "text", text_document)


class FileCorpus(Corpus):
    """The documents of files, in their order.

    Args:
        memo: folder that remembers the hashes of files by path, size and times of change; ``None``: nowhere.
    """

    def __init__(self, sources: Sequence[SourceFile], description: str, memo: Path | None) -> None:
        self._sources, self._memo = list(sources), memo
        n = len(self._sources)
        self.description = f"{description} ({n:,} file{'s' if n != 1 else ''})"
        compressed = any(source.form.startswith("parquet") for source in self._sources)
        self.size = None if compressed else sum(source.size for source in self._sources)
        self._seen: dict[Path, list[int]] = {}

    def documents(self) -> Iterator[Document]:
        for source in self._sources:
            yield from source.read(source.path)

    def fingerprint(self, progress: Progress | None = None) -> str:
        known = self._read_memo()
        remembered: dict[str, Any] = {}
        whole = hashlib.sha256()
        total, done = sum(source.size for source in self._sources), 0
        for source in self._sources:
            state = _state(source.path)
            self._seen[source.path] = state
            name = str(source.path.absolute())
            entry = known.get(name)
            if isinstance(entry, dict) and entry.get("state") == state and isinstance(entry.get("sha256"), str):
                digest = entry["sha256"]
            else:
                before = done

                def advance(n: int, before: int = before) -> None:
                    if progress is not None:
                        progress("checking the text", min(before + n, total), total)

                digest = _hash_file(source.path, advance)
            done += state[0]
            if time.time_ns() - max(state[1:]) > _SETTLED_NS:
                remembered[name] = {"state": state, "sha256": digest}
            whole.update(json.dumps([source.form, digest]).encode("ascii"))
        if progress is not None:
            progress("checking the text", total, total)
        if remembered != known:
            self._write_memo(remembered)
        return whole.hexdigest()

    def check_unchanged(self) -> None:
        for path, state in self._seen.items():
            if _state(path) != state:
                raise RunError(f"{path}: it changed while it was read; start again when it is complete")

    def _memo_file(self) -> Path | None:
        if self._memo is None:
            return None
        names = "\0".join(str(source.path.absolute()) for source in self._sources)
        return self._memo / f"{hashlib.sha256(os.fsencode(names)).hexdigest()[:32]}.json"

    def _read_memo(self) -> dict[str, Any]:
        """What is remembered of each file; nothing where the memo is missing or damaged, since it only saves time."""
        file = self._memo_file()
        try:
            memo = {} if file is None else read_json(file)
        except (OSError, ValueError):
            return {}
        return memo if isinstance(memo, dict) else {}

    def _write_memo(self, memo: dict[str, Any]) -> None:
        file = self._memo_file()
        if file is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(file.parent, re.escape(file.name))
            write_atomic(file, [json.dumps(memo).encode()])
        except OSError:  # a memo only saves time, and the cache may be another user's or written by two at once
            return


def _state(path: Path) -> list[int]:
    """What changes when a file's content does: size, and the times of change of content and of its entry."""
    stat = stat_of(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _hash_file(path: Path, advance: Callable[[int], None]) -> str:
    """SHA-256 (hex) of a file; ``advance`` is called with the bytes read so far."""
    digest, done = hashlib.sha256(), 0
    with reading(path), open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            advance(done)
    return digest.hexdigest()
