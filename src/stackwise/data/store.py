"""The token store: a corpus as two arrays of token ids on disk, built once and memory-mapped.

``CACHE/tokens/KEY/{train.bin,validation.bin,meta.json}``, where KEY is a hash of the corpus' content, the tokenizer and
the split: a store is never rebuilt, and never taken for another. It is built in a scratch folder and renamed into place
last, in memory that does not grow with the corpus. The arrays are hashed when they are written and compared with their
hashes each time the store is opened, large ones in the background. ``CACHE/tokenizers/KEY`` holds the tokenizers learnt
from a corpus.

Each document is followed by the end token, in both arrays. The two ways of splitting:

- documents: a document is for validation when a 16-bit hash of its content lies below a threshold, the one that brings
  the share of the text nearest to the fraction asked for. Equal documents land on the same side; order does not matter.
- tail: the last of each document's characters are for validation; the first int(n · (1 − fraction)) of n for training.

The characters tokenizer knows the characters of the whole corpus; BPE learns from the training side only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from stackwise.config.data import DataConfig
from stackwise.data.cache import cache_root
from stackwise.data.corpora import open_corpus
from stackwise.data.corpus import Corpus, Document, Progress
from stackwise.data.files import open_files
from stackwise.data.tokenizers import (
    CharacterTokenizer,
    LibraryTokenizer,
    Tokenizer,
    load_tokenizer,
    ready_tokenizer,
    train_bpe,
)
from stackwise.data.verification import ARRAYS, Verification
from stackwise.errors import RunError, UserError
from stackwise.files import publish, reason, remove_leftovers, scratch_folder
from stackwise.reading import read_object
from stackwise.signals import stop_if_asked, stoppable

FORMAT_VERSION = 1
AUTO_DOCUMENTS = 20
"""``validation_split: auto`` splits by documents from this number of them on, and at their tails below it."""

BPE_TRAINING_BYTES = 1 << 28
"""BPE learns from at most about this much text, taken evenly from all over the training side."""

VERIFIED_AT_ONCE_BYTES = 1 << 27
"""Stores up to this size are compared with their hashes before they are returned; larger ones by ``verify``."""

_BATCH_CHARACTERS = 1 << 21
_BATCH_TEXTS = 1 << 14
_REPORT_BYTES = 1 << 18
_BUCKETS = 1 << 16
_RECORD = struct.Struct("<Hq")  # of a document: the hash of its content, its characters
_UNUSABLE = {
    errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG,
}  # fmt: skip
"""What a place answers that will never hold a store, whatever is done about the disk."""


@dataclass(frozen=True)
class PreparedData:
    """A corpus as tokens.

    ``train``, ``validation``: memory-mapped ids (tokens,), uint16 where the vocabulary allows it, else uint32.
    ``train_bytes``, ``validation_bytes``: bytes of UTF-8 behind each; end tokens have none. ``split``: how the two were
    parted. ``key``: a hash of everything that determines the arrays; ``sha256``: one of the arrays themselves.
    ``mask_added``: the tokenizer had no mask token. ``verify`` ends the comparison of a large store with its hashes.
    """

    tokenizer: Tokenizer
    train: np.memmap
    validation: np.memmap
    key: str
    sha256: str
    train_bytes: int
    validation_bytes: int
    n_documents: int
    split: Literal["documents", "tail"]
    folder: Path
    verify: Callable[[], None]
    """Waits until all arrays are compared with their hashes; RunError when one is damaged. Call it before training."""
    mask_added: bool = False
    sources: tuple[tuple[int, int, int], ...] = ()
    """Of each source: its training tokens, its validation tokens, and the bytes of text behind the latter."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text a token of the validation array."""
        return self.validation_bytes / len(self.validation)


