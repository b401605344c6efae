"""From logits to the next token: a chain of small functions.

B sequences, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def suppress(logits: Tensor, ids: list[int]) -> Tensor:
    """Logits (B, V) with the tokens ``ids`` at −∞."""
    if not ids:
        return logits
    blocked = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    blocked[ids] = True
    return logits.masked_fill(blocked, float("-inf"))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits with all but the ``k`` largest at −∞ (ties with the k-th stay)."""
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits with all but the smallest set of tokens of probability ≥ ``p`` (one at least) at −∞ (1904.09751 §3.1)."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, (before >= p) & (before > 0))
    return logits.masked_fill(drop, float("-inf"))


def sample(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Token ids (B,): the most likely one at temperature 0, else a draw from softmax(logits / temperature)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probability = (logits.double() / temperature).softmax(dim=-1)
    return torch.multinomial(probability, 1, generator=generator).squeeze(-1)
