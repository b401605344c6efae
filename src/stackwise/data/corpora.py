"""Corpora: documents of text, read piece by piece so that none need fit in memory.

Text is kept exactly: no newline is translated, no byte order mark removed. Empty documents are left out.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import json
import os
import re
import sys
import sysconfig
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise.config.data import DataConfig
from stackwise.data.cache import cache_root
from stackwise.errors import RunError, UserError
from stackwise.files import remove_leftovers, write_atomic
from stackwise.reading import JSONError, from_home, json_type, parse_json, read_json

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how much is done and how much there is (``None``: not known), in bytes of text."""

Document = Iterator[str]
"""The text of a document in pieces of at most ``PIECE`` bytes; read it before going on to the next document."""

PIECE = 1 << 18
"""Bytes in a piece, at most; pieces end at line ends where there are any."""

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

_LIBRARY_FOLDERS_LEFT_OUT = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"))
_HASH_CHUNK = 1 << 20
_SETTLED_NS = 2_000_000_000
"""A file changed less than this ago may change again within the clock's tick; its hash is not remembered."""


class Corpus(ABC):
    """Documents in a fixed order. ``description`` is for people; ``size`` about the bytes to read, where known."""

    description: str
    size: int | None

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents, from the first, each time it is called."""

    @abstractmethod
    def fingerprint(self, progress: Progress | None = None) -> str:
        """SHA-256 (hex) of what ``documents`` gives, or of what determines it."""

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raises ``RunError`` when the corpus is no longer the one that ``fingerprint`` saw."""


def open_corpus(config: DataConfig, cache_dir: str | Path | None = None) -> Corpus:
    """The corpus that ``data.source`` and ``data.path`` name.

    Args:
        cache_dir: where hashes of files are remembered; default ``config.cache_dir`` and what ``cache_root`` says.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    if config.source == "huggingface":
        assert isinstance(config.path, str)
        return HuggingFaceCorpus(config.path, config.subset, config.split, config.text_field)
    memo = cache_root(cache_dir if cache_dir is not None else config.cache_dir) / "hashes"
    if config.source == "python-stdlib":
        return _library_sources(memo)
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
        for file in _expand(entry, key):
            files.setdefault(file.resolve(), file)
    sources = [_source(file, text_field) for file in files.values()]
    if not any(source.size for source in sources):
        raise UserError(f"{key}: {', '.join(map(repr, paths))}: no text there: every file is empty")
    return FileCorpus(sources, ", ".join(map(str, paths)), memo)


def _expand(entry: str, key: str) -> list[Path]:
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
        with _reading(folder), os.scandir(folder) as found:
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
        return _stat(self.path).st_size


def _source(path: Path, text_field: str) -> SourceFile:
    suffix = path.suffix.lower()
    if suffix in JSON_LINES_SUFFIXES:
        return SourceFile(path, f"jsonl {text_field}", lambda p: _json_lines_documents(p, text_field))
    if suffix == PARQUET_SUFFIX:
        return SourceFile(path, f"parquet {text_field}", lambda p: _parquet_documents(p, text_field))
    return SourceFile(path, "text", _text_document)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what the system says against reading a file into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _stat(path: Path) -> os.stat_result:
    with _reading(path):
        return path.stat()


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
    stat = _stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _hash_file(path: Path, advance: Callable[[int], None]) -> str:
    """SHA-256 (hex) of a file; ``advance`` is called with the bytes read so far."""
    digest, done = hashlib.sha256(), 0
    with _reading(path), open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            advance(done)
    return digest.hexdigest()


def _text_document(path: Path) -> Iterator[Document]:
    if _stat(path).st_size:
        yield _file_pieces(path)


def _file_pieces(path: Path) -> Document:
    """A file of UTF-8 text, split at line ends (inside a line only where it is longer than a piece)."""
    with _reading(path), open(path, "rb") as file:
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


def split_text(text: str) -> Document:
    """``text`` in pieces, split at line ends."""
    length = PIECE // 4  # of characters, each four bytes at most
    start = 0
    while start < len(text):
        end = start + length
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _json_lines_documents(path: Path, text_field: str) -> Iterator[Document]:
    offset = 0
    with _reading(path), open(path, "rb") as file:
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
            if text := _text_of(record, text_field, where):
                yield split_text(text)


def _text_of(record: dict[str, Any], text_field: str, where: str) -> str:
    if text_field not in record:
        raise UserError(_no_field(text_field, record, where))
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


def _no_field(text_field: str, fields: Any, where: str) -> str:
    names = ", ".join(map(repr, fields)) or "none"
    return f"{where}: no field {text_field!r} (data.text_field); its fields: {names}"


def _parquet_documents(path: Path, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'stackwise[parquet]'") from None
    try:
        with _reading(path), pyarrow.parquet.ParquetFile(path) as file:
            fields = file.schema_arrow.names
            if text_field not in fields:
                raise UserError(_no_field(text_field, fields, str(path)))
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    where = f"{path}, row {row}"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError:
                        raise UserError(f"{where}: the field {text_field!r} is not UTF-8 text") from None
                    if text := _text_of({text_field: text}, text_field, where):
                        yield split_text(text)
    except pyarrow.ArrowException as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"{path}: not a Parquet file that can be read ({problem})") from None


def _library_sources(memo: Path) -> FileCorpus:
    """The sources of Python's own library on this machine, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, below, names in os.walk(root):
        below[:] = set(below) - _LIBRARY_FOLDERS_LEFT_OUT
        files += [path for name in names if (path := Path(folder, name)).suffix == ".py" and path.is_file()]
    if not files:
        raise UserError(
            f"data.source: python-stdlib: no sources in {root}; give text with data.source=files data.path=…"
        )
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    sources = [SourceFile(path, "python", _python_source) for path in files]
    return FileCorpus(sources, f"library of Python {sys.version.split()[0]}", memo)


