"""The examples of a phase: the batches it names, and where the hidden state enters, that state beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol, Self

import torch
from torch import Tensor

from stackwise.config.base import StackWiseConfig
from stackwise.growth.phases import Phase
from stackwise.model.rack import Rack
from stackwise.model.reading import Reading
from stackwise.model.stack import Stack
from stackwise.objectives.base import Example, Objective
from stackwise.ops.boundary import round_boundary
from stackwise.ops.precision import autocast
from stackwise.store.activation_cache import ActivationCache, BoundaryId, BoundaryReader, CachedBoundary
from stackwise.training.offload import Offload


class ExampleSource(Protocol):
    """Gives the example of each step."""

    repeatable: bool
    """Whether ``example`` is a pure function of the step: else a run over it cannot be resumed or take a step twice."""

    def during(self, objective: Objective) -> ExampleSource: ...

    def example(self, step: int) -> Example: ...


def batch_numbers(phase: Phase, phase_step: int, step: int) -> Iterator[int]:
    """The numbers of the batches of a phase from its step ``phase_step`` on, which is step ``step`` of the run."""
    for i in range(phase_step, phase.steps):
        if phase.examples is None:
            yield step + i - phase_step
        else:
            first, count = phase.examples
            yield first + i % count


class PhaseExamples:
    """Gives the examples of a phase one after another, from step ``phase_step`` of it on.

    Where ``phase.enters`` is a boundary, each comes with the hidden state there: read from ``cached``, with the next
    ones read ahead, or, without a cache, computed from the tokens and rounded as the cache would round it.
    """

    def __init__(
        self,
        source: ExampleSource,
        phase: Phase,
        phase_step: int,
        step: int,
        compute: Boundaries | None = None,
        cached: CachedBoundary | None = None,
    ) -> None:
        self._source, self._enters, self._compute = source, phase.enters, compute
        self._numbers = batch_numbers(phase, phase_step, step)
        self._reader: BoundaryReader | None = None
        if cached is not None:
            assert compute is not None
            self._reader = cached.reader(batch_numbers(phase, phase_step, step), compute.device)

    def next(self) -> Example:
        number = next(self._numbers)
        example = self._source.example(number)
        if not self._enters:
            return example
        assert self._compute is not None
        boundary = next(self._reader) if self._reader is not None else self._compute.recomputed(number, self._enters)
        reading = replace(example.reading, ids=None, boundary=boundary, start=self._enters)
        return replace(example, reading=reading)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._reader is not None:
            self._reader.close()


class Boundaries:
    """Computes hidden states at the boundaries of a Rack, without gradients, a Stack at a time.

    Args:
        rack: its Stacks before the boundary are in evaluation mode.
        source: of the tokens.
        config: micro-batches and ``training.cache``.
        device, compute_dtype: where, and in what products run.
        offload: reads the offloaded Stacks; one is held while it runs over all batches.
    """

    def __init__(
        self,
        rack: Rack,
        source: ExampleSource,
        config: StackWiseConfig,
        device: torch.device,
        compute_dtype: torch.dtype | None,
        offload: Offload,
    ) -> None:
        self.rack, self.source, self.device, self.compute_dtype = rack, source, device, compute_dtype
        self.offload = offload
        self._format = config.training.cache.dtype
        self._micro = config.training.micro_batch_size or config.training.batch_size

    def recomputed(self, number: int, enters: int) -> Tensor:
        """The hidden state (B, T, C) of a batch after ``enters`` Stacks, rounded at every boundary as a cache does."""
        x = self._embedded(number)
        for k in range(enters):
            x = round_boundary(self._advanced(k, x), self._format)
        return x

    def prepared(
        self, cache: ActivationCache, ids: list[BoundaryId], progress: Callable[[int, int], None]
    ) -> CachedBoundary:
        """The last of ``ids`` (boundaries 1, 2, …), complete: found, or rolled on from the nearest that is there.

        ``progress(boundary, batch)`` is called before each batch that is computed.
        """
        wanted = len(ids)
        found = cache.open(ids[-1])
        at = wanted
        while found is None and at > 1:  # from boundary at − 1, which may have been rolled in part before a kill
            at -= 1
            found = self._rolled(cache, ids[at - 1], ids[at], progress)
            if found is not None:
                at += 1
        if found is None:
            at = 1

            def compute(number: int) -> Tensor:
                progress(1, number)
                return self._advanced(0, self._embedded(number))

            with self.offload.holding(self._stack(0)):
                found = cache.fill(ids[0], compute)
        while at < wanted:
            found = self._rolled(cache, ids[at - 1], ids[at], progress)
            assert found is not None
            at += 1
        return found

    def _rolled(
        self, cache: ActivationCache, source: BoundaryId, target: BoundaryId, progress: Callable[[int, int], None]
    ) -> CachedBoundary | None:
        def advance(number: int, x: Tensor) -> Tensor:
            progress(target.index, number)
            return self._advanced(source.index, x)

        with self.offload.holding(self._stack(source.index)):
            return cache.roll(source, target, advance, self.device)

    def _stack(self, position: int) -> Stack:
        return list(self.rack.stacks)[position]

    @torch.no_grad()
    def _embedded(self, number: int) -> Tensor:
        example = self.source.example(number).to(self.device)
        if example.reading.attention_mask is not None:
            raise ValueError("a boundary holds whole batches; padded ones (with an attention mask) enter as tokens")
        with autocast(self.device, self.compute_dtype):
            parts = [
                self.rack(replace(micro.reading, stop=0, finished=False))
                for micro in example.micro_batches(self._micro)
            ]
        return torch.cat(parts)

    @torch.no_grad()
    def _advanced(self, position: int, x: Tensor) -> Tensor:
        """``x`` (B, T, C) at boundary ``position``, after the Stack there has run; in micro-batches, as in a step."""
        with autocast(self.device, self.compute_dtype):
            parts = [
                self.rack(Reading(boundary=part, start=position, stop=position + 1, finished=False))
                for part in x.split(self._micro)
            ]
        return torch.cat(parts).float()
