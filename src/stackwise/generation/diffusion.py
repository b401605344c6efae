"""Samplers of masked diffusion: they fill the gaps of a text, whatever the denoiser is.

B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from stackwise.errors import allowed
from stackwise.generation.sampling import check_draw, keep_top_p, row_seeds, suppress
from stackwise.ops.noise import check_levels, thresholds

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(tokens (B, T) with mask_id at the gaps, noise levels (B,) in (0, 1]) → logits (B, T, V). Levels never rise."""

Order = Literal["ancestral", "first_hitting", "confidence", "margin", "entropy", "threshold"]
ORDERS: tuple[Order, ...] = ("ancestral", "first_hitting", "confidence", "margin", "entropy", "threshold")


def unmask(
    denoise: Denoiser,
    tokens: Tensor,
    *,
    mask_id: int,
    order: Order = "ancestral",
    steps: int | None = None,
    levels: Sequence[float] | None = None,
    threshold: float | None = None,
    temperature: float = 1.0,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    suppressed_ids: Collection[int] = (),
    guidance: tuple[float, Tensor] | None = None,
    time_free: bool = False,
) -> Iterator[Tensor]:
    """Yields the tokens (B, T) after each step; the last have no ``mask_id`` left. What is no gap never changes.

    Args:
        denoise: gives the logits; ``mask_id`` and ``suppressed_ids`` are never drawn, whatever it says.
        tokens: (B, T), ``mask_id`` at the gaps; rows may have different numbers of them.
        order: which gaps are filled in a step.
            ancestral: from level r to s each one with probability (r − s) / r, all in the last step (2406.07524 §3.3).
            first_hitting: one, any with equal probability: the exact sampler of the bound (2409.02908 §4).
            confidence: those whose drawn token is likeliest (2202.04200 §3.2); margin: whose two likeliest tokens
            differ most (2502.06768 §4); entropy: whose distribution is surest.
            threshold: all whose likeliest token has at least the probability ``threshold``, and one at least
            (2505.22618 §3.3).
        steps: ancestral: of equal width; confidence, margin, entropy: that share the gaps evenly. Default one a gap, of
            the row that has most.
        levels: ancestral: from 1 down to 0, in place of steps.
        temperature, top_p: of the draw; 0 takes the likeliest token.
        seed: row r draws from the stream of ``row_seeds(seed, B)[r]``, or one seed for each row: what a row gets
            depends on its tokens and its seed alone.
        guidance: (w, prompt): logits u + (1 + w) (c − u), with u those where the tokens of ``prompt``, boolean (B, T),
            are masked too (classifier-free guidance from the prompt, 2410.18514 §3). 0 takes c.
        time_free: the denoiser does not look at the level: where a step filled nothing it is not asked again.

    Raises:
        ValueError: at the call, for settings that do not fit.
    """
    _check_settings(order, steps, levels, threshold, guidance)
    check_draw(temperature=temperature, top_p=top_p)
    seeds = row_seeds(seed, len(tokens)) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(tokens):
        raise ValueError(f"{len(seeds)} seeds for {len(tokens)} sequences")
    most = int((tokens == mask_id).sum(dim=1).max()) if len(tokens) else 0
    if levels is not None:
        levels = check_levels(levels)
    elif order == "ancestral":
        levels = thresholds("linear", steps or max(1, most))
    draw = _Draw(seeds, temperature, top_p)
    logits_of = _guided(denoise, guidance, mask_id, sorted({mask_id, *suppressed_ids}), tokens.device)
    device, tokens = tokens.device, tokens.cpu()
    if order == "ancestral":
        assert levels is not None
        made = _ancestral(logits_of, tokens, mask_id, levels, draw, time_free)
    else:
        made = _by_order(logits_of, tokens, mask_id, order, steps or max(1, most), threshold, draw)
    return (step.to(device) for step in made)


def _check_settings(
    order: str,
    steps: int | None,
    levels: Sequence[float] | None,
    threshold: float | None,
    guidance: tuple[float, Tensor] | None,
) -> None:
    """ValueError for a setting out of its range, or one that the order does not use."""
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; {allowed(order, ORDERS)}")
    _only(order, ("threshold",), threshold=threshold)
    _only(order, ("ancestral",), levels=levels)
    _only(order, ("ancestral", "confidence", "margin", "entropy"), steps=steps)
    if order == "threshold" and (threshold is None or not 0 < threshold <= 1):
        raise ValueError(f"threshold is {threshold}; allowed: above 0, at most 1")
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}; allowed: 1 and above")
    if steps is not None and levels is not None:
        raise ValueError("levels and steps are both given; leave steps out, because levels set their number")
    if guidance is not None and not 0 <= guidance[0] < math.inf:
        raise ValueError(f"guidance is {guidance[0]}; allowed: 0 and above")


