"""Depth as time: which Stacks of a Rack denoise which noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from stackwise.config.base import StackWiseConfig
from stackwise.ops.noise import thresholds

Variant = Literal["experts", "suffix", "prefix"]


@dataclass(frozen=True)
class Interval:
    """Noise levels (low, high], denoised by the Stacks at the places ``start`` to ``stop``.

    ``trains``: whether the loss of these levels is taken, or they only lead to the next ones (prefix).
    """

    low: float
    high: float
    start: int
    stop: int
    trains: bool = True

    @property
    def width(self) -> float:
        return self.high - self.low


def levels_of(config: StackWiseConfig) -> tuple[float, ...]:
    """The K + 1 noise levels, from 1 down to 0, between which the Stacks of the whole Rack share the work."""
    diffusion = config.training.diffusion
    if isinstance(diffusion.levels, tuple):
        return thresholds("list", config.target_stacks, levels=diffusion.levels)
    return thresholds(diffusion.levels, config.target_stacks, difficulty=diffusion.difficulty)


def intervals_of(variant: Variant, levels: tuple[float, ...], stacks: Sequence[int]) -> tuple[Interval, ...]:
    """The intervals that the ``stacks`` (their ids, left to right) of a Rack denoise, from the noisiest on.

    experts: the Stack with the id k alone, the k-th; suffix: the k-th Stack to the last, the last one the last
    interval, so that a Rack that grows to the left has the least noisy ones first; prefix: the k-th Stack, after those
    before it.
    """
    found = [(low, high) for high, low in pairwise(levels)]
    n = len(stacks)
    there = {"experts": [found[k] for k in stacks], "suffix": found[len(found) - n :], "prefix": found[:n]}[variant]
    return tuple(Interval(low, high, k, n if variant == "suffix" else k + 1) for k, (low, high) in enumerate(there))
