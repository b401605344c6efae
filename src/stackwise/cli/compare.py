"""``stackwise compare``: recipes at equal FLOPs, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stackwise.cli.train import ConfigFile, From, Json, Overrides, read_config
from stackwise.units import size


def compare(
    config: ConfigFile,
    overrides: Overrides = None,
    recipes: Annotated[
        str, typer.Option("--recipes", metavar="A,B,…", help="Names from `stackwise recipes`, or all")
    ] = "all",
    out: Annotated[Path, typer.Option("--out", help="Folder that receives a run directory for each recipe")] = Path(
        "runs/compare"
    ),
    start: From = None,
    as_json: Json = False,
) -> None:
    """Train CONFIG by several recipes at equal true FLOPs and show the results side by side."""
    settings = read_config(config, overrides, start)
    from stackwise.cli.results import bound, print_json, table
    from stackwise.growth.recipes import recipe_names
    from stackwise.runs.compare import compare_recipes

    rows = compare_recipes(settings, recipe_names(recipes), out)
    if as_json:
        print_json(rows, "Compared")
        return
    table(
        "",
        ("recipe", "phases", "validation", "bits/byte", "FLOPs", "peak memory", "time", "every phase fell"),
        [
            [
                row["recipe"],
                str(len(row["phases"])),
                bound(row["validation"]["loss"], row.get("nelbo")),
                "–" if row["validation"]["bits_per_byte"] is None else f"{row['validation']['bits_per_byte']:.4f}",
                f"{row['flops']:.4g}",
                size(row["peak_memory_bytes"]),
                f"{row['wall_seconds']:.0f} s",
                "yes" if all(phase["fell"] for phase in row["phases"]) else _not_fallen(row["phases"]),
            ]
            for row in sorted(rows, key=lambda row: row["validation"]["loss"])
        ],
        stderr=False,
        first_to_go=("phases", "every phase fell", "FLOPs", "time", "validation"),
    )


def _not_fallen(phases: list[dict[str, object]]) -> str:
    return "no: " + ", ".join(str(phase["name"]) for phase in phases if not phase["fell"])
