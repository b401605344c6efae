"""Noise levels: the rates of masking between which Stacks, or the steps of a sampler, share the way from 1 to 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

Levels = Literal["linear", "cosine", "exponential", "equal_difficulty", "list"]
RATIO = 0.5
"""exponential: each level is so much of the one before; the last is 0."""


def thresholds(
    kind: Levels,
    k: int,
    *,
    levels: Sequence[float] | None = None,
    difficulty: Sequence[tuple[float, float]] | None = None,
) -> tuple[float, ...]:
    """``k`` + 1 levels, 1 = r_0 > r_1 > … > r_k = 0.

    linear: r_i = 1 − i/k, intervals of equal probability. cosine: r_i = cos(π i / 2k) (MaskGIT, 2202.04200 §3.2).
    exponential: r_i = 2^−i, and r_k = 0. equal_difficulty: intervals of equal area under ``difficulty``, pairs (rate,
    cross-entropy there) joined by straight lines and level beyond the first and the last. list: ``levels`` itself.

    Raises:
        ValueError: a list that does not fall from 1 to 0 in k steps (where it stops above 0, the sum over its intervals
            bounds no likelihood), or a difficulty that is no curve.
    """
    if k < 1:
        raise ValueError(f"{k} intervals; allowed: 1 and above")
    match kind:
        case "linear":
            return (*(1.0 - i / k for i in range(k)), 0.0)
        case "cosine":
            return (*(math.cos(math.pi * i / (2 * k)) for i in range(k)), 0.0)
        case "exponential":
            return (*(RATIO**i for i in range(k)), 0.0)
        case "equal_difficulty":
            return _equal_areas(k, difficulty or ())
        case "list":
            return check_levels(levels or (), k)
    raise ValueError(f"levels are {kind!r}; allowed: linear, cosine, exponential, equal_difficulty, list")


def divided(levels: Sequence[float], steps: int) -> tuple[float, ...]:
    """``levels`` with every interval cut into ``steps`` equal ones."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; allowed: 1 and above")
    inner = (high + (low - high) * i / steps for high, low in pairwise(levels) for i in range(steps))
    return (*inner, levels[-1])


def check_levels(levels: Sequence[float], k: int | None = None) -> tuple[float, ...]:
    """``levels``, which must fall from 1 to 0 (in ``k`` steps). ValueError."""
    shown = ", ".join(f"{level:g}" for level in levels)
    if k is not None and len(levels) != k + 1:
        raise ValueError(f"levels are {shown or 'none'}; {k} intervals need {k + 1}")
    if len(levels) < 2 or levels[0] != 1.0 or levels[-1] < 0.0 or any(not a > b for a, b in pairwise(levels)):
        raise ValueError(f"levels are {shown or 'none'}; they must fall, from 1 on, and end at 0")
    if levels[-1] != 0.0:
        raise ValueError(f"levels are {shown}; they stop above 0, and their sum would bound no likelihood")
    return tuple(levels)


def _equal_areas(k: int, difficulty: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    points = sorted((float(rate), float(c)) for rate, c in difficulty)
    rates = [rate for rate, _ in points]
    if not points or any(a == b for a, b in pairwise(rates)) or not all(0 <= rate <= 1 for rate in rates):
        raise ValueError("difficulty needs pairs (rate, cross-entropy) of different rates between 0 and 1")
    if not all(0 < c < math.inf for _, c in points):
        raise ValueError("difficulty needs finite cross-entropies above 0")
    curve = [(0.0, points[0][1])] * (rates[0] > 0) + points + [(1.0, points[-1][1])] * (rates[-1] < 1)
    areas = [0.0]
    for (low, a), (high, b) in pairwise(curve):
        areas.append(areas[-1] + (high - low) * (a + b) / 2)
    found = [1.0]
    for i in range(1, k):
        wanted = areas[-1] * (1 - i / k)
        j = max(n for n, area in enumerate(areas[:-1]) if area <= wanted)
        (low, a), (high, b) = curve[j], curve[j + 1]
        # area from low to low + x: a x + s x²/2, s the slope; the root that is stable for a slope near 0. What is under
        # it is at least min(a, b)², and rounding takes it below 0 where b is nearly 0
        s, rest = (b - a) / (high - low), wanted - areas[j]
        found.append(low + 2 * rest / (a + math.sqrt(max(0.0, a * a + 2 * s * rest))))
    return (*found, 0.0)
