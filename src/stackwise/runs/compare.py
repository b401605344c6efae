"""Recipes side by side: each trained from the same config at the same true FLOPs, with one seed or several."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise.config.base import StackWiseConfig
from stackwise.errors import STOPPED, RunError, StoppedBySignal, UserError
from stackwise.files import remove_leftovers, write_text_atomic
from stackwise.growth.recipes import apply_recipe
from stackwise.model.lexical import resolve_family
from stackwise.planning.flops import Flops
from stackwise.planning.plan import plan_run
from stackwise.runs.initial import initial_stacks
from stackwise.runs.planned import plan_of
from stackwise.runs.processes import Command, run_commands
from stackwise.runs.verdict import measure_of, spread, ties_of, verdict
from stackwise.signals import StopRequest, stop_if_asked, stoppable
from stackwise.store.identity import check_same_run
from stackwise.store.rundir import RunDir, finite_json
from stackwise.store.state import read_summary

RESULT = "compare.json"
"""In the folder of a comparison: what ``compare_recipes`` returns."""


def equal_budget(config: StackWiseConfig) -> float:
    """FLOPs that every recipe gets: ``training.max_flops``, or what the recipe end-to-end takes for the budget."""
    unit, budget = config.training.budget
    if unit == "flops":
        return budget
    return plan_run(apply_recipe(config, "end-to-end"), Path.cwd(), present=initial_stacks(config)).flops


@dataclass(frozen=True)
class Entry:
    """One run of a comparison."""

    recipe: str
    seed: int
    config: StackWiseConfig
    run: RunDir

    @property
    def name(self) -> str:
        return f"{self.recipe}, seed {self.seed}"

    def command(self) -> Command:
        """What trains it, or goes on with it."""
        if self.run.config.is_file():
            return Command(self.name, ("resume", str(self.run.path)))
        return Command(self.name, ("train", "/dev/stdin", "--out", str(self.run.path)), self.config.to_yaml())


def compare_recipes(
    config: StackWiseConfig, names: Iterable[str], out: Path, seeds: int = 1, jobs: int = 1
) -> dict[str, Any]:
    """Trains ``config`` by each recipe with each seed into ``out/RECIPE-seed-N``, and writes ``out/compare.json``.

    Runs that are there go on where they stopped. Each is trained by a process of its own, so that one's memory does not
    show in another's peak.

    Args:
        seeds: runs of each recipe: with the config's seed, the next one, and so on.
        jobs: runs that are trained at the same time; their times are then not those of a run alone.

    Returns:
        What the runs have in common (``budget_flops``, ``seeds``, ``measure``), ``recipes`` by the mean of that
        measure, each with mean and deviation of its numbers, its FLOPs by kind, the recipes that it ties with and its
        runs, and the ``verdict``, a sentence.

    Raises:
        UserError: no such recipe, its settings do not fit the config, or ``out`` holds runs with others. RunError: a
        run failed. StoppedBySignal.
    """
    with stoppable("the same command continues it") as stop:
        entries = _entries(config, list(dict.fromkeys(names)), out, seeds)
        _train(entries, out, jobs, stop)
        result = _result(entries)
    remove_leftovers(out, re.escape(RESULT))
    write_text_atomic(out / RESULT, finite_json(result, str(out / RESULT), indent=2) + "\n")
    return result


def _entries(config: StackWiseConfig, names: Sequence[str], out: Path, seeds: int) -> list[Entry]:
    """Every run, seed by seed, so that a comparison that is stopped early has each recipe. What is there is checked."""
    budget, first = equal_budget(config), config.training.seed
    settings = {name: apply_recipe(config, name).changed({"training.max_flops": budget}) for name in names}
    entries = []
    for seed in range(first, first + seeds):
        for name, base in settings.items():
            run = RunDir(out / f"{name}-seed-{seed}")
            entries.append(Entry(name, seed, resolve_family(base.changed({"training.seed": seed})), run))
    for entry in entries:
        if entry.run.config.is_file():
            check_same_run(RunDir.open(entry.run.path), entry.config)
    return entries


def _train(entries: Sequence[Entry], out: Path, jobs: int, stop: StopRequest) -> None:
    ready = sum(entry.run.is_complete() for entry in entries)

    def done(command: Command, seconds: float) -> None:
        nonlocal ready
        ready += 1
        print(f"{ready} of {len(entries)} runs: {command.name} took {seconds:.0f} s", file=sys.stderr, flush=True)

    commands = [entry.command() for entry in entries if not entry.run.is_complete()]
    codes = run_commands(commands, jobs, stop, done)
    stop_if_asked()
    for name, code in codes.items():
        if code == STOPPED:
            raise StoppedBySignal(f"{name} was stopped; the same command continues it")
    for name, code in codes.items():
        if code:
            raise RunError(f"{name} failed with exit code {code}; the other runs are kept in {out}")


def _result(entries: Sequence[Entry]) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        runs.setdefault(entry.recipe, []).append(_row(entry, read_summary(entry.run)))
    measure = measure_of([run for rows in runs.values() for run in rows])
    recipes: list[dict[str, Any]] = []
    for name, rows in runs.items():
        entry = next(entry for entry in entries if entry.recipe == name)
        recipes.append(
            {
                "recipe": name,
                **{key: spread([row["validation"][key] for row in rows]) for key in ("loss", "bits_per_byte")},
                **{key: spread([row[key] for row in rows]) for key in ("peak_memory_bytes", "wall_seconds", "flops")},
                "flops_by_kind": _kinds(entry, rows[0]["phases"]),
                "runs": rows,
            }
        )
    recipes.sort(key=lambda row: (row[measure]["mean"], row["recipe"]))
    for row in recipes:
        row["ties"] = ties_of(row, recipes, measure)
    return {
        "budget_flops": entries[0].config.training.max_flops,
        "seeds": sorted({entry.seed for entry in entries}),
        "measure": measure,
        "bound": any("nelbo" in run for row in recipes for run in row["runs"]),
        "recipes": recipes,
        "verdict": verdict(recipes, measure),
    }


def _kinds(entry: Entry, phases: Sequence[dict[str, Any]]) -> dict[str, float]:
    """FLOPs of a run by kind: its steps at what a step of the plan takes, and what comes before them."""
    planned = plan_of(entry.run, entry.config)
    kinds = [
        Flops(cache=before) + cost.kinds * phase["steps"]
        for before, cost, phase in zip(planned.preparation_flops, planned.costs, phases)
    ]
    return sum(kinds, Flops()).to_dict()


def _row(entry: Entry, summary: dict[str, Any]) -> dict[str, Any]:
    """A run; a phase has fallen when its validation loss at the end is below the one before it (the first one: below
    its first training loss)."""
    if summary["validation"] is None:
        raise UserError(f"{entry.run.path}: it was not validated, so there is nothing to compare")
    before, phases = None, []
    for phase in summary["phases"]:
        start = phase["first_loss"] if before is None else before
        end = phase["validation_loss"]
        phases.append({**phase, "fell": end < start})
        before = end
    keys = ("validation", "nelbo", "tokens", "flops", "wall_seconds", "peak_memory_bytes", "weights_sha256")
    kept = {key: summary[key] for key in keys if key in summary}
    return {"seed": entry.seed, "run": entry.run.path.name, **kept, "phases": phases}
