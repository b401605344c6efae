"""A Rack as a denoiser: tokens with gaps, and their noise level, to logits.

B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stackwise.generation.diffusion import unmask
from stackwise.model.architecture import Rack
from stackwise.model.cache import KVCache
from stackwise.model.reading import Reading
from stackwise.objectives.diffusion import DiffusionObjective


@torch.no_grad()
def predictions(rack: Rack, tokens: Tensor, rate: Tensor) -> Tensor:
    """The logits (B, T, V) of a Rack that predicts masked tokens whatever their share: a denoiser of mlm."""
    return rack.logits(rack(Reading(tokens)))


class RackDenoiser:
    """The logits (B, T, V) of tokens (B, T) at noise levels (B,), as the objective trained the Rack to give them.

    With depth as time, each row passes the Stacks that denoise its level. In one pass (prefix) Stack k starts from what
    Stack k − 1 made of the tokens it saw last, so that calls come with falling levels, the same for all rows.

    ``block_calls`` counts the Blocks run, times the tokens they ran on: what sampling costs.
    """

    def __init__(self, rack: Rack, objective: DiffusionObjective) -> None:
        self.rack, self.objective = rack, objective.of(rack)
        self.time_free = objective.conditioned is None and objective.variant is None
        self.block_calls = 0
        self._stage = 0
        self._before: Tensor | None = None
        self._last: Tensor | None = None

    @torch.no_grad()
    def __call__(self, tokens: Tensor, rate: Tensor) -> Tensor:
        objective, rack = self.objective, self.rack
        time = self._time(tokens, rate)
        if objective.variant is None:
            self._count(tokens, 0, len(rack.stacks))
            return rack.logits(rack(Reading(tokens, time=time)))
        places = self._places(rate)
        if objective.variant == "prefix":
            return self._next_stage(tokens, places, time)
        logits = None
        for place in sorted(set(places)):
            rows = torch.tensor([i for i, p in enumerate(places) if p == place], device=tokens.device)
            interval = objective.noise[place]
            self._count(tokens[rows], interval.start, interval.stop)
            reading = Reading(tokens, time=time).rows(rows)
            some = rack.logits(rack(replace(reading, start=interval.start, stop=interval.stop)))
            if logits is None:
                logits = some.new_empty(len(tokens), *some.shape[1:])
            logits[rows] = some
        assert logits is not None
        return logits

    def _places(self, rate: Tensor) -> list[int]:
        """Which interval each row's level lies in: (low, high]."""
        noise = self.objective.noise
        return [max(k for k, interval in enumerate(noise) if r <= interval.high) for r in rate.tolist()]

    def _time(self, tokens: Tensor, rate: Tensor) -> Tensor | None:
        match self.objective.conditioned:
            case "rate":
                return rate.float().to(tokens.device)
            case "masked":
                return self.objective.masked_share(tokens)
        return None

    def _next_stage(self, tokens: Tensor, places: list[int], time: Tensor | None) -> Tensor:
        (place,) = set(places)
        while self._stage < place:  # a Stack whose levels are left: it has run on the tokens it saw last
            if self._last is None:
                raise ValueError(f"the level of Stack {place} came before that of Stack {self._stage}")
            self._before, self._last, self._stage = self._last, None, self._stage + 1
        if place < self._stage:
            raise ValueError(f"levels must fall; that of Stack {place} came after that of Stack {self._stage}")
        self._count(tokens, place, place + 1)
        reading = Reading(tokens, boundary=self._before, start=place, stop=place + 1, time=time, finished=False)
        self._last = self.rack(reading)
        return self.rack.logits(self.rack(Reading(boundary=self._last, start=place + 1, stop=place + 1)))

    def _count(self, tokens: Tensor, start: int, stop: int) -> None:
        self.block_calls += tokens.numel() * sum(len(stack.blocks) for stack in list(self.rack.stacks)[start:stop])


def generate_blocks(
    rack: Rack,
    tokens: Tensor,
    block_length: int,
    *,
    mask_id: int,
    cached: bool = True,
    seed: int = 0,
    **options: Any,
) -> Iterator[Tensor]:
    """Fills the gaps of ``tokens`` block by block, left to right, each as ``unmask`` does given those before it.

    Yields (B, T) after every step. Finished blocks are kept as keys and values, which is exact: their tokens see their
    own and earlier blocks alone.

    Args:
        tokens: (B, T), ``mask_id`` at the gaps; the last block may be shorter.
        cached: ``False`` reads everything again in every step, for comparison.
        seed: block b draws from ``seed + b``.
        options: of ``unmask``.
    """
    if block_length < 1:
        raise ValueError(f"block_length is {block_length}; allowed: 1 and above")
    tokens = tokens.clone()
    T = tokens.shape[1]
    cache = rack.make_cache(T) if cached else None
    for number, start in enumerate(range(0, T, block_length)):
        block = tokens[:, start : start + block_length]
        if (block == mask_id).any():
            denoise = partial(_block_logits, rack, tokens[:, :start], block_length, cache)
            steps = unmask(denoise, block, mask_id=mask_id, time_free=True, seed=seed + number, **options)
            for block in steps:
                tokens = torch.cat((tokens[:, :start], block, tokens[:, start + block_length :]), dim=1)
                yield tokens
        if cache is not None and start + block_length < T:
            with torch.no_grad():
                rack(Reading(block, cache=cache))


@torch.no_grad()
def _block_logits(
    rack: Rack, before: Tensor, block_length: int, cache: KVCache | None, block: Tensor, level: Tensor
) -> Tensor:
    """The logits of a block after the finished ones, which ``cache`` holds if there is one."""
    start = before.shape[1]
    if cache is not None:
        logits = rack.logits(rack(Reading(block, cache=cache)))
        cache.rewind(start)
        return logits
    hidden = rack(Reading(torch.cat((before, block), dim=1), block_length=block_length))
    return rack.logits(hidden[:, start:])
