"""Recipes side by side: each trained from the same config at the same true FLOPs, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stackwise.config.base import StackWiseConfig
from stackwise.errors import STOPPED, RunError, StoppedBySignal, UserError
from stackwise.files import write_text_atomic
from stackwise.growth.recipes import apply_recipe
from stackwise.planning.plan import plan_run
from stackwise.training.rundir import RunDir


def equal_budget(config: StackWiseConfig) -> float:
    """FLOPs that every recipe gets: ``training.max_flops``, or what the budget buys end to end."""
    unit, budget = config.training.budget
    if unit == "flops":
        return budget
    return plan_run(config.override(["training.strategy=end_to_end"]), Path.cwd()).flops


def compare_recipes(config: StackWiseConfig, names: Iterable[str], out: Path) -> list[dict[str, Any]]:
    """Trains ``config`` by each recipe into ``out/NAME``; runs that are there go on where they stopped.

    A process each, so that one's memory does not show in another's peak.

    Returns:
        For each recipe its name, validation (with ``nelbo`` where it is a bound), FLOPs, peak memory, seconds and
        phases; a phase has fallen when its validation loss at the end is below the one before it (the first one: below
        its first training loss).

    Raises:
        UserError: no such recipe, or its settings do not fit the config. RunError: a run failed.
    """
    names = list(names)
    budget = equal_budget(config)
    configs = {name: apply_recipe(config, name).override([f"training.max_flops={budget!r}"]) for name in names}
    rows = []
    for name, settings in configs.items():
        run = RunDir(out / name)
        if run.config.is_file():
            if StackWiseConfig.from_yaml(run.config) != settings:
                raise UserError(f"{run.path} holds a run with other settings; choose another --out")
            command = ["resume", str(run.path)]
        else:
            file = out / f"{name}.yaml"
            out.mkdir(parents=True, exist_ok=True)
            write_text_atomic(file, settings.to_yaml())
            command = ["train", str(file), "--out", str(run.path)]
        if not run.is_complete():
            print(f"recipe {name}", file=sys.stderr, flush=True)
            code = subprocess.run([sys.executable, "-m", "stackwise", *command], check=False).returncode
            if code == STOPPED:
                raise StoppedBySignal(f"recipe {name} was stopped; the same command goes on where it was")
            if code:
                raise RunError(f"recipe {name} failed with exit code {code}; the others are kept in {out}")
        rows.append(_row(name, run.read_summary()))
    return rows


def _row(name: str, summary: dict[str, Any]) -> dict[str, Any]:
    before, phases = None, []
    for phase in summary["phases"]:
        start = phase["first_loss"] if before is None else before
        end = phase["validation_loss"]
        phases.append({**phase, "fell": end < start})
        before = end
    keys = ("validation", "nelbo", "tokens", "flops", "wall_seconds", "peak_memory_bytes")
    kept = {key: summary[key] for key in keys if key in summary}
    return {"recipe": name, **kept, "phases": phases}
