"""Tokenizers in the files that ``AutoTokenizer`` reads."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from stackwise.data.tokenizers import (
    BUILT_IN_SPECIALS,
    ByteTokenizer,
    CharacterTokenizer,
    LibraryTokenizer,
    Tokenizer,
)


def special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """``bos_token_id`` and so on, as transformers calls them; bos, eos and pad are always there.

    bos and eos, or cls and sep where a pretrained tokenizer puts both around a text. Where it begins texts with no
    token, documents begin after the end token, which is then bos as well.
    """
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    first, last = tokenizer.end_id, None
    if isinstance(tokenizer, LibraryTokenizer):
        around = tokenizer.library().encode("").ids  # what is added to a text without tokens
        first = around[0] if around and around[0] in tokenizer.special_ids else first
        last = around[-1] if len(around) > 1 and around[-1] in tokenizer.special_ids else None
    ids = {"bos_token_id": first, "eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_id}
    if tokenizer.mask_id is not None:
        ids["mask_token_id"] = tokenizer.mask_id
    return ids | ({} if last is None else {"cls_token_id": first, "sep_token_id": last})


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_tokens: int) -> None:
    """Writes ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``, which give the same ids."""
    library = _as_library(tokenizer)
    (folder / "tokenizer.json").write_text(library.to_str(pretty=True), encoding="utf-8", newline="")
    ids = special_ids(tokenizer)
    specials = {role.removesuffix("_id"): library.id_to_token(i) for role, i in ids.items() if i is not None}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        **specials,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=1) + "\n", encoding="utf-8")


def _as_library(tokenizer: Tokenizer) -> Library:
    """The tokenizer as one of the ``tokenizers`` library."""
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.library()
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
    return library


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies: itself where printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]
