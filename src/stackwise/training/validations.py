"""What follows from a validation: which checkpoint is the best, and whether training ends early."""

from __future__ import annotations

from collections.abc import Sequence

from stackwise.config.base import StackWiseConfig
from stackwise.growth.phases import Phase
from stackwise.store.state import Best, Patience, RunState


def take_note(config: StackWiseConfig, phases: Sequence[Phase], state: RunState, loss: float) -> None:
    """Writes into ``state`` what the validation ``loss`` after its step means.

    The best step is sought among the phases whose losses compare with the last one's. Patience that ends the run is
    too; patience that ends a phase starts anew with each.
    """
    training, phase = config.training, phases[state.phase]
    alike = _comparable(config, phase, phases[-1])
    if training.keep_best and alike and (state.best is None or loss < state.best.validation_loss):
        state.best = Best(state.step, loss)
    stopping = training.early_stopping
    if stopping.patience is None or not (alike or stopping.ends == "phase"):
        return
    waiting = state.patience
    if waiting is None or (stopping.ends == "phase" and waiting.phase != state.phase):
        state.patience = Patience(state.phase, loss)
    elif loss < waiting.loss - stopping.min_improvement:
        waiting.loss, waiting.waited = loss, 0
    else:
        waiting.waited += 1
        if waiting.waited >= stopping.patience and not _is_last_step(phases, state, stopping.ends == "run"):
            record = state.records[-1]
            record.stopped_early, record.steps = stopping.ends, state.phase_step


def _comparable(config: StackWiseConfig, phase: Phase, last: Phase) -> bool:
    """Whether validation losses of the two phases measure the same: one objective, over the same noise levels."""
    levels = config.training.depth_variant is None or phase.stacks == last.stacks
    return phase.objective == last.objective and levels


def _is_last_step(phases: Sequence[Phase], state: RunState, of_run: bool) -> bool:
    """Whether the phase (or the run) ends here anyway."""
    of_phase = state.phase_step == phases[state.phase].steps
    return of_phase and (not of_run or state.phase == len(phases) - 1)
