"""The one training loop: it runs a list of phases.

Six words of the project are enough to read it. A *Rack* is the model. A *phase* is a stretch of training in which what
trains, the objective and the budget stay the same; a *Stage* is a phase made real on this device. The *context* is what
all stages share, the Rack first of all. *RunState* says where the run is, and its *records* what became of each phase.

Every number that a step depends on (batch, masks, dropout, learning rate) is a function of the seed and the step, so a
checkpoint holds weights, moments and counters, and no iterator or generator state; a resumed run takes the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from stackwise.errors import StoppedBySignal
from stackwise.growth.phases import Phase
from stackwise.objectives.scoring import Validation
from stackwise.planning.plan import Planned
from stackwise.signals import Stopped, StopRequest, stoppable
from stackwise.store.checkpoints import Checkpoint
from stackwise.store.state import PhaseRecord, RunState
from stackwise.training.callbacks import NO_CALLBACKS, Callbacks
from stackwise.training.memory import PeakMemory
from stackwise.training.progress import Clock, Pace, phase_ends, phase_starts
from stackwise.training.saving import Saver
from stackwise.training.stage import Context, Stage
from stackwise.training.step import Step, take_step
from stackwise.training.validations import take_note


class Loop:
    """Trains the Rack of ``context`` through the phases that are ``planned``.

    Args:
        context: the Rack and all that it trains with.
        planned: the phases, and the FLOPs of their steps.
        saver: writes checkpoints and metrics.
        memory: measures the peak of each phase.
        peak_flops: of the device, for MFU; ``None`` leaves MFU out.
        checkpoint: to go on from.
        callbacks: what a caller wants to be told.
    """

    def __init__(
        self,
        context: Context,
        planned: Planned,
        saver: Saver,
        memory: PeakMemory,
        peak_flops: float | None = None,
        checkpoint: Checkpoint | None = None,
        callbacks: Callbacks = NO_CALLBACKS,
    ) -> None:
        self.context, self.phases, self.saver, self.memory = context, planned.phases, saver, memory
        self.peak_flops, self.callbacks = peak_flops, callbacks
        self.step_flops = [cost.flops for cost in planned.costs]
        self.state = RunState() if checkpoint is None else saver.restore(checkpoint, context)
        self.preparation_flops, self.pace = planned.preparation_flops, Pace(self.state, planned.flops)
        self.validation: Validation | None = None

    def train(self) -> RunState:
        """Runs what is left of the phases. Raises ``StoppedBySignal`` once a checkpoint is saved, ``RunError``."""
        state = self.state
        with ExitStack() as stack:
            stop = stack.enter_context(stoppable())
            stack.callback(self.saver.close)
            stack.callback(self.context.placement.offload.close)
            while state.phase < len(self.phases):
                phase = self.phases[state.phase]
                if state.unscored is not None or not state.phase_over(phase.steps):
                    self._run_phase(stop)
                following = self._following()
                # These two also for a phase whose last step a stopped process took.
                self.context.caching.let_go(phase, following)
                self.callbacks.on_phase(asdict(state.records[-1]))
                state.phase += 1
                if not following:
                    break
                state.phase_step = 0
        return state

    def _following(self) -> Sequence[Phase]:
        """The phases that come after the one in progress."""
        return () if self.state.records[-1].stopped_early == "run" else self.phases[self.state.phase + 1 :]

    def _run_phase(self, stop: StopRequest) -> None:
        """One phase, with its stage: step, evaluate, log, save."""
        clock, state, training = Clock(self.state), self.state, self.context.config.training
        with Stage(self.context, self.phases, state) as stage:
            phase, record = stage.phase, self._begun(stage)
            clock.start()
            if state.unscored is not None:  # a signal came while the last step was scored
                self._finish_step(stage, record, clock, stop, state.unscored, evaluate=True)
            while not state.phase_over(phase.steps):
                step = take_step(stage, state)
                self._count(step, record)
                last = state.phase_over(phase.steps)
                due = training.evaluation.every_steps
                evaluate = self.context.validate is not None and (last or bool(due and state.step % due == 0))
                logged = evaluate or last or state.step == 1 or state.step % training.logging.every_steps == 0
                seen = self._seen(stage, step, clock if logged else None)
                self._finish_step(stage, record, clock, stop, seen, evaluate)
        self.context.reporter.note(phase_ends(record))

    def _finish_step(
        self, stage: Stage, record: PhaseRecord, clock: Clock, stop: StopRequest, seen: dict[str, Any], evaluate: bool
    ) -> None:
        """What follows the update: evaluate, log, save. Raises ``StoppedBySignal`` once a checkpoint is saved."""
        state, logged = self.state, "flops" in seen
        with clock.paused():  # validating and saving are not training: they do not count in tokens/s
            self.context.reporter.remaining(self.pace.left())
            self.context.reporter.step(state.phase_step, seen if logged else None)
            scored = not evaluate or self._evaluate(stage, seen, record)
            state.unscored = None if scored else seen  # resuming scores, logs and tells it
            if scored:
                self.saver.log(seen if logged else None)
                self.callbacks.step(seen)  # before its checkpoint: a process that dies between repeats it
            last, every = state.phase_over(stage.phase.steps), self.context.config.training.checkpoint.every_steps
            if last or bool(stop) or state.is_best or state.step % every == 0:
                self._save(stage, record, clock)
        if stop and (self._following() or not (last and scored)):
            raise StoppedBySignal(f"stopped by {stop.name} after step {state.step}; {self.saver.kept}")

    def _begun(self, stage: Stage) -> PhaseRecord:
        """The record of the stage's phase; a phase that starts has what comes before its first step on it."""
        state, phase = self.state, stage.phase
        self.saver.changed(stage.changed)
        if state.phase_step == 0:
            trainable = sum(p.numel() for p in stage.parameters.values())
            prepared = self.preparation_flops[state.phase]
            state.records.append(
                PhaseRecord(
                    phase.name, phase.stack, phase.steps, flops=prepared, objective=stage.objective.name,
                    trainable_parameters=trainable, storage=stage.storage,
                )
            )  # fmt: skip
            state.flops += prepared
        record = state.records[-1]
        self.memory.reset()
        several = len(self.context.objectives) > 1
        text = phase_starts(state.phase, len(self.phases), phase, record, self.context.rack, several)
        self.context.reporter.phase(text, phase.steps, state.phase_step)
        return record

    def _count(self, step: Step, record: PhaseRecord) -> None:
        state, flops = self.state, self.step_flops[self.state.phase]
        state.step += 1
        state.phase_step += 1
        state.tokens += step.tokens
        state.flops += flops
        record.tokens += step.tokens
        record.flops += flops
        record.first_loss = step.loss if record.first_loss is None else record.first_loss
        record.last_loss = step.loss

    def _seen(self, stage: Stage, step: Step, clock: Clock | None) -> dict[str, Any]:
        """What is known of every step, and where ``clock`` is given, what is logged beside."""
        seen = {
            "step": self.state.step,
            "phase": stage.phase.name,
            "stack": stage.phase.stack,
            "tokens": self.state.tokens,
            "loss": step.loss,
            "lr": step.lr,
            "grad_norm": step.grad_norm,
        }
        if clock is None:
            return seen
        tokens_per_second, flops_per_second = clock.pace()
        return seen | {
            "tokens_per_second": tokens_per_second,
            "mfu": flops_per_second / self.peak_flops if self.peak_flops else None,
            "memory_bytes": self.memory.peak(),
            "flops": self.state.flops,
        }

    def _evaluate(self, stage: Stage, seen: dict[str, Any], record: PhaseRecord) -> bool:
        """Adds the validation loss to ``seen``, and to ``record`` where the phase ends; not if a signal ends it."""
        try:
            found = self.context.score(stage.phase)
        except (StoppedBySignal, Stopped):
            return False
        assert found is not None
        self.validation = found
        seen["validation_loss"] = found.loss
        take_note(self.context.config, self.phases, self.state, found.loss)
        if self.state.phase_over(stage.phase.steps):
            record.validation_loss, record.bits_per_byte = found.loss, found.bits_per_byte
        return True

    def _save(self, stage: Stage, record: PhaseRecord, clock: Clock) -> None:
        peak, seconds = self.memory.peak(), clock.lap()
        if peak is not None:
            record.peak_memory_bytes = max(peak, record.peak_memory_bytes or 0)
        record.seconds += seconds
        self.state.seconds += seconds
        self.saver.save(stage, self.state)