def _only(order: str, readers: tuple[str, ...], **option: object) -> None:
    for name, value in option.items():
        if value is not None and order not in readers:
            raise ValueError(f"{name} is only used with order {', '.join(readers)} (order is {order})")


def _guided(
    denoise: Denoiser, guidance: tuple[float, Tensor] | None, mask_id: int, never: list[int], device: torch.device
) -> Denoiser:
    """Logits of tokens, both on the CPU: not every device has double precision. ``denoise`` works on ``device``."""

    def logits_of(tokens: Tensor, level: Tensor) -> Tensor:
        tokens = tokens.to(device)
        logits = denoise(tokens, level).cpu().double()
        if guidance is not None and guidance[0] > 0:
            scale, prompt = guidance
            blind = denoise(torch.where(prompt, mask_id, tokens), level).cpu().double()
            logits = blind + (1 + scale) * (logits - blind)
        return suppress(logits, never)

    return logits_of


class _Draw:
    """Numbers of one stream a row, made on the CPU in double precision, so that every device draws the same.

    Gumbel noise in fp32 would cut off rare tokens and sample at a lower temperature than asked for (2409.02908 §5).
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float | None) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature, self.top_p = temperature, top_p

    def uniform(self, *shape: int, rows: Tensor) -> Tensor:
        """(B, *shape) in (0, 1); rows that are not ``rows`` (B, boolean) draw nothing, and get 0.5."""
        out = torch.full((len(self._generators), *shape), 0.5, dtype=torch.float64)
        for i in rows.nonzero().flatten().tolist():
            out[i] = torch.rand(shape, dtype=torch.float64, generator=self._generators[i])
        return out.clamp_(min=2.0**-60)

    def tokens(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T) from logits (B, T, V) by the Gumbel-max trick, and the log-probabilities drawn from."""
        if self.temperature > 0:
            logits = logits / self.temperature
            if self.top_p is not None:
                logits = keep_top_p(logits, self.top_p)
            noise = -(-self.uniform(*logits.shape[1:], rows=rows).log()).log()
            chosen = (logits + noise).argmax(dim=-1)
        else:
            chosen = logits.argmax(dim=-1)
        return chosen, logits.log_softmax(dim=-1)


def _ancestral(
    logits_of: Denoiser, tokens: Tensor, mask_id: int, levels: Sequence[float], draw: _Draw, time_free: bool
) -> Iterator[Tensor]:
    logits: Tensor | None = None
    for level, following in pairwise(levels):
        gaps = tokens == mask_id
        rows = gaps.any(dim=1)
        if not rows.any():
            return
        if logits is None or not time_free:
            logits = logits_of(tokens, torch.full((len(tokens),), level, dtype=torch.float64))
        chosen, _ = draw.tokens(logits, rows)
        shown = draw.uniform(tokens.shape[1], rows=rows) < (level - following) / level
        shown = gaps & (shown if following > 0 else True)
        if shown.any():
            tokens, logits = torch.where(shown, chosen, tokens), None
        yield tokens.clone()


def _by_order(
    logits_of: Denoiser,
    tokens: Tensor,
    mask_id: int,
    order: Order,
    steps: int,
    threshold: float | None,
    draw: _Draw,
) -> Iterator[Tensor]:
    """One step after another until no gap is left; which gaps are filled is a matter of scores, the highest first."""
    total = (tokens == mask_id).sum(dim=1)
    step = 0
    while True:
        gaps = tokens == mask_id
        left = gaps.sum(dim=1)
        if not left.any():
            return
        step += 1
        level = (left / tokens.shape[1]).double().clamp(min=1e-9)
        chosen, log_p = draw.tokens(logits_of(tokens, level), left > 0)
        if order == "first_hitting":
            score = draw.uniform(tokens.shape[1], rows=left > 0)
            count = torch.ones_like(left)
        elif order == "threshold":
            score = log_p.amax(dim=-1)
            assert threshold is not None
            count = (gaps & (score >= math.log(threshold))).sum(dim=1).clamp(min=1)
        else:
            score = _scores(order, chosen, log_p)
            # after step s of S, s/S of the gaps are filled
            done = (total * min(step, steps) / steps).ceil().long()
            count = (done - (total - left)).clamp(min=0)
        score = score.masked_fill(~gaps, -math.inf)
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        tokens = torch.where(gaps & (rank < count[:, None]), chosen, tokens)
        yield tokens.clone()


def _scores(order: Order, chosen: Tensor, log_p: Tensor) -> Tensor:
    """(B, T): how sure each position is."""
    if order == "confidence":
        return log_p.gather(-1, chosen[..., None]).squeeze(-1)
    p = log_p.exp()
    if order == "margin":
        two = p.topk(2, dim=-1).values
        return two[..., 0] - two[..., 1]
    return (p * log_p.masked_fill(p == 0, 0.0)).sum(dim=-1)
