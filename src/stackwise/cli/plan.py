"""``stackwise plan``: what a run will take, before it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackwise.cli.train import ConfigFile, From, Json, Memory, Overrides, Time, read_config
from stackwise.errors import UserError
from stackwise.units import count, duration, is_decimal, parse_bytes, parse_seconds, size

if TYPE_CHECKING:
    from stackwise.config.run import TrainingConfig
    from stackwise.planning.devices import Machine
    from stackwise.planning.plan import Plan
    from stackwise.planning.recommend import Change, Compared

_Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or mps of this machine, or any of h200, h100, a100, 4090 …")
]
_HostMemory = Annotated[
    str | None, typer.Option("--host-memory", help="Host memory beside an accelerator, for offloaded Stacks")
]
_Disk = Annotated[str | None, typer.Option("--disk", help="Disk space for checkpoints and the activation cache")]
_FlopsPerSecond = Annotated[
    float | None,
    typer.Option("--flops-per-second", help="FLOP/s that training reaches (default: a share of the device's peak)"),
]
_Recipes = Annotated[str | None, typer.Option("--recipes", metavar="A,B,…", help="Compare these recipes, or all")]


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    memory: Memory = None,
    device: _Device = None,
    host_memory: _HostMemory = None,
    disk: _Disk = None,
    flops_per_second: _FlopsPerSecond = None,
    time: Time = None,
    recipes: _Recipes = None,
    start: From = None,
    as_json: Json = False,
) -> None:
    """Show what each phase of a run needs, before anything runs, and what to change where it does not fit."""
    settings = read_config(config, overrides, start)
    sizes = {"memory": memory, "host_memory": host_memory, "disk": disk}
    limits: dict[str, Any] = {
        name: parse_bytes(text, f"--{name.replace('_', '-')}") for name, text in sizes.items() if text is not None
    }
    said = partial(size, decimal=any(is_decimal(text) for text in sizes.values() if text is not None))
    seconds = None if time is None else parse_seconds(time)
    if flops_per_second is not None and not flops_per_second > 0:
        raise UserError(f"--flops-per-second: {flops_per_second:g} is not a rate; write for example 4e14")
    from stackwise.cli.results import print_json
    from stackwise.growth.recipes import recipe_names
    from stackwise.planning.plan import plan_run
    from stackwise.planning.recommend import best_that_fits, change_that_fits, compare_plans
    from stackwise.runs.initial import initial_stacks

    names = None if recipes is None else recipe_names(recipes)
    machine = replace(_machine(device, settings.training, flops_per_second), **limits)
    planner = partial(
        plan_run, folder=Path.cwd(), present=initial_stacks(settings), machine=machine, seconds_limit=seconds
    )
    report = planner(settings)
    if names is None and report.fits is False:
        names = recipe_names("all")
    rows = [] if names is None else compare_plans(settings, names, planner)
    best, change = best_that_fits(rows), None
    if report.fits is False and best is None:
        change = change_that_fits(settings, planner, report, rows)
    if as_json:
        result: dict[str, Any] = report.to_dict()
        if names is not None:
            result["recipes"] = [row.to_dict() for row in rows]
            result["recommended"] = None if best is None else best.recipe
            result["change"] = None if change is None else change.to_dict()
        print_json(result, "Plan")
        return
    _show(report, said)
    if names is not None:
        _show_comparison(rows, best, change, report.fits is False, said)


def _machine(device: str | None, training: TrainingConfig, flops_per_second: float | None) -> Machine:
    """What ``--device`` says, or this machine, with its speed: given, by its data sheet, or measured."""
    from stackwise.planning.devices import named_machine, this_machine
    from stackwise.runs.limits import with_speed

    machine = this_machine(training, Path.cwd()) if device is None else named_machine(device, training, Path.cwd())
    if flops_per_second is not None:
        return replace(machine, flops_per_second=flops_per_second, rate="given")
    return with_speed(machine)


def _show(report: Plan, said: Callable[[float | None], str]) -> None:
    from stackwise.cli.results import table
    from stackwise.planning.devices import UTILISATION

    rows = []
    for phase, cost, flops, seconds in zip(report.phases, report.costs, report.phase_flops, report.phase_seconds):
        m = cost.memory()
        share = f"{cost.trainable_parameters:,} / {cost.parameters:,}"
        rows.append(
            [
                phase.name, str(len(phase.stacks)), _parts(phase.trains), share, f"{phase.steps:,}",
                f"{phase.steps * report.tokens_per_step:,}", f"{flops:.3g}", duration(seconds),
                *(said(m[k]) for k in ("weights", "gradients", "optimizer", "activations", "logits", "peak")),
            ]
        )  # fmt: skip
    header = (
        "phase", "stacks", "trains", "parameters", "steps", "tokens", "FLOPs", "time",
        "weights", "gradients", "optimizer", "activations", "logits", "peak",
    )  # fmt: skip
    first = ("logits", "activations", "gradients", "optimizer", "weights", "stacks", "tokens", "parameters", "trains")
    table("", header, rows, stderr=False, first_to_go=first)
    total = f"peak memory {said(report.peak_memory_bytes)}, {report.flops:.4g} FLOPs, disk {said(report.disk_bytes)}"
    if report.host_memory_bytes:
        total += f", host memory {said(report.host_memory_bytes)}"
    print(f"{total}, time {duration(report.seconds)}")
    validation = max(found.peak for found in report.validations)
    print(
        f"of that, validation: {count(sum(found.times for found in report.validations), 'time')}, at most "
        f"{sum(found.tokens for found in report.validations):,} tokens, {said(validation)}, "
        f"time {duration(report.validation_seconds)}"
    )
    machine = report.machine
    if machine.reached_flops is None or machine.flops_per_second is None:
        print(f"how fast {machine.name} computes is not known; give --flops-per-second to know how long the run takes")
    else:
        print(
            f"time is at {machine.reached_flops:.3g} FLOP/s: {UTILISATION[machine.rate]:.0%} of "
            f"{machine.flops_per_second:.3g} ({machine.rate}, {machine.name})"
        )
    if report.limit is None:
        print("this device does not say how much memory it has; give --memory to know whether the run fits")
    for what, needed, there in report.needs:
        if there is not None and needed:
            print(f"{what}: {said(needed)} of {said(there)}, {'fits' if needed <= there else 'does not fit'}")
    if report.seconds is not None and report.seconds_limit is not None:
        fits = "does not fit" if "time" in report.missing else "fits"
        print(f"time: {duration(report.seconds)} of {duration(report.seconds_limit)}, {fits}")
    for line in report.notes:
        print(line)


def _show_comparison(
    rows: list[Compared],
    best: Compared | None,
    change: Change | None,
    asked: bool,
    said: Callable[[float | None], str],
) -> None:
    from stackwise.cli.results import table
    from stackwise.growth.recipes import RECIPES

    shown = []
    for row in rows:
        if row.plan is None:
            shown.append([row.recipe, *"–––––", "refused"])
            continue
        plan = row.plan
        fits = {True: "yes", None: "not known"}.get(plan.fits, "no: " + ", ".join(plan.missing))
        shown.append(
            [row.recipe, said(plan.peak_memory_bytes), said(plan.host_memory_bytes), said(plan.disk_bytes),
             f"{plan.flops:.3g}", duration(plan.seconds), fits]
        )  # fmt: skip
    print()
    header = ("recipe", "peak memory", "host", "disk", "FLOPs", "time", "fits")
    table("", header, shown, stderr=False, first_to_go=("host", "FLOPs", "disk"))
    for row in rows:
        if row.refused is not None:
            print(f"refused: {row.refused}")
    if best is not None:
        print(f"recommended: {best.recipe}: {RECIPES[best.recipe].reason}")
    elif change is not None:
        whose = "" if change.recipe is None else f"recipe {change.recipe} with "
        plan = change.plan
        print(
            f"no recipe fits as it is; this does: {whose}{' '.join(change.overrides)} "
            f"(peak memory {said(plan.peak_memory_bytes)}, disk {said(plan.disk_bytes)}, {plan.flops:.3g} FLOPs)"
        )
    elif asked:
        print(
            "no recipe fits, nor does any change that this command tries; choose a smaller model or shorter sequences"
        )


def _parts(trains: tuple[str, ...]) -> str:
    """``stack.0, stack.1, stack.2, head`` as ``stacks 0–2, head``."""
    ids = sorted(int(part.split(".")[1]) for part in trains if part.startswith("stack."))
    others = [part for part in trains if not part.startswith("stack.")]
    if len(ids) > 1 and ids[-1] - ids[0] == len(ids) - 1:
        stacks = [f"stacks {ids[0]}–{ids[-1]}"]
    else:
        stacks = [f"stack {k}" for k in ids]
    return ", ".join([*stacks, *others])
