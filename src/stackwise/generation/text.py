"""Text in, text out."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from stackwise.config.base import StackWiseConfig
from stackwise.data.tokenizers import Tokenizer
from stackwise.errors import UserError
from stackwise.generation.autoregressive import generate
from stackwise.model.architecture import Rack


def stream_text(
    rack: Rack,
    tokenizer: Tokenizer,
    config: StackWiseConfig,
    prompt: str,
    n_tokens: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[str]:
    """Yields what follows ``prompt`` piece by piece, until ``n_tokens`` or the end of the document.

    An empty prompt starts a document. Pieces hold whole characters. Raises ``UserError``, before the first piece, for a
    masked model and for a prompt that the tokenizer cannot write.
    """
    if config.training.objective != "clm":
        raise UserError(
            f"this run was trained with {config.training.objective}, which fills gaps and does not go on from a prompt"
            "; generate needs clm"
        )
    start = [tokenizer.end_id, *tokenizer.encode(prompt).tolist()]
    return _pieces(rack, tokenizer, start, n_tokens, seed, temperature, top_k, top_p)


def _pieces(
    rack: Rack,
    tokenizer: Tokenizer,
    start: list[int],
    n_tokens: int,
    seed: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Iterator[str]:
    never = frozenset(tokenizer.special_ids) - {tokenizer.end_id}
    never |= frozenset(range(tokenizer.vocab_size, rack.vocab_size))  # rows of the head that no token has
    ids = torch.tensor([start], device=rack.embedding.weight.device)
    produced: list[int] = []
    shown = ""
    for chosen in generate(
        rack, ids, n_tokens, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p,
        stop_ids=frozenset({tokenizer.end_id}), suppressed_ids=never,
    ):  # fmt: skip
        token = int(chosen)
        if token == tokenizer.end_id:
            break
        produced.append(token)
        text = tokenizer.decode(produced)
        if text.endswith("\ufffd"):  # the bytes of a character are not all there yet
            continue
        yield text[len(shown) :]
        shown = text
        if len(produced) > 64 and text:  # what is shown need not be decoded again
            produced, shown = [], ""
    if produced:
        rest = tokenizer.decode(produced)[len(shown) :]
        if rest:
            yield rest