def prepare(
    config: DataConfig,
    *,
    need_mask: bool = False,
    progress: Progress | None = None,
    cache_dir: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    check_key: Callable[[str], None] | None = None,
) -> PreparedData:
    """The tokens of the corpus that ``config`` names, from the store; built there first when it has not got them.

    Args:
        need_mask: give a tokenizer without a mask token one.
        progress: called often with (what is done, bytes done, bytes in all or ``None``).
        cache_dir: instead of ``config.cache_dir``.
        tokenizer: instead of ``config.tokenizer``: the one that a run keeps.
        check_key: called with the ``key`` of the data before a store of it is built; may raise.

    Raises:
        UserError: the corpus, the tokenizer or the place of the store cannot be used.
        RunError: the disk is full, or a store is damaged.
    """
    report = _sparse(progress)
    root = cache_root(cache_dir if cache_dir is not None else config.cache_dir)
    remove_leftovers(root / "tokens", "store")  # of a process killed after its store was in place; none follows
    tokenizer = tokenizer or ready_tokenizer(config)
    lacking = need_mask and isinstance(tokenizer, LibraryTokenizer) and tokenizer.mask_id is None
    if lacking:
        assert isinstance(tokenizer, LibraryTokenizer)
        tokenizer = tokenizer.with_mask()
    corpus = open_corpus(config, root)
    content = corpus.fingerprint(report)
    # Two passes at most: what is built by the first is there for the second.
    for _ in range(2):
        tokenizer_folder = root / "tokenizers" / _key(content, _split_settings(config), config.tokenizer.model_dump())
        if tokenizer is None and tokenizer_folder.is_dir():
            try:
                tokenizer = load_tokenizer(tokenizer_folder)
            except RunError as error:
                raise RunError(f"{error}; delete this folder and start again") from None
        if tokenizer is not None:
            key = _key(content, _split_settings(config), tokenizer.fingerprint)
            if check_key is not None:
                check_key(key)
            folder = root / "tokens" / key
            if folder.is_dir():
                data = _open(folder, key, tokenizer)
                if data is not None:
                    return replace(data, mask_added=lacking)
        try:
            if tokenizer is not None and folder.is_dir():
                shutil.rmtree(folder)  # it cannot be verified
            with stoppable(), scratch_folder(root / "tokens", "store") as scratch:
                _build(config, corpus, content, tokenizer, tokenizer_folder, root, scratch, report)
        except OSError as error:
            _raise_unwritten(root, error)
    raise RunError(f"{root}: the token store vanished right after it was built")


def encode_files(paths: Sequence[str], tokenizer: Tokenizer, text_field: str) -> tuple[np.ndarray, int]:
    """All tokens of some files, folders or globs, and the bytes of UTF-8 behind them.

    Each document is followed by the end token, as in the store. The tokens are uint16 or uint32, in memory.
    """
    n_bytes = 0

    def texts() -> Iterator[_Part]:
        for document in open_files(paths, text_field).documents():
            previous: str | None = None
            for piece in document:
                if previous is not None:
                    yield _Part(0, previous, False)
                previous = piece
            if previous is not None:
                yield _Part(0, previous, True)

    arrays = [np.empty(0, dtype=_dtype(tokenizer))]
    for part, ids in _encode(texts(), tokenizer):
        n_bytes += part.n_bytes
        arrays.append(ids)
    return np.concatenate(arrays), n_bytes


def _sparse(progress: Progress | None) -> Progress:
    """``progress``, called at the start and the end of each kind of work and every ``_REPORT_BYTES`` between."""
    last = ("", 0)

    def report(description: str, done: int, total: int | None) -> None:
        nonlocal last
        stop_if_asked()
        if progress is not None and (description != last[0] or done == total or done >= last[1] + _REPORT_BYTES):
            last = (description, done)
            progress(description, done, total)

    return report


