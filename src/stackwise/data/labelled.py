"""Labelled files as rows of token ids, each with a class or a number.

A row is its text and the end token; of a pair, both texts, each with the end token after it, which so separates them.
Rows are short and need no store: they are tokenized again each time that a run starts, and known by their hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackwise.config.data import ColumnsConfig, DataConfig
from stackwise.data.batches import Batch, Order
from stackwise.data.corpus import Document, Progress, split_text
from stackwise.data.files import FileCorpus, SourceFile, expand
from stackwise.data.tables import Row, class_name, number, rows_of, sorted_names
from stackwise.data.tokenizers import CharacterTokenizer, Tokenizer, ready_tokenizer, train_bpe
from stackwise.errors import UserError
from stackwise.signals import stop_if_asked

_AT_ONCE = 1 << 12
"""Rows tokenized together."""


class LabelledCorpus(FileCorpus):
    """The rows of labelled files, in order; as documents, their texts.

    Args:
        paths: files, folders and globs; ``key`` is what gave them, for messages.
    """

    def __init__(self, paths: Sequence[str], columns: ColumnsConfig, memo: Path | None, *, key: str) -> None:
        self.files = list(dict.fromkeys(file for entry in paths for file in expand(entry, key)))
        self.columns = columns
        form = json.dumps(["labelled", columns.model_dump()])
        super().__init__([SourceFile(file, form, self._documents) for file in self.files], ", ".join(paths), memo)

    def rows(self, *, labelled: bool = True) -> Iterator[Row]:
        for file in self.files:
            yield from rows_of(file, self.columns, labelled=labelled)

    def _documents(self, file: Path) -> Iterator[Document]:
        for row in rows_of(file, self.columns, labelled=False):
            yield from (split_text(text) for text in row.texts if text)


def labelled_of(config: DataConfig, memo: Path | None = None) -> LabelledCorpus:
    """The rows of ``data.path``."""
    return LabelledCorpus(_listed(config.path), config.columns, memo, key="data.path")


def _listed(path: str | tuple[str, ...] | None) -> list[str]:
    return [path] if isinstance(path, str) else list(path or ())


def training_names(config: DataConfig) -> tuple[str, ...]:
    """The classes that the training rows name, in the order of their ids."""
    return sorted_names({class_name(row) for row in labelled_of(config).rows()})


@dataclass(frozen=True)
class LabelledRows:
    """N rows as ids.

    Attributes:
        ids: of all rows one after another; row i is ids[starts[i] : starts[i + 1]].
        labels: (N,) int64 classes, or float32 numbers.
        truncated: how many rows were longer than ``seq_len`` tokens and have lost what is beyond.
        pad_id: what fills a row up.
    """

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    labels: NDArray[np.int64] | NDArray[np.float32]
    truncated: int
    seq_len: int
    pad_id: int

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: NDArray[np.int64], epoch: NDArray[np.int64]) -> Batch:
        """Some of the rows, each filled up to ``seq_len`` on the right."""
        places = np.arange(self.seq_len + 1)
        lengths = self.starts[index + 1] - self.starts[index]
        real = places < lengths[:, None]
        tokens = np.full(real.shape, self.pad_id, dtype=np.int64)
        tokens[real] = self.ids[(self.starts[index][:, None] + places)[real]]
        return Batch(tokens, index, epoch, self.labels[index], real[:, :-1])

    def parts(self) -> Iterator[bytes]:
        """What a hash of the rows is over."""
        for array in (self.ids, self.starts, self.labels):
            yield f"{array.dtype.str} {array.shape}".encode()
            yield array.tobytes()


class LabelledBatches:
    """Batches of rows, in the ``Order`` of their numbers: each is a function of (seed, step)."""

    def __init__(self, rows: LabelledRows, batch_size: int, seed: int) -> None:
        self.rows, self._order = rows, Order([len(rows)], batch_size, seed)

    def batch(self, step: int) -> Batch:
        """The batch of ``step``, from 0."""
        return self.rows.batch(*self._order.samples(step))


@dataclass(frozen=True)
class LabelledData:
    """Labelled files, tokenized.

    ``key``, ``sha256``: hashes of what determines the rows, and of the rows. ``names``: of the classes 0, 1, …
    """

    tokenizer: Tokenizer
    train: LabelledRows
    validation: LabelledRows
    names: tuple[str, ...] | None
    key: str
    sha256: str
    mask_added: bool = False

    def verify(self) -> None:
        """The rows are in memory, and were hashed there."""


def prepare_labelled(
    config: DataConfig,
    seq_len: int,
    *,
    names: tuple[str, ...] | None,
    memo: Path | None = None,
    progress: Progress | None = None,
    tokenizer: Tokenizer | None = None,
) -> LabelledData:
    """The rows of the files that ``config`` names.

    Args:
        seq_len: the most tokens of a row.
        names: of the classes; ``None``: labels are numbers.
        memo: folder where hashes of files are remembered.
        tokenizer: instead of ``config.tokenizer``: the one that a run keeps.

    Raises:
        UserError: a file or a row cannot be used, or a label is not among ``names``.
    """
    corpora = [labelled_of(config, memo), *_validation_corpus(config, memo)]
    corpus, content = corpora[0], [one.fingerprint(progress) for one in corpora]
    tokenizer = tokenizer or ready_tokenizer(config) or _learnt(config)
    target = _targets(names)
    train, validation = (
        _encode(part(config), tokenizer, seq_len, target, progress) for part in (training_rows, validation_rows)
    )
    for one in corpora:
        one.check_unchanged()
    for side, name in ((train, "training"), (validation, "validation")):
        if not len(side):
            raise UserError(f"data.path: {corpus.description}: too few rows for training and validation ({name}: none)")
    settings = [content, config.validation_fraction, tokenizer.fingerprint, seq_len, names]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    digest = hashlib.sha256()
    for side in (train, validation):
        for piece in side.parts():
            digest.update(piece)
    return LabelledData(tokenizer, train, validation, names, key, digest.hexdigest())


def encode_rows(
    rows: Iterable[Row], tokenizer: Tokenizer, seq_len: int, names: tuple[str, ...] | None, *, labelled: bool = True
) -> LabelledRows:
    """``rows`` as ids; as for ``prepare_labelled``. Where they are not ``labelled``, all labels are 0."""
    return _encode(rows, tokenizer, seq_len, _targets(names) if labelled else (lambda row: 0), None)


def training_rows(config: DataConfig) -> Iterator[Row]:
    """The rows to train on."""
    split = config.validation_path is None
    return (row for row in labelled_of(config).rows() if not (split and _validates(row, config)))


def validation_rows(config: DataConfig) -> Iterator[Row]:
    """The rows of ``data.validation_path``, or those of the training files that are kept for validation."""
    others = _validation_corpus(config)
    if others:
        return others[0].rows()
    return (row for row in labelled_of(config).rows() if _validates(row, config))


def _validation_corpus(config: DataConfig, memo: Path | None = None) -> list[LabelledCorpus]:
    """The corpus of ``data.validation_path``, where it is set."""
    if config.validation_path is None:
        return []
    return [LabelledCorpus(_listed(config.validation_path), config.columns, memo, key="data.validation_path")]


def _validates(row: Row, config: DataConfig) -> bool:
    """Whether a row is for validation: by a hash of its texts, so that equal ones land on the same side."""
    digest = hashlib.blake2b(json.dumps(row.texts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < config.validation_fraction * 2**64


def _learnt(config: DataConfig) -> Tokenizer:
    """The tokenizer that ``config`` describes, from the texts of the rows; BPE from those of training alone."""
    if config.tokenizer.kind == "characters":
        every = (part(config) for part in (training_rows, validation_rows))
        return CharacterTokenizer(c for rows in every for row in rows for text in row.texts for c in text)
    return train_bpe((text for row in training_rows(config) for text in row.texts), config.tokenizer.vocab_size)


def _targets(names: tuple[str, ...] | None) -> Callable[[Row], int | float]:
    """What gives the label of a row as its class or its number."""
    if names is None:
        return number
    ids = {name: i for i, name in enumerate(names)}

    def target(row: Row) -> int:
        name = class_name(row)
        if name not in ids:
            raise UserError(
                f"{row.where}: the label {name!r} is not a class of the training rows; they have {', '.join(names)}"
            )
        return ids[name]

    return target


def _encode(
    rows: Iterable[Row], tokenizer: Tokenizer, seq_len: int, target: Callable[[Row], Any], progress: Progress | None
) -> LabelledRows:
    ids, lengths, labels, truncated = [], [], [], 0
    waiting = iter(rows)
    while batch := list(islice(waiting, _AT_ONCE)):
        stop_if_asked()
        encoded = iter(tokenizer.encode_many([text for row in batch for text in row.texts]))
        for row in batch:
            parts = [next(encoded) for _ in row.texts]
            kept = truncate(parts, seq_len - len(parts))
            truncated += sum(map(len, kept)) < sum(map(len, parts))
            whole = np.concatenate([piece for part in kept for piece in (part, [tokenizer.end_id])])
            ids.append(whole)
            lengths.append(len(whole))
            labels.append(target(row))
        if progress is not None:
            progress("tokenizing rows", len(labels), None)
    numbers = any(isinstance(label, float) for label in labels)
    return LabelledRows(
        np.concatenate(ids).astype(np.int64) if ids else np.empty(0, dtype=np.int64),
        np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        np.array(labels, dtype=np.float32) if numbers else np.array(labels, dtype=np.int64),
        truncated,
        seq_len,
        tokenizer.end_id if tokenizer.pad_id is None else tokenizer.pad_id,
    )


def truncate(parts: Sequence[NDArray[np.int64]], room: int) -> list[NDArray[np.int64]]:
    """One or two arrays of ids, shortened at their ends to ``room`` together: first the longer one."""
    if room < 0:
        raise UserError(
            f"training.seq_len: {room + len(parts)} has no room for the tokens that end each text; raise it"
        )
    if sum(map(len, parts)) <= room:
        return list(parts)
    if len(parts) == 1:
        return [parts[0][:room]]
    first, second = map(len, parts)
    half = room // 2
    if min(first, second) > half:
        first, second = room - half, half
    elif first < second:
        second = room - first
    else:
        first = room - second
    return [parts[0][:first], parts[1][:second]]
