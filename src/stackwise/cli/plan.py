"""``stackwise plan``: what a run will take, before it runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from stackwise.cli.train import ConfigFile, From, Json, Overrides, read_config
from stackwise.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(text: str) -> int:
    """``24GB``, ``16GiB``, ``800M``: bytes. Raises ``UserError``."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]I?)?B?\s*", text.upper())
    if not found:
        raise UserError(f"--memory: {text!r} is not a size; write for example 24GB, 16GiB or 800MB")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Memory to fit into, for example 24GB (default: this machine's)")
    ] = None,
    start: From = None,
    as_json: Json = False,
) -> None:
    """Show each phase of a run, and what it will take, before anything runs."""
    settings = read_config(config, overrides, start)
    limit = parse_bytes(memory) if memory is not None else None
    from stackwise.cli.results import print_json, size, table
    from stackwise.planning.plan import available_memory, plan_run
    from stackwise.training.initial import initial_stacks

    report = plan_run(settings, Path.cwd(), limit, initial_stacks(settings))
    if as_json:
        print_json(report.to_dict())
        return
    rows = []
    for phase, cost, flops in zip(report.phases, report.costs, report.phase_flops):
        m = cost.memory()
        share = f"{cost.trainable_parameters:,} / {cost.parameters:,}"
        rows.append(
            [
                phase.name, str(len(phase.stacks)), _parts(phase.trains), share, f"{phase.steps:,}",
                f"{phase.steps * report.tokens_per_step:,}", f"{flops:.3g}",
                *(size(m[k]) for k in ("weights", "gradients", "optimizer", "activations", "logits", "peak")),
            ]
        )  # fmt: skip
    header = (
        "phase", "stacks", "trains", "parameters", "steps", "tokens", "FLOPs",
        "weights", "gradients", "optimizer", "activations", "logits", "peak",
    )  # fmt: skip
    table("", header, rows, stderr=False)
    where = "of --memory" if limit is not None else f"of {report.device}"
    budget = limit if limit is not None else available_memory(report.device)
    print(f"peak memory {size(report.peak_memory_bytes)}, {report.flops:.4g} FLOPs, disk {size(report.disk_bytes)}")
    if budget is None:
        print("this device does not say how much memory it has; give --memory to know whether the run fits")
    else:
        print(f"fits into {size(budget)} {where}: {'yes' if report.fits else 'no'}")
    for line in report.notes:
        print(line)


def _parts(trains: tuple[str, ...]) -> str:
    """``stack.0, stack.1, stack.2, head`` as ``stacks 0–2, head``."""
    ids = sorted(int(part.split(".")[1]) for part in trains if part.startswith("stack."))
    others = [part for part in trains if not part.startswith("stack.")]
    if len(ids) > 1 and ids[-1] - ids[0] == len(ids) - 1:
        stacks = [f"stacks {ids[0]}–{ids[-1]}"]
    else:
        stacks = [f"stack {k}" for k in ids]
    return ", ".join([*stacks, *others])
