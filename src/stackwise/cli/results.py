"""How results look: a table for people on stderr, JSON for machines on stdout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stackwise.units import size


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, stderr: bool = True) -> None:
    """Prints a table; the first column is left-aligned, the others right."""
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = 220  # a pipe has no width to fit
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(header):
        grid.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        grid.add_row(*row)
    console.print(grid, highlight=False)


def print_json(value: Any) -> None:
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
        print_json(summary)
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
    table("", header, rows)
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
    per_byte = "" if validation["bits_per_byte"] is None else f", {validation['bits_per_byte']:.4f} bits per byte"
    console.print(
        f"validation loss {bound(validation['loss'], summary.get('nelbo'))} nats per token, "
        f"perplexity {validation['perplexity']:.2f}{per_byte}\n"
        f"in {run}: try  stackwise generate {run}  or  stackwise eval {run}",
        highlight=False,
        soft_wrap=True,
    )