def _python_source(path: Path) -> Iterator[Document]:
    """A library file; none where it is in an encoding other than UTF-8."""
    with _reading(path):
        data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return
    if text:
        yield split_text(text)


class HuggingFaceCorpus(Corpus):
    """A data set of the Hugging Face hub, at the revision that it has when it is opened. Each pass streams it again.

    Args:
        name: of the data set, or ``name@revision``: a branch, a tag or a full commit hash. With a hash, a token store
            that was built before is found without the network.
        subset: its configuration, or ``None``.
        split: train, validation…
        text_field: the column that holds the text.
    """

    size = None

    def __init__(self, name: str, subset: str | None, split: str, text_field: str) -> None:
        try:
            import datasets
            import huggingface_hub
        except ImportError:
            raise UserError(
                f"data.path: {name!r}: reading Hugging Face data sets needs datasets: pip install 'stackwise[datasets]'"
            ) from None
        if Path(name).exists():
            raise UserError(f"data.path: {name!r} is on this machine; set data.source: files to read it")
        self._name, _, revision = name.partition("@")
        self._subset, self._split, self._text_field = subset, split, text_field
        self._datasets = datasets
        if re.fullmatch("[0-9a-f]{40}", revision):
            self._revision = revision
        else:
            try:
                self._revision = str(huggingface_hub.HfApi().dataset_info(self._name, revision=revision or None).sha)
            except _network_errors() as error:
                raise self._unreadable(error) from None
        self.description = f"{self._name} at {self._revision[:8]}, {split}"

    def documents(self) -> Iterator[Document]:
        where = f"data.path: {self._name!r}, {self._split}"
        try:
            records = self._datasets.load_dataset(
                self._name, self._subset, split=self._split, revision=self._revision, streaming=True
            )
            if records.column_names is not None:
                if self._text_field not in records.column_names:
                    raise UserError(_no_field(self._text_field, records.column_names, where))
                records = records.select_columns([self._text_field])
            for number, record in enumerate(records, 1):
                if text := _text_of(record, self._text_field, f"{where}, record {number:,}"):
                    yield split_text(text)
        except UserError:
            raise
        except _network_errors() as error:
            raise self._unreadable(error) from None

    def fingerprint(self, progress: Progress | None = None) -> str:
        parts = ["huggingface", self._name, self._subset, self._split, self._revision, self._text_field]
        return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()

    def check_unchanged(self) -> None:
        """A revision does not change."""

    def _unreadable(self, error: BaseException) -> UserError:
        problem = " ".join(str(error).split())[:300] or type(error).__name__
        return UserError(
            f"data.path: {self._name!r}: cannot be read from the Hugging Face hub ({type(error).__name__}: {problem}); "
            "check the name, data.subset, data.split and the network"
        )


def _network_errors() -> tuple[type[BaseException], ...]:
    """What reading from the hub can raise; the transport library depends on the version of the hub's client."""
    errors: list[type[BaseException]] = [OSError, ValueError]
    transports = (("httpx", "HTTPError"), ("httpx2", "HTTPError"), ("aiohttp", "ClientError"))
    for module, name in (*transports, ("datasets.exceptions", "DatasetsError")):
        if module in sys.modules:
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)