def _key(*parts: object) -> str:
    text = json.dumps([FORMAT_VERSION, *parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def _split_settings(config: DataConfig) -> list[object]:
    return [config.validation_split, config.validation_fraction]


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype("<u2") if tokenizer.vocab_size <= 1 << 16 else np.dtype("<u4")


def _open(folder: Path, key: str, tokenizer: Tokenizer) -> PreparedData | None:
    """The store in ``folder``; None when it was written without hashes, and so cannot be trusted. RunError: damaged."""
    dtype = _dtype(tokenizer)
    arrays = []
    try:
        meta = read_object(folder / "meta.json")
        if "sha256" not in meta:
            return None
        for name, tokens in zip(ARRAYS, meta["tokens"]):
            size = (folder / name).stat().st_size
            if size != tokens * dtype.itemsize:
                raise RunError(
                    f"{folder} is damaged: {name} has {size:,} bytes instead of {tokens * dtype.itemsize:,}; "
                    "delete this folder and start again"
                )
            arrays.append(np.memmap(folder / name, dtype=dtype, mode="r", shape=(tokens,)))
        train, validation = arrays
        train_bytes, validation_bytes = map(int, meta["bytes"])
        n_documents, split = int(meta["n_documents"]), meta["split"]
        hashes = [str(digest) for digest in meta["sha256"]]
        whole_text = [[len(train), len(validation), validation_bytes]]
        sources = tuple((int(a), int(b), int(c)) for a, b, c in meta.get("sources", whole_text))
        if [sum(column) for column in zip(*sources)] != whole_text[0]:
            raise ValueError("its sources are not the whole")
        if len(hashes) != len(ARRAYS):
            raise ValueError(f"it has {len(hashes)} hashes")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder} is damaged ({error}); delete this folder and start again") from None
    verification = Verification(folder, hashes, dtype, tokenizer.vocab_size)
    if train.nbytes + validation.nbytes <= VERIFIED_AT_ONCE_BYTES:
        verification.result()
    whole = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return PreparedData(
        tokenizer, train, validation, key, whole, train_bytes, validation_bytes, n_documents, split, folder,
        verification.result, sources=sources,
    )  # fmt: skip


def _build(
    config: DataConfig,
    corpus: Corpus,
    content: str,
    tokenizer: Tokenizer | None,
    tokenizer_folder: Path,
    root: Path,
    scratch: Path,
    report: Progress,
) -> None:
    scan = _scan(corpus, scratch / "documents", config.tokenizer.kind == "characters", report)
    split = _choose_split(scan, config)
    if tokenizer is None:
        if config.tokenizer.kind == "characters":
            tokenizer = CharacterTokenizer(scan.characters)
        else:
            texts = _training_sample(_parts(corpus, scan, split), split.train_bytes, report)
            tokenizer = train_bpe(texts, config.tokenizer.vocab_size)
        corpus.check_unchanged()
        tokenizer.save(scratch / "tokenizer")
        publish(scratch / "tokenizer", tokenizer_folder)
    store = scratch / "store"
    store.mkdir()
    tokens, n_bytes, hashers = [0, 0], [0, 0], [hashlib.sha256(), hashlib.sha256()]
    sources, amounts = [[0, 0, 0] for _ in corpus.sources], [0] * len(corpus.sources)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(store / name, "wb")) for name in ARRAYS]
        for part, ids in _encode(_parts(corpus, scan, split), tokenizer):
            data = ids.tobytes()
            files[part.side].write(data)
            hashers[part.side].update(data)
            tokens[part.side] += len(ids)
            n_bytes[part.side] += part.n_bytes
            sources[part.source][part.side] += len(ids)
            sources[part.source][2] += part.n_bytes * part.side
            amounts[part.source] += part.n_bytes
            report("tokenizing", sum(n_bytes), scan.n_bytes)
    corpus.check_unchanged()
    for source, counts, amount in zip(corpus.sources, sources, amounts):
        if not all(counts[:2]):
            raise UserError(
                f"data.path: {source.description}: {amount:,} bytes of text are too few for training and validation"
            )
    meta = {
        "format": FORMAT_VERSION,
        "corpus": corpus.description,
        "corpus_fingerprint": content,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "dtype": _dtype(tokenizer).name,
        "tokens": tokens,
        "sha256": [hasher.hexdigest() for hasher in hashers],
        "bytes": n_bytes,
        "sources": sources,
        "n_documents": scan.n_documents,
        "split": split.mode,
        "validation_fraction": split.fraction,
    }
    (store / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    publish(store, root / "tokens" / _key(content, _split_settings(config), tokenizer.fingerprint))


def _raise_unwritten(root: Path, error: OSError) -> NoReturn:
    kind = UserError if error.errno in _UNUSABLE else RunError
    raise kind(
        f"{root}: the token store cannot be written: {reason(error)} (data.cache_dir sets another place)"
    ) from error


@dataclass(frozen=True)
class _Scan:
    """What one pass over a corpus finds. ``file`` has a ``_RECORD`` of each document."""

    file: Path
    n_documents: int
    n_bytes: int
    bucket_bytes: np.ndarray
    bucket_documents: np.ndarray
    characters: frozenset[str]


def _scan(corpus: Corpus, file: Path, want_characters: bool, report: Progress) -> _Scan:
    bucket_bytes, bucket_documents = np.zeros(_BUCKETS, dtype=np.int64), np.zeros(_BUCKETS, dtype=np.int64)
    characters: set[str] = set()
    n_documents = n_bytes = 0
    with open(file, "wb") as out:
        for document in corpus.documents():
            digest = hashlib.blake2b(digest_size=2)
            n_characters = size = 0
            for piece in document:
                data = piece.encode("utf-8")
                digest.update(data)
                n_characters += len(piece)
                size += len(data)
                if want_characters:
                    characters.update(piece)
                report(
                    "reading the text",
                    n_bytes + size,
                    None if corpus.size is None else max(corpus.size, n_bytes + size + 1),
                )
            bucket = int.from_bytes(digest.digest(), "little")
            bucket_bytes[bucket] += size
            bucket_documents[bucket] += 1
            n_documents += 1
            n_bytes += size
            out.write(_RECORD.pack(bucket, n_characters))
    if not n_bytes:
        raise UserError(f"data.path: {corpus.description}: contains no text: every document is empty")
    report("reading the text", n_bytes, n_bytes)
    return _Scan(file, n_documents, n_bytes, bucket_bytes, bucket_documents, frozenset(characters))


@dataclass(frozen=True)
class _Split:
    mode: Literal["documents", "tail"]
    fraction: float
    threshold: int
    train_bytes: int
    """About, for tail."""

    def train_characters(self, bucket: int, n_characters: int) -> int:
        """How many of a document's first characters are for training."""
        if self.mode == "documents":
            return 0 if bucket < self.threshold else n_characters
        return int(n_characters * (1 - self.fraction))


def _choose_split(scan: _Scan, config: DataConfig) -> _Split:
    fraction, mode = config.validation_fraction, config.validation_split
    if mode == "tail" or (mode == "auto" and scan.n_documents < AUTO_DOCUMENTS):
        return _Split("tail", fraction, 0, int(scan.n_bytes * (1 - fraction)))
    # Entry k: what the buckets up to k hold, which would be the validation side of the threshold k + 1.
    documents, size = np.cumsum(scan.bucket_documents), np.cumsum(scan.bucket_bytes)
    possible = np.flatnonzero((documents > 0) & (documents < scan.n_documents))
    if not possible.size:
        alike = "there is only one" if scan.n_documents == 1 else f"all {scan.n_documents:,} are equal"
        raise UserError(f"data.validation_split: {mode} needs two different documents, but {alike}; set it to tail")
    best = int(possible[np.argmin(np.abs(size[possible] - fraction * scan.n_bytes))])
    return _Split("documents", fraction, best + 1, int(scan.n_bytes - size[best]))


@dataclass(frozen=True)
class _Part:
    """A piece of a document on one side (0 training, 1 validation); ``last``: the document ends there on that side.

    ``source``: which of the corpus' sources it is of.
    """

    side: int
    text: str
    last: bool
    source: int = 0

    @property
    def n_bytes(self) -> int:
        return len(self.text) if self.text.isascii() else len(self.text.encode("utf-8"))


def _parts(corpus: Corpus, scan: _Scan, split: _Split) -> Iterator[_Part]:
    changed = f"{corpus.description}: the text changed while it was read; start again"
    with open(scan.file, "rb") as records:
        for number, document in _numbered(corpus):
            record = records.read(_RECORD.size)
            if len(record) < _RECORD.size:
                raise RunError(changed)
            bucket, n_characters = _RECORD.unpack(record)
            cut = split.train_characters(bucket, n_characters)
            start = 0
            for piece in document:
                end = start + len(piece)
                if start < cut:
                    yield _Part(0, piece[: cut - start], end >= cut, number)
                if end > cut:
                    yield _Part(1, piece[max(0, cut - start) :], end >= n_characters, number)
                start = end
            if start != n_characters:
                raise RunError(changed)
        if records.read(1):
            raise RunError(changed)


def _numbered(corpus: Corpus) -> Iterator[tuple[int, Document]]:
    """The documents with the number of the source that they are of."""
    return ((number, document) for number, source in enumerate(corpus.sources) for document in source.documents())


def _training_sample(parts: Iterator[_Part], total: int, report: Progress) -> Iterator[str]:
    """The training texts, or an even ``BPE_TRAINING_BYTES`` of them."""
    share = min(1.0, BPE_TRAINING_BYTES / max(1, total))
    seen = taken = 0
    for part in parts:
        if part.side:
            continue
        seen += part.n_bytes
        if taken < share * seen:
            taken += part.n_bytes
            yield part.text
            report("learning the vocabulary", min(seen, total), total)
    report("learning the vocabulary", total, total)


def _encode(parts: Iterator[_Part], tokenizer: Tokenizer) -> Iterator[tuple[_Part, np.ndarray]]:
    """Each part with its ids, in the dtype of the store, the end token after the last of a document."""
    dtype = _dtype(tokenizer)
    end = np.array([tokenizer.end_id], dtype=dtype)
    for batch in _batches(parts):
        for part, ids in zip(batch, tokenizer.encode_many([part.text for part in batch])):
            ids = ids.astype(dtype)
            yield part, np.concatenate((ids, end)) if part.last else ids


def _batches(parts: Iterator[_Part]) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    characters = 0
    for part in parts:
        batch.append(part)
        characters += len(part.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_TEXTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
