"""From logits to the next token: a chain of small functions.

``next_token`` applies them in this order: suppressed tokens, temperature, top-k, top-p, min-p, the draw. Each filter
sees what the one before it left, as probabilities that sum to one again; min-p compares tokens with the likeliest one,
which no filter removes. The temperature comes first, so that top-p and min-p are of the probabilities drawn from.

B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TypedDict

import torch
from torch import Tensor


class Draw(TypedDict, total=False):
    """How a token is drawn.

    ``temperature``: 0 takes the likeliest token; default 1. ``top_k``, ``top_p``, ``min_p``: restrict the draw; default
    the whole vocabulary.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None


def check_draw(
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> None:
    """Raises ``ValueError`` for a setting of ``Draw`` that means nothing."""
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; allowed: 0 (the likeliest token) and finite numbers above")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; allowed: 1 (the likeliest token) and above")
    for name, p in (("top_p", top_p), ("min_p", min_p)):
        if p is not None and not 0 <= p <= 1:
            raise ValueError(f"{name} is {p}; allowed: 0 to 1")


def suppress(logits: Tensor, ids: Collection[int]) -> Tensor:
    """Logits (B, V) with the tokens ``ids`` at −∞."""
    if not ids:
        return logits
    blocked = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    blocked[list(ids)] = True
    return logits.masked_fill(blocked, float("-inf"))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits with all but the ``k`` largest at −∞ (ties with the k-th stay)."""
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits with all but the smallest set of tokens of probability ≥ ``p`` at −∞ (1904.09751 §3.1).

    0 keeps the likeliest token, 1 all. Of equals at the border, those of lower ids stay.
    """
    if p >= 1:  # sums of rounded probabilities reach 1 before the last token
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    drop = before >= p
    drop[..., 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Logits with tokens less likely than ``p`` times the likeliest one at −∞ (2407.01082 §3).

    0 keeps all, 1 the likeliest token and its equals.
    """
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), float("-inf"))


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """Token ids (B,): the draw from softmax(logits) that ``uniform`` (B,), each in [0, 1), stands for.

    It is the first token at which the cumulated probability exceeds the number.
    """
    # in double precision: in fp32 the rounding of cumulated probabilities is as large as what a rare token has
    probability = logits.cpu().double().softmax(dim=-1)  # not every device has double precision
    # sums taken in parallel need not ascend: a token of probability 0 is left out by more than an equal sum
    cumulated = probability.cumsum(dim=-1).masked_fill(probability == 0, 0.0)
    threshold = uniform.to(cumulated)[..., None] * cumulated.amax(dim=-1, keepdim=True)
    return (cumulated > threshold).int().argmax(dim=-1).to(logits.device)


def next_token(
    logits: Tensor,
    uniform: Tensor | None,
    suppressed_ids: Collection[int] = (),
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Token ids (B,) after logits (B, V), drawn as ``Draw`` says; ``uniform`` as for ``sample``, unused when greedy."""
    device, logits = logits.device, suppress(logits, suppressed_ids)
    if temperature == 0:
        return logits.argmax(dim=-1)
    assert uniform is not None
    logits = logits.cpu().double()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: no temperature makes +∞ of it
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    return sample(logits, uniform).to(device)


def row_seeds(seed: int, n: int) -> list[int]:
    """Seeds of the rows 0 … n − 1 of a batch, all different; that of row 0 is ``seed``."""
    # torch reads the lower 32 bits of a seed; an odd step visits all of them before it repeats one
    return [(seed + row * 0x9E3779B1) % 2**63 for row in range(n)]


class UniformStreams:
    """One stream of uniform numbers for each sequence, on the CPU, so that every device draws the same."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def next(self) -> Tensor:
        """(B,) double, in [0, 1): the next number of each stream."""
        return torch.stack([torch.rand((), dtype=torch.float64, generator=g) for g in self._generators])
