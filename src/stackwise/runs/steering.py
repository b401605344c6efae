"""Going on with other settings: what a change in mid-run means for the phases, and how it is kept.

A change holds from the step after the checkpoint that the run goes on from. Phases that are over keep their steps; the
others share what is left of the budget, and the learning rate follows the schedule as it is then. In a run that is
complete the last phase is the one that goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stackwise.config.base import StackWiseConfig, why_fixed
from stackwise.errors import UserError
from stackwise.files import write_text_atomic
from stackwise.growth.curricula import count_phases
from stackwise.growth.phases import Phase
from stackwise.store.changes import Change, Changes, difference
from stackwise.store.checkpoints import Checkpoint
from stackwise.store.rundir import RunDir
from stackwise.store.state import RunState
from stackwise.training.progress import Reporter


@dataclass(frozen=True)
class Course:
    """How a run goes on from ``step``.

    Attributes:
        config: the settings of the next step.
        changes: made so far, those of a course that is left taken out.
        change: what is changed now; None where nothing is.
        state: of the checkpoint; None at the start of a run.
    """

    run: RunDir
    config: StackWiseConfig
    changes: Changes
    change: Change | None
    state: RunState | None

    @classmethod
    def of(
        cls, run: RunDir, config: StackWiseConfig, checkpoint: Checkpoint | None, overrides: Sequence[str] = ()
    ) -> Course:
        """UserError for a setting that cannot be changed in mid-run; nothing is written yet.

        Args:
            config: of ``run.config``.
            overrides: ``key.path=value`` settings that are to hold from here on.
        """
        step = 0 if checkpoint is None else checkpoint.step
        changes = Changes.of(run)
        state = None if checkpoint is None else RunState.from_dict(checkpoint.state["run"])
        before = changes.config_of(step + 1, config)
        after = StackWiseConfig.from_dict(before.to_dict(), overrides)
        settings = difference(before, after)
        for key in settings:
            reason = why_fixed(key)
            if reason is not None:
                raise UserError(
                    f"{key}: it cannot change in mid-run, because {reason}; "
                    f"stackwise train CONFIG --from {run.path} begins another run from its weights"
                )
        change = Change(step=step, settings=settings) if settings else None
        return cls(run, after, changes.until(step), change, state)

    def given(self, present: tuple[int, ...]) -> tuple[int, ...]:
        """The steps of the phases that the budget does not decide."""
        if self.change is None or not self._budget_changes:
            return self.changes.phase_steps
        if self.state is None:
            return ()
        over = [record.steps for record in self.state.records]
        if not self._phase_over:
            over = over[:-1]
        return tuple(over[: count_phases(self.config, present) - 1])

    def check(self, phases: Sequence[Phase]) -> None:
        """UserError where the change leaves the phase in progress no step to take."""
        state, change = self.state, self.change
        if change is None or state is None:
            return
        phase, last, over = phases[state.phase], state.phase == len(phases) - 1, self._phase_over
        if self._budget_changes and (last or not over) and phase.steps <= state.phase_step:
            raise UserError(
                f"{self._budget_key}: it gives the phase '{phase.name}' {phase.steps:,} steps, but the run has taken "
                f"{state.phase_step:,} of it; give more"
            )
        if over and not self._budget_changes and (last or state.records[-1].stopped_early == "run"):
            raise UserError(
                f"{self.run.path} is complete, so that {next(iter(change.settings))} changes nothing; raise its budget "
                f"(training.max_steps=…), or go back (--step)"
            )

    def recorded(self, phases: Sequence[Phase]) -> Changes:
        """The changes made so far, and the one made now."""
        if self.change is None:
            return self.changes
        steps = tuple(phase.steps for phase in phases) if self._budget_changes else ()
        return Changes((*self.changes.entries, self.change.model_copy(update={"phase_steps": steps})))

    def take(self, state: RunState, phases: Sequence[Phase], reporter: Reporter) -> None:
        """Writes down what changes, and gives the phase in progress the steps that it has from here on."""
        changes = self.recorded(phases)
        if self.change is not None:
            for key, (before, after) in self.change.settings.items():
                reporter.note(f"from step {self.change.step + 1:,} on: {key} {_shown(before)} → {_shown(after)}")
        if changes != Changes.of(self.run):
            changes.write(self.run)
        if self.config != StackWiseConfig.from_yaml(self.run.config):
            write_text_atomic(self.run.config, self.config.to_yaml())
        if state.phase < len(state.records):
            record = state.records[state.phase]
            if self._reopened(changes):
                record.stopped_early, state.patience = None, None
            if record.stopped_early is None:
                record.steps = phases[state.phase].steps

    @property
    def _budget_key(self) -> str:
        assert self.change is not None
        return next(key for key, (_, after) in self.change.settings.items() if _is_budget(key) and after is not None)

    @property
    def _budget_changes(self) -> bool:
        return self.change is not None and any(map(_is_budget, self.change.settings))

    @property
    def _phase_over(self) -> bool:
        """Whether the phase in progress has taken its last step, which a change does not take back."""
        assert self.state is not None
        record = self.state.records[-1]
        stopped = record.stopped_early is not None and not self._reopened(self.changes)
        return stopped or (record.stopped_early is None and self.state.phase_step == record.steps)

    def _reopened(self, changes: Changes) -> bool:
        """Whether a phase that stopped early goes on: where the budget or the patience changes just there."""
        at = 0 if self.state is None else self.state.step
        here = [change for change in (*changes.entries, self.change) if change is not None and change.step == at]
        keys = [key for change in here for key in change.settings]
        return any(_is_budget(key) or key.startswith("training.early_stopping.") for key in keys)


def _is_budget(key: str) -> bool:
    return key in ("training.max_steps", "training.max_tokens", "training.max_flops")


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
