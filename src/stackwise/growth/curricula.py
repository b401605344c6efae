"""Curricula: rules that turn a config into a list of phases.

Each makes drafts (what trains, and which share of the budget); ``build_phases`` turns shares into steps and gives every
phase its learning-rate schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from stackwise.config.base import StackWiseConfig
from stackwise.config.schema import ScheduleConfig
from stackwise.errors import UserError
from stackwise.growth.phases import Growth, Phase, Schedule

StepFlops = Callable[[Phase], float]
"""True FLOPs of one optimizer step of a phase."""

_UNSCHEDULED = Schedule(0, "linear", 0, 0, 1.0)


@dataclass(frozen=True)
class Draft:
    """A phase without its steps, and the share of the budget it gets."""

    phase: Phase
    share: float


def all_parts(stacks: Sequence[int], tied: bool) -> tuple[str, ...]:
    return ("embedding", *(f"stack.{k}" for k in stacks), "norm", *(() if tied else ("head",)))


def end_to_end(config: StackWiseConfig, present: tuple[int, ...] = ()) -> list[Draft]:
    """Every Stack from the start, all of them trained: the baseline."""
    stacks = present or tuple(range(config.model.architecture.n_stacks))
    trains = all_parts(stacks, config.model.tie_embeddings)
    return [Draft(Phase("end-to-end", stacks, trains, 0, _UNSCHEDULED), 1.0)]


def grow(config: StackWiseConfig, present: tuple[int, ...] = ()) -> list[Draft]:
    """One phase a Stack, then a joint one if asked. Stacks that are ``present`` already are the first trunk.

    Appended Stacks go to the right, prepended ones to the left. With a frozen trunk the new Stack, the final norm and
    the head train; the embedding trains beside the first Stack only, since later the trunk reads it (append), and with
    every new Stack when prepending, where nothing trained reads it directly but the new Stack.
    """
    settings = config.training.progressive
    tied = config.model.tie_embeddings
    target = config.target_stacks
    joint = settings.joint_fraction if target > 1 else 0.0
    first = max(present, default=-1) + 1
    if first >= target:
        raise UserError(f"training.progressive.target_stacks: {target}, but the Rack has {len(present)} Stacks already")
    shares = settings.phase_fractions or (1.0,) * target
    total = sum(shares[first:]) / (1.0 - joint)
    if total == 0.0:
        raise UserError(f"training.progressive.phase_fractions: the Stacks to grow, from {first} on, have no share")
    drafts: list[Draft] = []
    stacks = present
    for new in range(first, target):
        share = shares[new] / total
        prepend = settings.building_mode == "prepend"
        neighbour = (stacks[0] if prepend else stacks[-1]) if stacks else None
        stacks = (new, *stacks) if prepend else (*stacks, new)
        if settings.trunk_strategy == "trainable" or new == 0:
            trains = all_parts(stacks, tied)
        elif prepend:
            trains = ("embedding", f"stack.{new}", "norm", "head")
        else:
            trains = (f"stack.{new}", "norm", "head")
        init = settings.new_stack_init if neighbour is not None else "random"
        growth = Growth(new, init, neighbour if init == "copy" else None)
        drafts.append(
            Draft(Phase(f"stack {new}", stacks, trains, 0, _UNSCHEDULED, growth, settings.optimizer_state), share)
        )
    if joint:
        trains = all_parts(stacks, tied)
        phase = Phase("joint", stacks, trains, 0, _UNSCHEDULED, None, settings.optimizer_state)
        drafts.append(Draft(phase, joint))
    return drafts


CURRICULA: dict[str, Callable[[StackWiseConfig, tuple[int, ...]], list[Draft]]] = {
    "end_to_end": end_to_end,
    "progressive": grow,
}


def build_phases(
    config: StackWiseConfig, step_flops: StepFlops | None = None, present: tuple[int, ...] = ()
) -> list[Phase]:
    """The phases of the run that ``config`` describes.

    Args:
        step_flops: needed when the budget is in FLOPs.
        present: ids of the Stacks that the Rack has before the run, left to right.

    Raises:
        UserError: the budget gives some phase no step.
    """
    drafts = CURRICULA[config.training.strategy](config, present)
    unit, budget = config.training.budget
    tokens_per_step = config.training.batch_size * config.training.seq_len
    costs: list[float] = []
    for draft in drafts:
        if unit == "steps":
            costs.append(1.0)
        elif unit == "tokens":
            costs.append(tokens_per_step)
        else:
            if step_flops is None:
                raise ValueError("a budget in FLOPs needs step_flops")
            costs.append(step_flops(draft.phase))
    # Whole steps, rounding each phase's end rather than its length, so that the budget is used up to the last step.
    phases, spent, due = [], 0.0, 0.0
    for draft, cost in zip(drafts, costs):
        due += draft.share * budget
        steps = (
            math.floor((due - spent) / cost + 1e-9)
            if draft is not drafts[-1]
            else math.floor((budget - spent) / cost + 1e-9)
        )
        if steps < 1:
            raise UserError(
                f"the budget of {budget:g} {unit} gives the phase '{draft.phase.name}' no step; "
                f"raise training.max_{unit}"
            )
        spent += steps * cost
        phases.append(replace(draft.phase, steps=steps))
    return _with_schedules(phases, config.training.schedule)


def _with_schedules(phases: list[Phase], settings: ScheduleConfig) -> list[Phase]:
    """Gives each phase its piece of the run's schedule, or a schedule of its own (``span: phase``)."""
    total = sum(p.steps for p in phases)
    scheduled, done = [], 0
    for i, phase in enumerate(phases):
        start, length = (0, phase.steps) if settings.span == "phase" else (done, total)
        warmup = min(settings.warmup_steps if i == 0 else settings.rewarmup_steps, phase.steps)
        if settings.kind == "constant":
            schedule = Schedule(warmup, "linear", length - start, length - start, 1.0)
        elif settings.kind == "wsd":
            decay = round(settings.decay_fraction * length)
            schedule = Schedule(warmup, "linear", length - decay - start, length - start, settings.min_lr_ratio)
        else:
            first = settings.warmup_steps if settings.span == "run" else warmup
            schedule = Schedule(warmup, "cosine", min(first, length) - start, length - start, settings.min_lr_ratio)
        scheduled.append(replace(phase, schedule=schedule))
        done += phase.steps
    return scheduled
