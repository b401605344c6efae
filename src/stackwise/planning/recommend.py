"""Which recipe fits a machine, and what to change when none does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stackwise.config.base import StackWiseConfig, as_override
from stackwise.errors import UserError
from stackwise.growth.recipes import RECIPES, apply_recipe
from stackwise.kinds import STORAGES
from stackwise.ops.storage import storage_of
from stackwise.planning.plan import Plan

Planner = Callable[[StackWiseConfig], Plan]
LEAN = ("append-frozen-joint", "append-cached", "blockwise")
"""Recipes that need little memory, one for every kind of model, best first."""
SHORTEST = 64
"""Tokens of the shortest sequence that is proposed."""
STORE_WEIGHTS = {"training.progressive.trunk_precision", "training.progressive.cache_activations", "training.offload"}
"""Settings that change how many bytes of weights are on the device."""
LEAVE_MOMENTS = {
    "training.micro_batch_size", "training.activation_checkpointing", "training.optimizer.moments",
    "training.optimizer.in_backward", "training.grad_clip", "training.seq_len", "training.checkpoint.keep_last",
}  # fmt: skip
"""Settings that do not change of how many weights there are moments."""
FAR = 1.5
"""Where all changes together leave this many times the memory that there is, no selection of them is tried."""
Changes = dict[str, Any]
"""Settings by their dotted keys, as ``StackWiseConfig.changed`` takes them."""

_SMALLEST = min(STORAGES, key=lambda name: storage_of(name).bytes_per_weight)
"""The first of the storages that take least."""


@dataclass(frozen=True)
class Compared:
    """A recipe and its plan, or why it does not go with the config."""

    recipe: str
    plan: Plan | None
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        totals = {} if self.plan is None else {**self.plan.totals(), "missing": self.plan.missing}
        return {"recipe": self.recipe, **totals, "refused": self.refused}


def compare_plans(config: StackWiseConfig, recipes: Iterable[str], plan: Planner) -> list[Compared]:
    """``config`` planned by each recipe."""
    rows = []
    for name in recipes:
        try:
            rows.append(Compared(name, plan(apply_recipe(config, name))))
        except UserError as error:
            rows.append(Compared(name, None, str(error)))
    return rows


def best_that_fits(rows: Sequence[Compared]) -> Compared | None:
    """The best recipe that fits."""
    fitting = {row.recipe: row for row in rows if row.plan is not None and row.plan.fits}
    return next((fitting[name] for name in RECIPES if name in fitting), None)


@dataclass(frozen=True)
class Change:
    """Settings with which a config fits, and its plan then. ``recipe``: of the config; ``None``: its own."""

    recipe: str | None
    changes: Changes
    plan: Plan

    @property
    def overrides(self) -> list[str]:
        """The changes as a command line takes them."""
        return [as_override(key, value) for key, value in self.changes.items()]

    def to_dict(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "overrides": self.overrides, **self.plan.totals()}


def single_changes(config: StackWiseConfig, missing: Sequence[str]) -> Iterator[Changes]:
    """Changes that save something, those first that cost least in time and quality.

    Args:
        missing: of ``Plan.missing``: what there is not enough of.
    """
    training = config.training
    if "disk" in missing:
        yield {"training.checkpoint.keep_phase_ends": False}
        yield {"training.checkpoint.keep_last": 1}
        if training.progressive.cache_activations:
            yield {"training.cache.dtype": "fp8"}
    if "device memory" in missing:
        micro = training.micro_batch_size or training.batch_size
        halves = [m for m in range(1, micro // 2 + 1) if training.batch_size % m == 0]
        for size in dict.fromkeys((*halves[-1:], *halves[:1])):
            yield {"training.micro_batch_size": size}
        yield {"training.activation_checkpointing": True}
        yield {"training.optimizer.moments": "int8"}
        if micro == training.batch_size:  # of several micro-batches the gradients wait for the last one
            yield {"training.optimizer.in_backward": True, "training.grad_clip": None}
        if training.strategy == "progressive":
            if training.progressive.trunk_strategy == "trainable":
                yield {"training.progressive.trunk_strategy": "frozen"}
            yield {"training.progressive.trunk_precision": _SMALLEST}
            yield {"training.progressive.cache_activations": True}
        if training.offload == "none" and "host memory" not in missing:
            yield {"training.offload": "host"}
    if missing and missing != ["disk"]:
        yield {"training.offload": "disk"}
    if "device memory" in missing:
        architecture = config.model.architecture
        if isinstance(architecture.blocks_per_stack, int) and training.progressive.target_stacks is None:
            blocks, n_stacks = architecture.blocks_per_stack, architecture.n_stacks
            smaller = max((b for b in range(1, blocks // 2 + 1) if blocks % b == 0), default=blocks)
            yield {
                "model.architecture.blocks_per_stack": smaller,
                "model.architecture.n_stacks": n_stacks * blocks // smaller,
            }


def combinations(config: StackWiseConfig, missing: Sequence[str]) -> Iterator[Changes]:
    """Single changes, then the first two together, the first three, and so on; at last all with shorter sequences.

    What does not go with the config and the changes before it, or is so already, is left out.
    """
    singles = list(single_changes(config, missing))
    for change in singles:
        if _changed(config, change) not in (None, config):
            yield change
    together: Changes = {}
    reached = config
    for change in singles:
        found = _changed(config, together | change)
        if found is not None and found != reached:
            together, reached = together | change, found
            if together != change:
                yield together
    if "device memory" in missing:
        for part in (2, 4, 8):
            if config.training.seq_len // part >= SHORTEST:
                yield together | {"training.seq_len": config.training.seq_len // part}


def change_that_fits(
    config: StackWiseConfig, plan: Planner, planned: Plan, rows: Sequence[Compared] | None = None
) -> Change | None:
    """With which settings ``config`` (``planned`` as it is) fits: other ones beside its curriculum, else a recipe, the
    best that fits, else the leanest recipe with other settings; a smaller budget where time is short.

    Args:
        rows: recipes that may be proposed, planned; default ``LEAN``, since planning a large model takes seconds.
    """
    change = Change(None, {}, planned) if _held(planned) else first_change_that_fits(config, plan, planned)
    if change is None:
        rows = compare_plans(config, LEAN, plan) if rows is None else rows
        there = {row.recipe: row.plan for row in rows if row.plan is not None}
        best = next((name for name in RECIPES if name in there and _held(there[name])), None)
        change = _leanest_change(config, rows, plan) if best is None else Change(best, {}, there[best])
    return None if change is None else _in_time(config, change, plan)


def _leanest_change(config: StackWiseConfig, rows: Iterable[Compared], plan: Planner) -> Change | None:
    """Settings with which the recipe that takes least memory fits."""
    there = {row.recipe: row.plan for row in rows if row.plan is not None}
    if not there:
        return None
    leanest = min(there, key=lambda name: there[name].peak_memory_bytes)
    return first_change_that_fits(apply_recipe(config, leanest), plan, there[leanest], leanest)


def _in_time(config: StackWiseConfig, change: Change, plan: Planner) -> Change | None:
    """``change`` with as large a budget as the time allows, in the config's own unit; ``None``: with none."""
    if "time" not in change.plan.missing:
        return change
    base = config if change.recipe is None else apply_recipe(config, change.recipe)
    unit, budget = base.training.budget
    for _ in range(3):  # phases have whole steps, and each is scored: time is not quite in proportion
        seconds, limit = change.plan.seconds, change.plan.seconds_limit
        assert seconds is not None and limit is not None
        budget *= 0.98 * limit / seconds
        budget = budget if unit == "flops" else int(budget)
        changes = change.changes | {f"training.max_{unit}": float(f"{budget:.2g}") if unit == "flops" else budget}
        found = _planned(base, changes, plan)
        if found is None:
            return None
        change = Change(change.recipe, changes, found)
        if not found.missing:
            return change
    return None


