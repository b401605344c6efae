"""How results look: a table for people on stderr, JSON for machines on stdout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from stackwise.units import size


def table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    stderr: bool = True,
    first_to_go: Sequence[str] = (),
) -> None:
    """Prints a table; the first column is left-aligned and may wrap, the others are right-aligned and are never cut.

    Args:
        first_to_go: columns that a narrow terminal leaves out, in this order, until the others fit.
    """
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = 220  # a pipe has no width to fit
    left_out: list[str] = []
    for name in first_to_go:
        if _width(header, rows, left_out) <= console.width:
            break
        left_out.append(name)
    kept = [i for i, name in enumerate(header) if name not in left_out]
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i in kept:
        grid.add_column(header[i], justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for row in rows:
        grid.add_row(*(row[i] for i in kept))
    console.print(grid, highlight=False)
    if left_out:
        text = f"(a wider terminal shows {', '.join(sorted(left_out, key=header.index))} too)"
        console.print(text, highlight=False, style="dim")


def _width(header: Sequence[str], rows: Sequence[Sequence[str]], left_out: Sequence[str]) -> int:
    """Characters of a line that holds all columns but those that are left out."""
    columns = [i for i, name in enumerate(header) if name not in left_out]
    return sum(2 + max(cell_len(row[i]) for row in (header, *rows)) for i in columns) - 2


def print_json(value: Any, record: str) -> None:
    """Prints the ``record`` of this name in ``stackwise.outputs``, or a list of them; tests hold ``value`` to it."""
    print(json.dumps(value, indent=2))


def bound(loss: float, nelbo: dict[str, Any] | None) -> str:
    """A loss as a number, or as the bound that it is."""
    if nelbo is None:
        return f"{loss:.4f}"
    error = nelbo["standard_error"]
    return f"≤ {loss:.4f}" + ("" if error is None else f" ± {error:.4f}")


def show_summary(summary: dict[str, Any], run: Path, as_json: bool) -> None:
    """The end of a run."""
    if as_json:
        print_json(summary, "Summary")
        return
    several = len({p.get("objective") for p in summary["phases"]}) > 1
    rows = [
        [
            f"{p['name']}, {p['objective']}" if several else p["name"],
            f"{p['steps']:,}",
            f"{p['trainable_parameters']:,}",
            f"{p['flops']:.3g}",
            size(p["peak_memory_bytes"]),
            f"{p['seconds']:.0f} s",
            f"{p['first_loss']:.4f}",
            f"{p['last_loss']:.4f}",
            "–" if p["validation_loss"] is None else f"{p['validation_loss']:.4f}",
            "–" if p["bits_per_byte"] is None else f"{p['bits_per_byte']:.4f}",
        ]
        for p in summary["phases"]
    ]
    header = (
        "phase", "steps", "trains", "FLOPs", "peak memory", "time",
        "first loss", "last loss", "validation", "bits/byte",
    )  # fmt: skip
    first = ("trains", "FLOPs", "first loss", "last loss", "time", "peak memory", "steps")
    table("", header, rows, first_to_go=first)
    console = Console(stderr=True)
    for p in summary["phases"]:
        if p["stopped_early"] is not None:
            ends = "the run" if p["stopped_early"] == "run" else "the phase"
            console.print(f"{p['name']}: validations ended {ends} early, after {p['steps']:,} steps", highlight=False)
    if (best := summary["best"]) is not None:
        console.print(
            f"lowest validation loss {best['validation_loss']:.4f} at step {best['step']}: --step best takes it",
            highlight=False,
        )
    if (validation := summary["validation"]) is None:
        console.print(f"no validation data was given; the run is in {run}", highlight=False, soft_wrap=True)
        return
    if validation["perplexity"] is None:
        console.print(
            f"validation: mean squared error {validation['loss']:.4f}\nin {run}: try  stackwise eval {run}",
            highlight=False,
            soft_wrap=True,
        )
        return
    per_byte = "" if validation["bits_per_byte"] is None else f", {validation['bits_per_byte']:.4f} bits per byte"
    console.print(
        f"validation loss {bound(validation['loss'], summary.get('nelbo'))} nats per token, "
        f"perplexity {validation['perplexity']:.2f}{per_byte}\n"
        f"in {run}: try  stackwise generate {run}  or  stackwise eval {run}",
        highlight=False,
        soft_wrap=True,
    )
