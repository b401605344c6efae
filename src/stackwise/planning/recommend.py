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
    """Single changes, then the first two together, the first three, and so on.

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


def first_change_that_fits(
    config: StackWiseConfig, plan: Planner, planned: Plan, recipe: str | None = None
) -> Change | None:
    """The first of ``combinations`` with which ``config`` (``planned`` as it is) fits, without what it fits without."""
    for changes in combinations(config, planned.missing):
        found = _planned(config, changes, plan)
        if found is None or found.missing:
            continue
        for key in changes:
            fewer = {other: value for other, value in changes.items() if other != key}
            without = _planned(config, fewer, plan) if fewer else None
            if without is not None and not without.missing:
                changes, found = fewer, without
        return Change(recipe, changes, found)
    return None


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
