"""Left-to-right generation with a key/value cache.

B sequences, T tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Unpack

import torch
from torch import Tensor

from stackwise.generation.sampling import Draw, UniformStreams, check_draw, next_token, row_seeds
from stackwise.model.architecture import Rack
from stackwise.model.cache import KVCache
from stackwise.model.reading import Reading


def pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths ≥ 1, padded on the left with ``pad_id``: ids (B, T), int64, and boolean mask (B, T)."""
    if not prompts or not all(prompts):
        raise ValueError("there must be at least one prompt, and at least one token in each")
    T = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (T - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, torch.arange(T) >= T - lengths[:, None]


def generate(
    rack: Rack,
    prompt: Tensor,
    n_tokens: int,
    *,
    seed: int | Sequence[int] = 0,
    stop_ids: Set[int] = frozenset(),
    pad_id: int | None = None,
    suppressed_ids: Set[int] = frozenset(),
    attention_mask: Tensor | None = None,
    **draw: Unpack[Draw],
) -> Iterator[Tensor]:
    """Yields the next token of each sequence, (B,), up to ``n_tokens`` times.

    What a sequence gets depends on its prompt and its seed alone, not on its neighbours: batched and alone it reads the
    same values, up to the rounding of sums that are taken in another order.

    Args:
        rack: causal, in evaluation mode.
        prompt: (B, T) ids, T ≥ 1; shorter prompts are padded on the left and masked (``pad_prompts``).
        seed: row r draws from the stream of ``row_seeds(seed, B)[r]``; or one seed for each row.
        stop_ids: a sequence ends with the first of these that it produces; generation ends when all have.
        pad_id: what an ended sequence yields while others go on; default the token that ended it.
        suppressed_ids: never produced.
        attention_mask: boolean (B, T), True where a prompt token is real.
        draw: ``temperature``, ``top_k``, ``top_p``, ``min_p``; see ``Draw``.

    Raises:
        ValueError: at the call, for anything of this that does not fit, and for more tokens than a table of learned
            positions has rows. The last token is not read again and needs no row.

    Rotary positions have no such end: beyond the length that the model was trained on they extrapolate, and quality
    falls.
    """
    B, T = prompt.shape if prompt.dim() == 2 else (0, 0)
    if B < 1 or T < 1:
        raise ValueError(f"prompt must be (sequences, tokens) with at least one token, not {tuple(prompt.shape)}")
    attention_mask = _checked_mask(attention_mask, prompt)
    if n_tokens < 0:
        raise ValueError(f"n_tokens is {n_tokens}; allowed: 0 and above")
    seeds = row_seeds(seed, B) if isinstance(seed, int) else list(seed)
    if len(seeds) != B:
        raise ValueError(f"{len(seeds)} seeds for {B} sequences")
    check_draw(**draw)
    rows = rack.spec.learned_positions
    if rows is not None and n_tokens > 0 and T + n_tokens - 1 > rows:
        room = f"at most {rows - T + 1} fit" if rows >= T else f"a prompt may have {rows} tokens at most"
        raise ValueError(
            f"{n_tokens} tokens after a prompt of {T} are more than the {rows} positions that the model has learned "
            f"(model.learned_positions); {room}"
        )
    if any(block.attention.attention_mode != "causal" for block in rack.blocks()):
        raise ValueError("left-to-right generation needs causal attention in every Block")
    cache = rack.make_cache(T + n_tokens)
    return _steps(
        rack, prompt, n_tokens, UniformStreams(seeds), stop_ids, pad_id, suppressed_ids, attention_mask, cache, draw
    )


def _checked_mask(mask: Tensor | None, prompt: Tensor) -> Tensor | None:
    """``mask``, or ``None`` where it hides nothing. ValueError where it does not fit or hides a last token."""
    if mask is None:
        return None
    if mask.shape != prompt.shape:
        raise ValueError(f"attention_mask is {tuple(mask.shape)}, prompt {tuple(prompt.shape)}")
    if not mask[:, -1].all():
        raise ValueError("attention_mask hides the last token of a prompt; prompts are padded on the left")
    return None if mask.all() else mask


@torch.no_grad()
def _steps(
    rack: Rack,
    tokens: Tensor,
    n_tokens: int,
    streams: UniformStreams,
    stop_ids: Set[int],
    pad_id: int | None,
    suppressed_ids: Set[int],
    mask: Tensor | None,
    cache: KVCache,
    draw: Draw,
) -> Iterator[Tensor]:
    device = tokens.device
    blocked = sorted(suppressed_ids)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    stopped = torch.zeros(len(tokens), dtype=torch.bool, device=device)
    greedy = draw.get("temperature") == 0
    for _ in range(n_tokens):
        logits = rack.logits(rack(Reading(tokens, mask, cache=cache))[:, -1])
        chosen = next_token(logits, None if greedy else streams.next(), blocked, **draw)
        if stop_ids:
            chosen = torch.where(stopped, tokens[:, -1] if pad_id is None else pad_id, chosen)
            stopped |= torch.isin(chosen, stops)
        yield chosen
        if stop_ids and stopped.all():
            return
        tokens, mask = chosen[:, None], None