def first_change_that_fits(
    config: StackWiseConfig, plan: Planner, planned: Plan, recipe: str | None = None
) -> Change | None:
    """The first of ``combinations`` with which ``config`` (``planned`` as it is) fits, without what it fits without.
    Time is not looked at.
    """
    every, singles = list(combinations(config, planned.missing)), list(single_changes(config, planned.missing))
    last = _planned(config, every[-1], plan) if every else None
    if last is not None and last.limit is not None and last.peak_memory_bytes > FAR * last.limit:
        return None
    for changes in every:
        found = None if _hopeless(planned, changes) else _planned(config, changes, plan)
        if found is None or not _held(found):
            continue
        for keys in dict.fromkeys(tuple(single) for single in singles):
            fewer = {key: value for key, value in changes.items() if key not in keys}
            if not fewer or len(fewer) == len(changes) or _hopeless(planned, fewer):
                continue
            without = _planned(config, fewer, plan)
            if without is not None and _held(without):
                changes, found = fewer, without
        return Change(recipe, changes, found)
    return None


def _hopeless(planned: Plan, changes: Changes) -> bool:
    """Whether weights, and moments, that these changes leave are too much alone: then nothing need be planned."""
    if planned.limit is None or changes.keys() & STORE_WEIGHTS:
        return False
    share = 0.25 if changes.get("training.optimizer.moments") == "int8" else 1.0
    share *= changes.keys() <= LEAVE_MOMENTS
    return max(cost.weights + share * cost.optimizer for cost in planned.costs) > planned.limit


def _held(plan: Plan) -> bool:
    """Whether there is room for it, however long it takes."""
    return not set(plan.missing) - {"time"}


def _planned(config: StackWiseConfig, changes: Changes, plan: Planner) -> Plan | None:
    """``None`` where the changes do not go with the config."""
    changed = _changed(config, changes)
    try:
        return None if changed is None else plan(changed)
    except UserError:
        return None


def _changed(config: StackWiseConfig, changes: Changes) -> StackWiseConfig | None:
    """``None`` where the changes do not go with the config."""
    try:
        return config.changed(changes)
    except UserError:
        return None
