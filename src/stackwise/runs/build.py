"""The loop of a run: the one place that builds it, and the summary that it ends in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from stackwise.config.base import StackWiseConfig, dotted
from stackwise.config.objectives import ObjectiveName
from stackwise.errors import UserError
from stackwise.model.architecture import Rack
from stackwise.objectives import Objective
from stackwise.objectives.scoring import Validation
from stackwise.planning.devices import peak_flops
from stackwise.planning.plan import Planned
from stackwise.store.checkpoints import Checkpoint, CheckpointStore
from stackwise.store.rundir import RunDir
from stackwise.training.caching import Caching
from stackwise.training.callbacks import NO_CALLBACKS, Callbacks
from stackwise.training.examples import ExampleSource
from stackwise.training.loop import Loop
from stackwise.training.memory import PeakMemory
from stackwise.training.placement import Placement
from stackwise.training.progress import Reporter
from stackwise.training.saving import Saver
from stackwise.training.stage import Context
from stackwise.training.tracking import open_trackers


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
    callbacks: Callbacks = NO_CALLBACKS,
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
        callbacks: what the caller wants to be told.
    """
    training, about = config.training, {"fingerprint": "", **(identity or {})}
    if validate is None and (training.keep_best or training.early_stopping.patience is not None):
        key = "keep_best" if training.keep_best else "early_stopping.patience"
        raise UserError(f"training.{key}: it goes by the validation loss, but no validation data is given")
    store = None if run is None else CheckpointStore(run.checkpoints, training.checkpoint.keep_last)
    placement = Placement(rack, planned.device, training.offload, store)
    caching = Caching(
        placement, config, None if run is None else run.cache, about["fingerprint"], planned.compute_dtype, reporter
    )
    context = Context(
        rack, config, source, objectives, placement, caching, planned.compute_dtype, validate, reporter
    )  # fmt: skip
    wanted = training.logging.trackers
    trackers = open_trackers(wanted, run.path, dotted(config.to_dict())) if run is not None and wanted else []
    saver = Saver(run, store, about, trackers)
    # Without a run nobody reads an MFU, and on a CPU the peak is measured, for half a second.
    peak = None if run is None else peak_flops(planned.device, planned.compute_dtype)
    return Loop(context, planned, saver, memory, peak, checkpoint, callbacks)


def train_to_summary(loop: Loop, run: RunDir | None) -> dict[str, Any]:
    """Trains what is left, and returns what ``summary.json`` holds, which ``run`` then has."""
    state, context = loop.train(), loop.context
    validation = loop.validation or context.score(loop.phases[len(state.records) - 1])
    scores = {} if validation is None else validation.to_dict()
    peaks = [r.peak_memory_bytes for r in state.records if r.peak_memory_bytes is not None]
    summary = {
        "validation": {k: v for k, v in scores.items() if k not in ("tokens", "nelbo")} or None,
        **({"nelbo": scores["nelbo"]} if "nelbo" in scores else {}),
        "tokens": state.tokens,
        "flops": state.flops,
        "wall_seconds": state.seconds,
        "peak_memory_bytes": max(peaks, default=None),
        "best": None if state.best is None else asdict(state.best),
        "weights_sha256": context.placement.weights_sha256(),
        "phases": [asdict(record) for record in state.records],
    }
    if run is not None:
        run.write_summary(summary)
    return summary
