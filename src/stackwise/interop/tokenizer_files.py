"""Tokenizers in the files that ``AutoTokenizer`` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from stackwise.data.tokenizers import (
    BUILT_IN_SPECIALS,
    ByteTokenizer,
    CharacterTokenizer,
    LibraryTokenizer,
    Tokenizer,
)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_tokens: int) -> None:
    """Writes ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``, which give the same ids."""
    library, end, pad, mask = _as_library(tokenizer)
    (folder / "tokenizer.json").write_text(library.to_str(pretty=True), encoding="utf-8", newline="")
    specials: dict[str, Any] = {"eos_token": end, "pad_token": pad, "mask_token": mask}
    specials = {role: token for role, token in specials.items() if token is not None}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        **specials,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=1) + "\n", encoding="utf-8")


def _as_library(tokenizer: Tokenizer) -> tuple[Library, str, str | None, str | None]:
    """The tokenizer as one of the ``tokenizers`` library, and its end, pad and mask tokens."""
    if isinstance(tokenizer, LibraryTokenizer):
        library = tokenizer.library()
        roles = (tokenizer.end_id, tokenizer.pad_id, tokenizer.mask_id)
        end, pad, mask = (None if i is None else library.id_to_token(i) for i in roles)
        assert end is not None
        return library, end, pad, mask
    first = len(BUILT_IN_SPECIALS)
    vocabulary = {token: i for i, token in enumerate(BUILT_IN_SPECIALS)}
    if isinstance(tokenizer, ByteTokenizer):
        vocabulary |= {letter: first + byte for byte, letter in enumerate(_byte_letters())}
        library = Library(models.BPE(vocab=vocabulary, merges=[]))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
    elif isinstance(tokenizer, CharacterTokenizer):
        vocabulary |= {letter: first + i for i, letter in enumerate(tokenizer.characters)}
        library = Library(models.BPE(vocab=vocabulary, merges=[]))
        library.decoder = decoders.Fuse()
    else:
        raise TypeError(f"no tokenizer file is defined for a {type(tokenizer).__name__}")
    library.add_special_tokens(list(BUILT_IN_SPECIALS))
    end, pad, mask = BUILT_IN_SPECIALS
    return library, end, pad, mask


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies: itself where printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]
