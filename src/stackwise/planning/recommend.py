"""Which recipe fits a machine, and what to change when none does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stackwise.config.base import StackWiseConfig
from stackwise.errors import UserError
from stackwise.growth.recipes import RECIPES, apply_recipe
from stackwise.ops.storage import STORAGES
from stackwise.planning.plan import Plan

Planner = Callable[[StackWiseConfig], Plan]

_SMALLEST = min(STORAGES, key=lambda name: STORAGES[name].bytes_per_weight)
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
    """Overrides after which a config fits, and its plan then. ``recipe``: of the config; ``None``: its own."""

    recipe: str | None
    overrides: tuple[str, ...]
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "overrides": list(self.overrides), **self.plan.totals()}


def single_changes(config: StackWiseConfig, missing: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Overrides that save something, those first that cost least in time and quality.

    Args:
        missing: of ``Plan.missing``: what there is not enough of.
    """
    training = config.training
    if "disk" in missing:
        yield ("training.checkpoint.keep_last=1",)
        if training.progressive.cache_activations:
            yield ("training.cache.dtype=fp8",)
    if "device memory" in missing:
        micro = training.micro_batch_size or training.batch_size
        halves = [m for m in range(1, micro // 2 + 1) if training.batch_size % m == 0]
        for size in dict.fromkeys((*halves[-1:], *halves[:1])):
            yield (f"training.micro_batch_size={size}",)
        yield ("training.activation_checkpointing=true",)
        yield ("training.optimizer.moments=int8",)
        if training.strategy == "progressive":
            if training.progressive.trunk_strategy == "trainable":
                yield ("training.progressive.trunk_strategy=frozen",)
            yield (f"training.progressive.trunk_precision={_SMALLEST}",)
            yield ("training.progressive.cache_activations=true",)
        if training.offload == "none" and "host memory" not in missing:
            yield ("training.offload=host",)
    if missing and missing != ["disk"]:
        yield ("training.offload=disk",)
    if "device memory" in missing:
        architecture = config.model.architecture
        if isinstance(architecture.blocks_per_stack, int) and training.progressive.target_stacks is None:
            blocks, n_stacks = architecture.blocks_per_stack, architecture.n_stacks
            smaller = max((b for b in range(1, blocks // 2 + 1) if blocks % b == 0), default=blocks)
            yield (
                f"model.architecture.blocks_per_stack={smaller}",
                f"model.architecture.n_stacks={n_stacks * blocks // smaller}",
            )


def combinations(config: StackWiseConfig, missing: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Single changes, then the first two together, the first three, and so on.

    What does not go with the config and the changes before it, or is so already, is left out.
    """
    changes = list(single_changes(config, missing))
    for change in changes:
        if _overridden(config, change) not in (None, config):
            yield change
    together: tuple[str, ...] = ()
    reached, count = config, 0
    for change in changes:
        found = _overridden(config, (*together, *change))
        if found is not None and found != reached:
            together, reached, count = (*together, *change), found, count + 1
            if count > 1:
                yield together


def first_change_that_fits(
    config: StackWiseConfig, plan: Planner, planned: Plan, recipe: str | None = None
) -> Change | None:
    """The first of ``combinations`` with which ``config`` (``planned`` as it is) fits, without what it fits without."""
    for overrides in combinations(config, planned.missing):
        found = _planned(config, overrides, plan)
        if found is None or found.missing:
            continue
        for override in overrides:
            fewer = tuple(other for other in overrides if other != override)
            without = _planned(config, fewer, plan) if fewer else None
            if without is not None and not without.missing:
                overrides, found = fewer, without
        return Change(recipe, overrides, found)
    return None


def _planned(config: StackWiseConfig, overrides: tuple[str, ...], plan: Planner) -> Plan | None:
    """``None`` where the overrides do not go with the config."""
    changed = _overridden(config, overrides)
    try:
        return None if changed is None else plan(changed)
    except UserError:
        return None


def _overridden(config: StackWiseConfig, overrides: tuple[str, ...]) -> StackWiseConfig | None:
    """``None`` where the overrides do not go with the config."""
    try:
        return config.override(overrides)
    except UserError:
        return None
