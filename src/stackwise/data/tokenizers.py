"""Tokenizers: bytes and characters (built in), byte-level BPE learnt from a corpus, and ``tokenizer.json`` files.

Text is always plain text: a corpus that contains the letters ``<|endoftext|>`` gets the tokens of those letters, never
the special token.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from stackwise.config.data import DataConfig
from stackwise.errors import RunError, UserError
from stackwise.files import publish, reason, scratch_folder
from stackwise.reading import JSONError, from_home, parse_json, read_object

BUILT_IN_SPECIALS = ("<|endoftext|>", "<|pad|>", "<|mask|>")
"""The special tokens of every kind but pretrained; they have the ids 0, 1 and 2."""

_END_ID, _PAD_ID, _MASK_ID = range(3)
_FORMAT = 1
_DESCRIPTION = "stackwise_tokenizer.json"
_LIBRARY_FILE = "tokenizer.json"

# Where a pretrained tokenizer does not say which tokens these are, the first of these names that it has.
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
_PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>")
_MASK_NAMES = ("<|mask|>", "<mask>", "[MASK]")


class Tokenizer(ABC):
    """Text to ids and back.

    ``kind``: bytes, characters, bpe or pretrained. ``vocab_size``: ids are below it. ``end_id``: the token between
    documents. ``pad_id``, ``mask_id``: ``None`` where a pretrained tokenizer has none. ``special_ids``: ids that stand
    for no text. ``fingerprint``: SHA-256 (hex) over what determines the encoding.
    """

    kind: Literal["bytes", "characters", "bpe", "pretrained"]
    vocab_size: int
    end_id: int = _END_ID
    pad_id: int | None = _PAD_ID
    mask_id: int | None = _MASK_ID
    special_ids: frozenset[int] = frozenset(range(len(BUILT_IN_SPECIALS)))
    fingerprint: str

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of plain text: int64 (tokens,), no special among them, nothing added."""

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` of each text, on several cores where the library can."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of ids. Specials give nothing; bytes that are no UTF-8 give U+FFFD."""

    def word_starts(self) -> np.ndarray:
        """(V,) boolean: whether a token begins a word. A word is what white space and punctuation end or stand for.

        A token begins one if its text begins with white space or punctuation, or if it is a special token: the space
        before a word so belongs to it, and a letter after a full stop goes with the stop. Bytes that are no character
        by themselves begin none.
        """
        texts = [self._piece(i) for i in range(self.vocab_size)]
        return np.array([not text or not (text[0].isalnum() or text[0] == "\ufffd") for text in texts])

    def _piece(self, token: int) -> str:
        """The text of one token as it stands in the middle of a text; empty for specials."""
        return self.decode([token])

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer; a new ``folder`` appears whole or not at all, in an existing one files are replaced.

        Raises:
            RunError: the disk is full or the place cannot be written to.
        """
        folder = Path(folder)
        description = {"format": _FORMAT, "kind": self.kind, "fingerprint": self.fingerprint}
        try:
            with scratch_folder(folder.parent, folder.name) as scratch:
                text = json.dumps(description | self._save(scratch), indent=1)
                (scratch / _DESCRIPTION).write_text(text + "\n", encoding="utf-8")
                if folder.is_dir() or not publish(scratch, folder):
                    for path in scratch.iterdir():
                        os.replace(path, folder / path.name)
        except OSError as error:
            raise RunError(f"{folder}: the tokenizer cannot be written: {reason(error)}") from error

    @abstractmethod
    def _save(self, folder: Path) -> dict[str, Any]:
        """Writes what the description cannot hold, and returns what it can."""


def _fingerprint(*parts: object) -> str:
    text = json.dumps([_FORMAT, *parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


class ByteTokenizer(Tokenizer):
    """One token for each byte of UTF-8: byte b has the id b + 3."""

    kind: Literal["bytes"] = "bytes"

    def __init__(self) -> None:
        self.vocab_size = len(BUILT_IN_SPECIALS) + 256
        self.fingerprint = _fingerprint(self.kind, BUILT_IN_SPECIALS)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64) + len(BUILT_IN_SPECIALS)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        array = _ids(ids) - len(BUILT_IN_SPECIALS)
        return array[(array >= 0) & (array < 256)].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def _save(self, folder: Path) -> dict[str, Any]:
        return {}


class CharacterTokenizer(Tokenizer):
    """One token for each distinct character, in the order of their code points.

    Args:
        characters: those that have a token; repeats do not count.
    """

    kind: Literal["characters"] = "characters"

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(sorted(set(characters)))
        points = np.array([ord(c) for c in self.characters], dtype=np.int64)
        n = len(BUILT_IN_SPECIALS)
        self.vocab_size = n + len(points)
        self.fingerprint = _fingerprint(self.kind, BUILT_IN_SPECIALS, self.characters)
        self._id_of = np.full((int(points.max()) if len(points) else 0) + 2, -1, dtype=np.int32)
        self._id_of[points] = np.arange(n, n + len(points))

    def encode(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
        ids = self._id_of[np.minimum(points, len(self._id_of) - 1)]  # the last entry has no character
        unknown = np.flatnonzero(ids < 0)
        if unknown.size:
            character = text[unknown[0]]
            raise UserError(
                f"the character {character!r} (U+{ord(character):04X}) is not among the {len(self.characters)} that "
                "this tokenizer knows; leave it out, or train with data.tokenizer.kind: bytes or bpe"
            )
        return ids.astype(np.int64)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        index = _ids(ids) - len(BUILT_IN_SPECIALS)
        return "".join(self.characters[i] for i in index.tolist() if 0 <= i < len(self.characters))

    def _save(self, folder: Path) -> dict[str, Any]:
        return {"characters": self.characters}


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` library.

    Args:
        library: taken over: truncation and padding are switched off, and the text of special tokens is plain text.
        kind: bpe or pretrained.
        end, pad, mask: the tokens for these uses; ``pad`` and ``mask`` may be ``None``.
    """

    def __init__(
        self, library: Library, kind: Literal["bpe", "pretrained"], *, end: str, pad: str | None, mask: str | None
    ) -> None:
        self.kind: Literal["bpe", "pretrained"] = kind
        library.no_truncation()
        library.no_padding()
        roles = [token for token in (end, pad, mask) if token is not None]
        library.add_special_tokens([token for token in roles if token not in _specials(library)])
        library.encode_special_tokens = True
        self._library = library
        self._kept: set[str] = set()
        ids = [None if token is None else library.token_to_id(token) for token in (end, pad, mask)]
        assert ids[0] is not None
        self.end_id, self.pad_id, self.mask_id = ids[0], ids[1], ids[2]
        self._role_ids = np.array([i for i in ids if i is not None])
        self.special_ids = frozenset(_specials(library).values())
        self.vocab_size = max(library.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = _fingerprint(kind, json.loads(library.to_str()), ids)
        self._roles = {"end": end, "pad": pad, "mask": mask}

    def encode(self, text: str) -> np.ndarray:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:
            if type(error) is not Exception:  # what the library raises for a text that it has no tokens for, only
                raise
            raise UserError(
                f"data.tokenizer: the tokenizer cannot encode the text ({error}); use one that can, such as kind: bytes"
            ) from None
        if self.kind == "pretrained":
            self._refuse_dropped("".join(texts))
        arrays = [np.array(e.ids, dtype=np.int64) for e in encoded]
        for array in arrays:
            special = np.isin(array, self._role_ids)
            if special.any():
                token = self._library.id_to_token(int(array[special][0]))
                raise UserError(
                    f"the text contains {token!r}, which this tokenizer cannot tell from its special token; "
                    "remove it from the text"
                )
        return arrays

    def _refuse_dropped(self, text: str) -> None:
        """UserError where a character that the normalizer keeps becomes no token: such text would count for nothing."""
        for character in sorted(set(text) - self._kept):
            normal = self._library.normalizer.normalize_str(character) if self._library.normalizer else character
            if not normal.isspace() and normal and not self._library.encode(character, add_special_tokens=False).ids:
                raise UserError(
                    f"data.tokenizer: the tokenizer has no token for {character!r} (U+{ord(character):04X}) and "
                    "would drop it from the text; use one that has it, such as kind: bytes"
                )
            self._kept.add(character)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        return self._library.decode(_ids(ids).tolist(), skip_special_tokens=True)

    def _piece(self, token: int) -> str:
        raw = self._library.id_to_token(token) or ""
        if token in self.special_ids or not raw:
            return ""
        if raw.startswith("##"):  # WordPiece: the middle of a word
            return raw[2:]
        if raw.startswith("\u2581") or isinstance(self._library.model, models.WordPiece):
            return " " + raw.lstrip("\u2581")
        return self.decode([token])

    def with_mask(self) -> LibraryTokenizer:
        """The same tokenizer with a mask token, whose id follows those that there are; itself where it has one."""
        if self.mask_id is not None:
            return self
        library = self.library()
        name = next(name for name in _MASK_NAMES if library.token_to_id(name) is None)
        library.add_special_tokens([AddedToken(name, special=True)])
        end = self._roles["end"]
        assert end is not None
        return LibraryTokenizer(library, self.kind, end=end, pad=self._roles["pad"], mask=name)

    def library(self) -> Library:
        """A copy of the library's tokenizer."""
        return Library.from_str(self._library.to_str())

    def _save(self, folder: Path) -> dict[str, Any]:
        (folder / _LIBRARY_FILE).write_text(self._library.to_str(pretty=True), encoding="utf-8", newline="")
        return self._roles


