"""The activation cache of a run: what each phase reads from it, and when it is deleted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from stackwise.config.base import StackWiseConfig
from stackwise.errors import UserError
from stackwise.growth.phases import Phase
from stackwise.ops.boundary import BoundaryLayout
from stackwise.signals import stop_if_asked
from stackwise.store.activation_cache import ActivationCache, BoundaryId, UpstreamPart, cache_key
from stackwise.store.objects import weights_sha256
from stackwise.training.examples import Boundaries, ExampleSource, PhaseExamples
from stackwise.training.placement import Placement
from stackwise.training.progress import Reporter


class Caching:
    """Gives the examples of a phase, whose hidden states come from the cache where the phase says so.

    Args:
        placement: of the Rack.
        config: batches, seed and ``training.cache``.
        folder: of the cache; ``None``: in memory.
        data_sha256: of what the tokens come from; part of every boundary's key.
        compute_dtype: in what products run.
        reporter: sees how filling goes on.
    """

    def __init__(
        self,
        placement: Placement,
        config: StackWiseConfig,
        folder: Path | None,
        data_sha256: str,
        compute_dtype: torch.dtype | None,
        reporter: Reporter,
    ) -> None:
        self.placement, self.config, self.folder = placement, config, folder
        self.data_sha256, self.compute_dtype, self.reporter = data_sha256, compute_dtype, reporter
        self._cache: ActivationCache | None = None

    def examples(self, phase: Phase, source: ExampleSource, phase_step: int, step: int) -> PhaseExamples:
        """The examples of ``phase`` from its step ``phase_step`` on, step ``step`` of the run; fills the cache first.

        Raises:
            UserError: the phase takes batches again, which ``source`` cannot give twice.
        """
        if phase.examples is not None and not source.repeatable:
            raise UserError(
                "training.progressive.cache_activations: true needs batches that can be taken again; "
                "give a ProgressiveDataLoader, or set it to false"
            )
        if not phase.enters:
            return PhaseExamples(source, phase, phase_step, step)
        placement = self.placement
        compute = Boundaries(
            placement.rack, source, self.config, placement.device, self.compute_dtype, placement.offload
        )
        cached = None
        if phase.cached:
            cache = self._of(phase)
            first, count = cache.layout.first, cache.layout.count

            def progress(boundary: int, batch: int) -> None:
                stop_if_asked()
                self.reporter.work(f"activations at boundary {boundary}", batch - first, count)

            cached = compute.prepared(cache, self.boundaries(phase), progress)
        return PhaseExamples(source, phase, phase_step, step, compute, cached)

    def boundaries(self, phase: Phase) -> list[BoundaryId]:
        """The boundaries 1 … ``phase.enters`` of the Rack as it is; a key covers everything upstream."""
        rack, training, layout = self.placement.rack, self.config.training, self._of(phase).layout
        upstream = [UpstreamPart(weights_sha256(rack.embedding.state_dict().items()), "full")]
        ids: list[BoundaryId] = []
        for stack in list(rack.stacks)[: phase.enters]:
            adapters = tuple(
                (a.kind, a.rank, a.alpha, weights_sha256(stack.adapter_tensors(a.kind).items()))
                for a in phase.adapters
                if a.stack == stack.stack_id
            )
            sha256 = self.placement.hash_of(stack)
            upstream.append(UpstreamPart(sha256, phase.precision_of(stack.stack_id), adapters))
            key = cache_key(
                upstream=upstream, model={}, data_sha256=self.data_sha256, seed=training.seed, corruption={},
                layout=layout, compute_dtype=str(self.compute_dtype), device=self.placement.device.type,
            )  # fmt: skip
            ids.append(BoundaryId(len(ids) + 1, key))
        return ids

    def let_go(self, phase: Phase, following: Sequence[Phase]) -> None:
        """Deletes what ``phase`` read, unless a later phase reads it too or rolls it on."""
        if phase.cached and not any(later.cached for later in following):
            self._of(phase).clear()

    def _of(self, phase: Phase) -> ActivationCache:
        training = self.config.training
        assert phase.examples is not None
        layout = BoundaryLayout(
            training.batch_size, training.seq_len, self.placement.rack.d_model, *phase.examples, training.cache.dtype
        )
        if self._cache is None:
            in_memory = training.cache.in_memory or self.folder is None
            self._cache = ActivationCache(
                self.folder or Path(), layout, limit_bytes=training.cache.max_bytes, in_memory=in_memory
            )
        assert self._cache.layout == layout, "phases that share a cache name the same examples"
        return self._cache
