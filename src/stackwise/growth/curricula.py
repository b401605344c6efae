"""Curricula: rules that turn a config into a list of phases.

Each makes drafts (what trains, and which share of the budget); ``build_phases`` turns shares into steps and gives every
phase its learning-rate schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

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


def all_parts(stacks: Sequence[int], has_head: bool) -> tuple[str, ...]:
    return ("embedding", *(f"stack.{k}" for k in stacks), "norm", *(("head",) if has_head else ()))


def end_to_end(config: StackWiseConfig, present: tuple[int, ...] = ()) -> list[Draft]:
    """Every Stack from the start, all of them trained: the baseline."""
    stacks = present or tuple(range(config.model.architecture.n_stacks))
    trains = all_parts(stacks, config.model.has_head)
    return [Draft(Phase("end-to-end", stacks, trains, 0, _UNSCHEDULED), 1.0)]


def grow(config: StackWiseConfig, present: tuple[int, ...] = ()) -> list[Draft]:
    """Stacks join the Rack, then a joint phase if asked. Stacks that are ``present`` already are the first trunk.

    Appended Stacks go to the right, prepended ones to the left, one a phase. Interleaved ones (block expansion, LLaMA
    Pro 2401.02415) join all at once, spread evenly between those that are present.

    With a frozen trunk the new Stacks, the final norm and the head (if it is not the embedding's) train; the embedding
    trains beside the first Stack, since later the trunk reads it (append), and with every new Stack when prepending,
    where nothing trained reads it directly but the new Stack.
    """
    settings = config.training.progressive
    target = config.target_stacks
    joint = settings.joint_fraction if target > 1 else 0.0
    first = max(present, default=-1) + 1
    if first >= target:
        raise UserError(
            f"training.progressive.target_stacks: {target}, but the Rack has {len(present)} Stacks already; "
            "set it higher"
        )
    interleave = settings.building_mode == "interleave"
    assert present or not interleave, "the config asks for model.initial"
    shares = settings.phase_fractions or (1.0,) * target
    total = sum(shares[first:]) / (1.0 - joint)
    if total == 0.0:
        raise UserError(f"training.progressive.phase_fractions: the Stacks to grow, from {first} on, have no share")
    drafts: list[Draft] = []
    stacks = present
    for group in [list(range(first, target))] if interleave else [[new] for new in range(first, target)]:
        stacks, left_of = _place(stacks, group, settings.building_mode)
        growth = tuple(
            Growth(
                new,
                settings.new_stack_init if left_of[new] is not None else "random",
                left_of[new] if settings.new_stack_init == "copy" else None,
            )
            for new in group
        )
        trains = _trained(config, stacks, group)
        name = f"stack {group[0]}" if len(group) == 1 else f"stacks {group[0]}–{group[-1]}"
        phase = Phase(name, stacks, trains, 0, _UNSCHEDULED, growth, settings.optimizer_state)
        drafts.append(Draft(phase, sum(shares[new] for new in group) / total))
    if joint:
        trains = all_parts(stacks, config.model.has_head)
        phase = Phase("joint", stacks, trains, 0, _UNSCHEDULED, (), settings.optimizer_state)
        drafts.append(Draft(phase, joint))
    return drafts


def _place(
    stacks: tuple[int, ...], group: list[int], mode: Literal["append", "prepend", "interleave"]
) -> tuple[tuple[int, ...], dict[int, int | None]]:
    """The order once the Stacks of ``group`` have joined, and each one's neighbour among those that were there."""
    if mode == "append":
        return (*stacks, *group), dict.fromkeys(group, stacks[-1] if stacks else None)
    if mode == "prepend":
        return (*group, *stacks), dict.fromkeys(group, stacks[0] if stacks else None)
    order: list[int] = []
    neighbours: dict[int, int | None] = {}
    waiting = list(group)
    for i, stack in enumerate(stacks, 1):
        order.append(stack)
        # After i of P Stacks, i/P of the new ones have joined: the last one ends the Rack.
        while waiting and (len(group) - len(waiting) + 1) * len(stacks) <= i * len(group):
            neighbours[waiting[0]] = stack
            order.append(waiting.pop(0))
    return tuple(order), neighbours


def _trained(config: StackWiseConfig, stacks: tuple[int, ...], group: list[int]) -> tuple[str, ...]:
    """The parts that train beside a trunk of all ``stacks`` but ``group``."""
    settings = config.training.progressive
    if settings.trunk_strategy == "trainable" or len(stacks) == len(group):
        return all_parts(stacks, config.model.has_head)
    trains = (*(f"stack.{new}" for new in group), "norm", *(("head",) if config.model.has_head else ()))
    # A tied head is the embedding: training it would change what the frozen trunk was trained to be read by.
    embedding = settings.building_mode == "prepend" and not config.model.tie_embeddings
    return ("embedding", *trains) if embedding else trains


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