def _ids(ids: Iterable[int] | np.ndarray) -> np.ndarray:
    return np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)


def _specials(library: Library) -> dict[str, int]:
    return {token.content: i for i, token in library.get_added_tokens_decoder().items() if token.special}


def train_bpe(texts: Iterator[str], vocab_size: int) -> LibraryTokenizer:
    """Learns a lossless byte-level BPE (Radford et al. 2019) of at most ``vocab_size`` tokens, specials included.

    The same texts give the same tokenizer. Memory grows with the number of distinct words, not with the texts.
    """
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(BUILT_IN_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator((part for text in texts for part in _in_words(text)), trainer)
    end, pad, mask = BUILT_IN_SPECIALS
    return LibraryTokenizer(library, "bpe", end=end, pad=pad, mask=mask)


_LONGEST_WORD = 1000
"""Characters of a word that a vocabulary is learned from; the trainer's time grows faster than a word's length."""


def _in_words(text: str) -> Iterator[str]:
    """``text``, cut only inside what has no white space for longer than any word."""
    start = 0
    for long in re.finditer(rf"\S{{{_LONGEST_WORD + 1},}}", text):
        for cut in range(long.start() + _LONGEST_WORD, long.end(), _LONGEST_WORD):
            yield text[start:cut]
            start = cut
    yield text[start:]


def open_pretrained(path: str | Path) -> Tokenizer:
    """The tokenizer in a ``tokenizer.json`` file, in a Hugging Face folder that holds one, or in that of a run.

    The end, pad and mask tokens are those that ``tokenizer_config.json`` or ``special_tokens_map.json`` beside it name
    (where there is no end token, the separator), else tokens of the usual names.

    Raises:
        UserError: there is no such file, it cannot be read, or no end token is found.
    """
    path = from_home(path, "data.tokenizer.path")
    key = f"data.tokenizer.path: {str(path)!r}"
    if (path / _DESCRIPTION).is_file():
        return load_tokenizer(path)
    file = path / _LIBRARY_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{key}: no {_LIBRARY_FILE} in this folder" if path.is_dir() else f"{key}: no such file or folder"
        )
    library = _read_library(file, key)
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = _read_object(file.parent / name, key)
        for role in ("eos_token", "sep_token", "pad_token", "mask_token"):
            token = settings.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and library.token_to_id(token) is not None:
                named[role] = token
    vocabulary = library.get_vocab(with_added_tokens=True)

    def first(names: Sequence[str]) -> str | None:
        return next((name for name in names if name in vocabulary), None)

    end = named.get("eos_token") or named.get("sep_token") or first(_END_NAMES)
    if end is None:
        raise UserError(
            f"{key}: it has no end-of-document token; name one as eos_token in a tokenizer_config.json beside the file"
        )
    pad = named.get("pad_token") or first(_PAD_NAMES)
    return LibraryTokenizer(library, "pretrained", end=end, pad=pad, mask=named.get("mask_token") or first(_MASK_NAMES))


