"""``stackwise train``: a run from a config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stackwise.config.base import StackWiseConfig

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config (stackwise init writes one)")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Settings to change")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout")]


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="Run directory; must be new")] = Path("runs/train"),
    as_json: Json = False,
) -> None:
    """Train a model as CONFIG says, into a new run directory."""
    settings = StackWiseConfig.from_yaml(config, overrides or ())
    from stackwise.cli.results import show_summary
    from stackwise.training.progress import console_reporter
    from stackwise.training.run import train_run

    show_summary(train_run(settings, out, console_reporter()), out, as_json)
