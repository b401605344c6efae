"""``stackwise compare``: recipes at equal FLOPs, side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from stackwise.cli.train import ConfigFile, From, Json, Overrides, read_config


def compare(
    config: ConfigFile,
    overrides: Overrides = None,
    recipes: Annotated[
        str, typer.Option("--recipes", metavar="A,B,…", help="Names from `stackwise recipes`, or all")
    ] = "all",
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", min=1, help="Runs of each recipe, from training.seed on")
    ] = 1,
    jobs: Annotated[
        int, typer.Option("--jobs", metavar="N", min=1, help="Runs at the same time, which share the processors")
    ] = 1,
    out: Annotated[Path, typer.Option("--out", help="Folder that receives a run directory for each run")] = Path(
        "runs/compare"
    ),
    start: From = None,
    as_json: Json = False,
) -> None:
    """Train CONFIG by several recipes at equal true FLOPs and show the results side by side.

    Runs that are complete are kept and others go on, so the same command continues a comparison that was stopped. The
    folder then also holds compare.json, compare.csv and compare.svg.
    """
    settings = read_config(config, overrides, start)
    from stackwise.cli.results import print_json
    from stackwise.growth.recipes import recipe_names
    from stackwise.report.comparison import write_files
    from stackwise.runs.compare import compare_recipes

    result = compare_recipes(settings, recipe_names(recipes), out, seeds, jobs)
    write_files(result, out)
    if as_json:
        print_json(result, "Compared")
        return
    _show(result)
    print(f"in {out}: compare.json, compare.csv, compare.svg", file=sys.stderr)


def _show(result: dict[str, Any]) -> None:
    """Two tables that 80 columns hold, what did not fall, and the verdict."""
    from stackwise.cli.results import table
    from stackwise.report.comparison import kinds_table, summary_table

    for header, rows in (summary_table(result), kinds_table(result)):
        table("", header, rows, stderr=False)
        print()
    recipes = result["recipes"]
    for row in recipes:
        for run in row["runs"]:
            if risen := [phase["name"] for phase in run["phases"] if not phase["fell"]]:
                print(f"{row['recipe']}, seed {run['seed']}: the validation loss did not fall in {', '.join(risen)}")
    if all(phase["fell"] for row in recipes for run in row["runs"] for phase in run["phases"]):
        print("every phase fell: each ends with a validation loss below the one before it")
    print(result["verdict"])
