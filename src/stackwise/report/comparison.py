"""What ``stackwise compare`` leaves beside its runs: a table of every run, and a picture of all recipes."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from stackwise import outputs
from stackwise.errors import RunError
from stackwise.files import write_text_atomic
from stackwise.reading import read_object
from stackwise.report.chart import Axis, Chart, side_by_side, smoothed, thinned
from stackwise.report.theme import SERIES, series
from stackwise.runs.compare import RESULT
from stackwise.runs.verdict import MEASURES, choices, number
from stackwise.store.rundir import RunDir
from stackwise.units import size, size_unit

TABLE, PICTURE = "compare.csv", "compare.svg"

Table = tuple[tuple[str, ...], list[list[str]]]
"""Header and rows."""

_SHORT = {"recomputation": "again", "dequantisation": "decode", "optimizer": "update"}
"""Kinds of FLOPs whose names are wider than their numbers."""


def summary_table(result: dict[str, Any]) -> Table:
    """Mean and deviation of each recipe, best first."""
    rows, limit = result["recipes"], "≤ " if result["bound"] else ""
    unit, scale = size_unit(max((row["peak_memory_bytes"]["mean"] or 0.0) for row in rows))
    return ("recipe", MEASURES[result["measure"]], f"peak memory, {unit}", "time, s", "FLOPs"), [
        [
            row["recipe"],
            limit + number(row[result["measure"]]),
            number(row["peak_memory_bytes"], 1, scale),
            number(row["wall_seconds"], 0),
            f"{row['flops']['mean']:.3g}",
        ]
        for row in rows
    ]


def kinds_table(result: dict[str, Any]) -> Table:
    """Which share of its FLOPs each recipe spends on what, in per cent."""
    spent = {row["recipe"]: row["flops_by_kind"] for row in result["recipes"]}
    kinds = [kind for kind in next(iter(spent.values())) if any(flops[kind] for flops in spent.values())]
    return ("FLOPs, %", *(_SHORT.get(kind, kind) for kind in kinds)), [
        [name, *(f"{100 * flops[kind] / sum(flops.values()):.1f}" for kind in kinds)] for name, flops in spent.items()
    ]


def read_result(folder: Path) -> dict[str, Any]:
    """``compare.json`` of a folder. RunError where it is none that ``stackwise compare`` wrote."""
    path = folder / RESULT
    try:
        result = read_object(path)
        outputs.check(result, outputs.Compared)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RunError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
    return result


def write_files(result: dict[str, Any], folder: Path) -> None:
    """``compare.csv`` and ``compare.svg`` of ``compare_recipes``'s ``result`` into ``folder``, where its runs are."""
    write_text_atomic(folder / TABLE, table_of_runs(result))
    title = f"{', '.join(row['recipe'] for row in result['recipes'])} at {result['budget_flops']:.3g} FLOPs"
    write_text_atomic(folder / PICTURE, side_by_side(charts(result, folder), title))


def table_of_runs(result: dict[str, Any]) -> str:
    """CSV, one line a run, best recipe first."""
    kinds = list(result["recipes"][0]["flops_by_kind"])
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(
        ["recipe", "seed", "bits_per_byte", "loss", "peak_memory_bytes", "wall_seconds", "tokens", "flops"]
        + [f"{kind}_flops" for kind in kinds]
        + ["weights_sha256"]
    )
    for row in result["recipes"]:
        for run in row["runs"]:
            validation = run["validation"]
            lines.writerow(
                [row["recipe"], run["seed"], validation["bits_per_byte"], validation["loss"]]
                + [run[key] for key in ("peak_memory_bytes", "wall_seconds", "tokens", "flops")]
                + [row["flops_by_kind"][kind] for kind in kinds]
                + [run["weights_sha256"]]
            )
    return out.getvalue()