def ready_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer of ``data.tokenizer``, where it does not depend on the corpus."""
    match config.tokenizer.kind:
        case "bytes":
            return ByteTokenizer()
        case "pretrained":
            assert config.tokenizer.path is not None
            return open_pretrained(config.tokenizer.path)
        case _:
            return None


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that ``save`` wrote.

    Raises:
        UserError: there is none. RunError: its files are damaged.
    """
    folder = Path(folder)
    file = folder / _DESCRIPTION
    if not file.is_file():
        raise UserError(f"{folder}: it holds no tokenizer ({_DESCRIPTION})")
    tokenizer: Tokenizer
    try:
        description = read_object(file)
        match description["kind"]:
            case "bytes":
                tokenizer = ByteTokenizer()
            case "characters":
                tokenizer = CharacterTokenizer(description["characters"])
            case "bpe" | "pretrained" as kind:
                library = _read_library(folder / _LIBRARY_FILE, str(folder))
                roles = {role: description[role] for role in ("end", "pad", "mask")}
                tokenizer = LibraryTokenizer(library, kind, **roles)
            case kind:
                raise RunError(f"{file}: {kind!r} is a kind of tokenizer that this version does not know")
        intact = tokenizer.fingerprint == description["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder}: the tokenizer in it cannot be read ({error})") from None
    if not intact:
        raise RunError(
            f"{folder}: the tokenizer in it is damaged: its fingerprint differs from the one it was saved with"
        )
    return tokenizer


