"""The loop of a run, from what its phases are planned to be and what it trains with: the one place that builds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stackwise.config.base import StackWiseConfig
from stackwise.config.objectives import ObjectiveName
from stackwise.model.architecture import Rack
from stackwise.objectives import Objective
from stackwise.objectives.scoring import Validation
from stackwise.planning.devices import peak_flops
from stackwise.planning.plan import Planned
from stackwise.store.checkpoints import Checkpoint, CheckpointStore
from stackwise.store.rundir import RunDir
from stackwise.training.caching import Caching
from stackwise.training.examples import ExampleSource
from stackwise.training.loop import Loop
from stackwise.training.memory import PeakMemory
from stackwise.training.placement import Placement
from stackwise.training.progress import Reporter
from stackwise.training.saving import Saver
from stackwise.training.stage import Context


def create_loop(
    config: StackWiseConfig,
    rack: Rack,
    planned: Planned,
    source: ExampleSource,
    objectives: Mapping[ObjectiveName, Objective],
    reporter: Reporter,
    memory: PeakMemory,
    *,
    validate: Callable[[Rack, Objective], Validation] | None = None,
    run: RunDir | None = None,
    identity: Mapping[str, Any] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Loop:
    """The loop that trains ``rack`` through the phases that are ``planned``.

    Args:
        rack: without the Stacks that the phases add; with those of the phase in progress when resuming.
        source: the example of each step.
        objectives: of all phases, by name.
        memory: made before ``rack`` was, whose bytes it counts.
        validate: scores the Rack by an objective; ``None`` skips validation.
        run: where metrics and checkpoints go; ``None`` keeps nothing.
        identity: what checkpoints keep of the run they belong to; its ``fingerprint`` is in the keys of the cache too.
        checkpoint: to go on from.
    """
    training, about = config.training, {"fingerprint": "", **(identity or {})}
    store = None if run is None else CheckpointStore(run.checkpoints, training.checkpoint.keep_last)
    placement = Placement(rack, planned.device, training.offload, store)
    caching = Caching(
        placement, config, None if run is None else run.cache, about["fingerprint"], planned.compute_dtype, reporter
    )
    context = Context(
        rack, config, source, objectives, placement, caching, planned.compute_dtype, validate, reporter
    )  # fmt: skip
    saver = Saver(run, store, about, tensorboard=training.logging.tensorboard)
    # Without a run nobody reads an MFU, and on a CPU the peak is measured, for half a second.
    peak = None if run is None else peak_flops(planned.device, planned.compute_dtype)
    return Loop(context, planned, saver, memory, peak, checkpoint)
