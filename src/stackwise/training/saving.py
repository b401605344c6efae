"""What a run writes while it trains: checkpoints and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stackwise.store.checkpoints import Checkpoint, CheckpointStore
from stackwise.store.rundir import RunDir
from stackwise.store.state import RunState
from stackwise.store.structure import structure
from stackwise.training.optimizers import flatten, unflatten
from stackwise.training.stage import Context, Stage
from stackwise.training.tracking import Tracker, numbers_of


class Saver:
    """Writes into ``run``; with ``None`` nothing is kept.

    Args:
        store: of the checkpoints of ``run``.
        identity: what checkpoints keep of the run that they belong to.
        trackers: where metrics go too.
    """

    def __init__(
        self,
        run: RunDir | None,
        store: CheckpointStore | None,
        identity: Mapping[str, Any],
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._run, self._store, self._identity = run, store, dict(identity)
        self._trackers = trackers
        self._unchanged: set[str] = set()

    @property
    def kept(self) -> str:
        """What a run that stops after a step is told of its checkpoint."""
        return "its checkpoint is saved" if self._store is not None else "nothing is saved: there is no run directory"

    def log(self, metrics: Mapping[str, Any] | None) -> None:
        """A line of metrics, if the step has one."""
        if metrics is None:
            return
        if self._run is not None:
            self._run.append_metrics(dict(metrics))
        for tracker in self._trackers:
            tracker.log(metrics["step"], numbers_of(metrics))

    def changed(self, parts: set[str]) -> None:
        """Parts that were frozen have other tensors now: the next checkpoint writes them again."""
        self._unchanged -= parts

    def save(self, stage: Stage, state: RunState) -> None:
        """A checkpoint of ``state``; parts that are frozen since the one before are not hashed again."""
        if self._store is None:
            return
        parts, deposited = stage.context.placement.parts()
        frozen = set(parts) - {name.partition("/")[0] for name in stage.parameters}
        parts["optimizer"] = flatten(stage.moments())
        about = {**self._identity, **structure(stage.context.rack), "run": state.to_dict()}
        self._store.save(
            state.step, parts, about, unchanged=frozen & self._unchanged, deposited=deposited,
            keep=stage.context.config.training.checkpoint.keep_phase_ends and state.phase_over(stage.phase.steps),
            needs=[] if state.best is None else [state.best.step],
        )  # fmt: skip
        self._unchanged = frozen

    def restore(self, checkpoint: Checkpoint, context: Context) -> RunState:
        """Takes up moments, counters and what waits on disk; the Rack already has its Stacks and weights."""
        assert self._store is not None and self._run is not None
        context.placement.adopt(checkpoint, self._store)
        context.moments = unflatten(checkpoint.part("optimizer"))
        state = RunState.from_dict(checkpoint.state["run"])
        # Checkpoints before metrics: killed in between, the run still has every line up to its newest checkpoint. The
        # summary first: a run that goes on from one of its steps is no longer complete.
        self._run.remove_summary()
        self._store.delete_after(state.step)
        self._run.truncate_metrics(state.step - (state.unscored is not None))
        return state

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
