"""What scoring the validation text takes while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stackwise.config.run import TrainingConfig
from stackwise.growth.phases import Phase
from stackwise.kinds import OBJECTIVES
from stackwise.planning.dry_step import PhaseCost


@dataclass(frozen=True)
class ValidationCost:
    """The validations of a phase.

    Attributes:
        times: how many there are.
        tokens: that they score in all, at most: those of a text with as many as ``training.evaluation.max_tokens``.
        flops: of all of them.
        peak: bytes of the device while they run, weights and the optimizer's state included.
    """

    times: int
    tokens: int
    flops: float
    peak: int


def validation_costs(
    training: TrainingConfig,
    phases: Sequence[Phase],
    costs: Sequence[PhaseCost],
    scoring: Callable[[Phase], tuple[float, int]],
) -> list[ValidationCost]:
    """The validations of each phase.

    Args:
        scoring: the FLOPs of scoring a micro-batch, and the bytes that it takes beside weights and optimizer.
    """
    found, before, step = [], None, 0
    rows = training.micro_batch_size or training.batch_size
    for phase, cost in zip(phases, costs):
        evaluation = training.evaluation
        windows = max(1, (evaluation.max_tokens or 1) // training.seq_len)
        if OBJECTIVES[phase.objective].load().is_bound:
            windows *= evaluation.draws
        times = validations_of(step, phase.steps, evaluation.every_steps) + _stored_anew(before, phase)
        flops, held = scoring(phase)
        tokens = times * windows * training.seq_len
        found.append(
            ValidationCost(times, tokens, times * windows * flops / rows, cost.weights + cost.optimizer + held)
        )
        before, step = phase, step + phase.steps
    return found


def validations_of(before: int, steps: int, every: int | None) -> int:
    """Of a phase of ``steps`` steps, the first of which follows the step ``before``: every so many, and at its end."""
    end = before + steps
    return 1 if every is None else end // every - before // every + (end % every > 0)


def _stored_anew(before: Phase | None, phase: Phase) -> bool:
    """Whether Stacks change their storage, which is scored at once to say what it costs."""
    return before is not None and any(before.precision_of(k) != phase.precision_of(k) for k in before.stacks)
