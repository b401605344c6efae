"""Left-to-right generation with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stackwise.generation.sampling import keep_top_k, keep_top_p, sample, suppress
from stackwise.model.architecture import Rack


@torch.no_grad()
def generate(
    rack: Rack,
    prompt: Tensor,
    n_tokens: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: frozenset[int] = frozenset(),
    suppressed_ids: frozenset[int] = frozenset(),
    attention_mask: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of each sequence, (B,), up to ``n_tokens`` times.

    Args:
        rack: causal, in evaluation mode.
        prompt: (B, T) ids, T ≥ 1; shorter prompts are padded on the left and masked.
        temperature: 0 takes the most likely token.
        top_k, top_p: restrict the draw; default the whole vocabulary.
        stop_ids: generation ends when every sequence has produced one of these.
        suppressed_ids: never produced.
        attention_mask: boolean (B, T), True where a prompt token is real.

    The model was trained on windows of a certain length; beyond it rotary positions extrapolate, and quality falls.
    """
    if prompt.dim() != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt must be (sequences, tokens) with at least one token, not {tuple(prompt.shape)}")
    generator = torch.Generator(prompt.device).manual_seed(seed)
    blocked = sorted(suppressed_ids)
    cache = rack.make_cache(prompt.shape[1] + n_tokens)
    tokens, mask = prompt, attention_mask
    stopped = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    stops = torch.tensor(sorted(stop_ids), device=prompt.device)
    for _ in range(n_tokens):
        logits = rack.logits(rack.hidden(tokens, mask, cache)[:, -1]).float()
        logits = suppress(logits, blocked)
        if temperature > 0:  # before the cuts, as elsewhere: top_p is of the probabilities that are drawn from
            logits = logits / temperature
        if top_k is not None:
            logits = keep_top_k(logits, top_k)
        if top_p is not None:
            logits = keep_top_p(logits, top_p)
        chosen = sample(logits, 1.0 if temperature > 0 else 0.0, generator)
        yield chosen
        stopped |= torch.isin(chosen, stops)
        if stopped.all():
            return
        tokens, mask = chosen[:, None], None
