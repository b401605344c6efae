"""``stackwise join``: experts that were trained apart, as one run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from stackwise.cli.train import Json
from stackwise.signals import stoppable


def join(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN…", help="The run of expert 0, then the runs of the other experts, each trained from it"
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Run directory; must be new")],
    as_json: Json = False,
) -> None:
    """Join experts that were trained in separate processes (training.diffusion.expert) into one run."""
    from stackwise.cli.results import print_json
    from stackwise.runs.join import join_runs

    with stoppable():
        result = join_runs(runs, out)
    if as_json:
        print_json(result, "Joined")
        return
    print(f"{out}: {result['stacks']} Stacks, {result['parameters']:,} parameters", file=sys.stderr)