def charts(result: dict[str, Any], folder: Path) -> list[Chart]:
    """The measure against peak memory, where that was measured, and training loss against FLOPs."""
    rows, measure = result["recipes"], result["measure"]
    chosen = [row["recipe"] for row, _ in choices(rows, measure)]
    # Colours for the recipes that the verdict names and for the best others; more than eight cannot be told apart.
    first = [*chosen, *(row["recipe"] for row in rows if row["recipe"] not in chosen)]
    colours = {name: series(i) if i < len(SERIES) else "frozen" for i, name in enumerate(first)}
    pictures = [_losses(rows, folder, colours)]
    if all(row["peak_memory_bytes"]["mean"] is not None for row in rows):
        pictures.insert(0, _memory(rows, measure, colours))
    return pictures


def _ends(spread: dict[str, float]) -> tuple[float, float]:
    reach = spread["deviation"] or 0.0
    return spread["mean"] - reach, spread["mean"] + reach


def _memory(rows: list[dict[str, Any]], measure: str, colours: dict[str, str]) -> Chart:
    memory = {row["recipe"]: row["peak_memory_bytes"] for row in rows}
    unit, scale = size_unit(max(spread["mean"] for spread in memory.values()))
    x = Axis.around([_ends(spread) for spread in memory.values()], f"peak memory, {unit}", scale=scale, room=0.12)
    y = Axis.around([_ends(row[measure]) for row in rows], MEASURES[measure], room=0.12)
    chart = Chart("Validation against memory", x, y, height=320)
    for row in reversed(rows):
        name, spread = row["recipe"], row[measure]
        there, colour = memory[name], colours[name]
        chart.whisker((there["mean"],) * 2, _ends(spread), colour)
        chart.whisker(_ends(there), (spread["mean"],) * 2, colour)
        tip = f"{name}: {number(spread)} {MEASURES[measure]}, {size(there['mean'])}"
        chart.dot(there["mean"], spread["mean"], colour, tip)
    places = [(memory[row["recipe"]]["mean"], row[measure]["mean"], row["recipe"]) for row in rows]
    chart.names([(x, y, "" if colours[name] == "frozen" else name, colours[name]) for x, y, name in places])
    return chart


def _losses(rows: list[dict[str, Any]], folder: Path, colours: dict[str, str]) -> Chart:
    curves = {row["recipe"]: _curve([RunDir(folder / run["run"]) for run in row["runs"]]) for row in rows}
    flops = max(float(x[-1]) for x, _ in curves.values())
    lows = min(float(y.min()) for _, y in curves.values())
    # The first steps fall from log V and would flatten all that follows: they may leave the picture at its top.
    top = max(float(np.quantile(y, 0.7)) for _, y in curves.values())
    room = (top - lows) or 1.0
    y_axis = Axis(lows - 0.06 * room, top + 0.25 * room, "training loss, nats per token")
    chart = Chart("Training against FLOPs", Axis(0.0, flops, "FLOPs"), y_axis, height=320)
    for row in reversed(rows):
        x, y = curves[row["recipe"]]
        chart.line(*thinned(x, y), colours[row["recipe"]], thick=1.6)
    named = [row["recipe"] for row in rows if colours[row["recipe"]] != "frozen"]
    for i, name in enumerate(named):
        height = y_axis.high - (y_axis.high - y_axis.low) * (0.04 + 0.055 * i)
        chart.words(0.97 * flops, height, name, anchor="end", kind="t-strong", fill=colours[name])
    return chart


def _curve(runs: list[RunDir]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """FLOPs and training loss, smoothed, the mean over runs of one recipe at the steps that all of them logged."""
    logged = [{line["step"]: line for line in run.read_metrics()} for run in runs]
    steps = sorted(set.intersection(*(set(lines) for lines in logged)))
    flops = np.array([logged[0][step]["flops"] for step in steps], dtype=float)
    losses = np.array([[lines[step]["loss"] for step in steps] for lines in logged], dtype=float)
    return flops, smoothed(losses.mean(axis=0), len(steps) / 25)
