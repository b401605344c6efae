"""Recipes side by side: each trained from the same config at the same true FLOPs, each in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stackwise.config.base import StackWiseConfig
from stackwise.errors import STOPPED, RunError, StoppedBySignal, UserError
from stackwise.files import remove_leftovers, write_text_atomic
from stackwise.growth.recipes import apply_recipe
from stackwise.planning.plan import plan_run
from stackwise.runs.initial import initial_stacks
from stackwise.signals import PARENT_PIPE, SIGNALS, StopRequest, stop_if_asked, stoppable
from stackwise.store.rundir import RunDir


def equal_budget(config: StackWiseConfig) -> float:
    """FLOPs that every recipe gets: ``training.max_flops``, or what the recipe end-to-end takes for the budget."""
    unit, budget = config.training.budget
    if unit == "flops":
        return budget
    return plan_run(apply_recipe(config, "end-to-end"), Path.cwd(), present=initial_stacks(config)).flops


def compare_recipes(config: StackWiseConfig, names: Iterable[str], out: Path) -> list[dict[str, Any]]:
    """Trains ``config`` by each recipe into ``out/NAME``; runs that are there go on where they stopped.

    A process each, so that one's memory does not show in another's peak. A signal is passed on to that process, which
    saves its run.

    Returns:
        For each recipe its name, validation (with ``nelbo`` where it is a bound), FLOPs, peak memory, seconds and
        phases; a phase has fallen when its validation loss at the end is below the one before it (the first one: below
        its first training loss).

    Raises:
        UserError: no such recipe, or its settings do not fit the config. RunError: a run failed. StoppedBySignal.
    """
    with stoppable("the same command continues it") as stop:
        return _compare(config, list(names), out, stop)


def _compare(config: StackWiseConfig, names: Sequence[str], out: Path, stop: StopRequest) -> list[dict[str, Any]]:
    budget = equal_budget(config)
    configs = {name: apply_recipe(config, name).changed({"training.max_flops": budget}) for name in names}
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
            remove_leftovers(out, re.escape(file.name))
            write_text_atomic(file, settings.to_yaml())
            command = ["train", str(file), "--out", str(run.path)]
        if not run.is_complete():
            print(f"recipe {name}", file=sys.stderr, flush=True)
            code = _run(command, stop)
            stop_if_asked()
            if code == STOPPED:
                raise StoppedBySignal(f"recipe {name} was stopped; the same command continues it")
            if code:
                raise RunError(f"recipe {name} failed with exit code {code}; the others are kept in {out}")
        rows.append(_row(name, run.read_summary()))
    return rows


def _run(command: Sequence[str], stop: StopRequest) -> int:
    """Runs ``stackwise`` in a process of its own until it ends; its exit code.

    It is in a process group of its own, so that Ctrl-C reaches it once, through us. It ends when we do, however we end:
    it reads a pipe whose other end only we hold.
    """
    read, write = os.pipe()
    # Signals wait until the process has its handlers: it inherits the mask, and lifts it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    with os.fdopen(write, "wb"):
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "stackwise", *command],
                pass_fds=[read],
                env={**os.environ, PARENT_PIPE: str(read)},
                process_group=0,
            )
        finally:
            os.close(read)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while process.poll() is None and not stop:
            time.sleep(0.02)
        if stop.name:
            process.send_signal(signal.Signals[stop.name])
        return process.wait()


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