_MAX_VOCAB = 1 << 24
"""Of a tokenizer: as many as ``model.vocab_size`` may have."""


def _check_ids(text: str, key: str) -> None:
    """UserError for an id that no vocabulary has: the library makes a table up to the largest one, and aborts."""
    try:
        description = parse_json(text, foreign_fields=True)
    except JSONError as error:
        raise UserError(f"{key}: not a tokenizer.json ({error})") from None
    model, added = (
        description.get(name) if isinstance(description, dict) else None for name in ("model", "added_tokens")
    )
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    largest = max((number for number in ids if isinstance(number, int)), default=0)
    if largest >= _MAX_VOCAB:
        raise UserError(f"{key}: not a tokenizer.json (a token has the id {largest}; ids go up to {_MAX_VOCAB - 1})")


def _read_library(file: Path, key: str) -> Library:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{key}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{key}: not a tokenizer.json: it is not UTF-8 text") from None
    _check_ids(text, key)
    try:
        return Library.from_str(text)
    except Exception as error:
        if type(error) is not Exception:  # what the library raises for a bad file, and nothing else
            raise
        raise UserError(f"{key}: not a tokenizer.json ({error})") from error


def _read_object(file: Path, key: str) -> dict[str, Any]:
    """The JSON object in ``file``; empty where there is no such file."""
    try:
        return read_object(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {file.name} beside it cannot be read ({error})") from None
