"""``stackwise train``: a run from a config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stackwise.errors import UserError
from stackwise.units import is_decimal, parse_bytes, parse_seconds

if TYPE_CHECKING:
    from stackwise.config.base import StackWiseConfig

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config (stackwise init writes one)")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Settings to change")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout")]
TrustPaths = Annotated[
    bool,
    typer.Option(
        "--trust-paths", help="Use paths outside RUN that RUN's config names, even if RUN comes from elsewhere"
    ),
]
From = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="RUN[@STEP]",
        help="Start from the model of this run (of its newest checkpoint, of that of STEP, or of RUN@best), and its "
        "tokenizer unless CONFIG names another",
    ),
]


def read_step(text: str) -> int | Literal["best"]:
    """The value of --step."""
    if text == "best":
        return "best"
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise typer.BadParameter(f"{text!r} is neither the number of a step nor best")
    return int(text)


Step = Annotated[
    Any,
    typer.Option(
        "--step", parser=read_step, metavar="STEP",
        help="Checkpoint of this step, or best: of the lowest validation loss (default: the newest)",
    ),
]  # fmt: skip

Extend = Annotated[
    str | None,
    typer.Option("--extend", metavar="RUN[@STEP]", help="Go on with a copy of this run, with the settings that follow"),
]


def _recipes() -> list[str]:
    from stackwise.growth.recipes import RECIPES

    return list(RECIPES)


RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="Train by this recipe (stackwise recipes lists them)",
        autocompletion=_recipes,
    ),
]


def read_config(
    path: Path, overrides: list[str] | None, start: Path | None, recipe: str | None = None
) -> StackWiseConfig:
    """CONFIG by a recipe, with its overrides, and what it takes from the run it starts from."""
    from stackwise.config.base import StackWiseConfig, apply_overrides, read_yaml

    overrides = overrides or []
    if start is not None:
        from stackwise.runs.initial import settings_from_run

        settings = settings_from_run(path, start)
    else:
        settings = read_yaml(path)
    if recipe is not None:
        from stackwise.growth.recipes import with_recipe

        # Overrides before the recipe, which looks at the objective, and after it, where they have the last word. What
        # comes out is checked once: an override need not fit the curriculum that the recipe replaces.
        settings = with_recipe(apply_overrides(settings, overrides), recipe)
    return StackWiseConfig.from_dict(settings, overrides, str(path))


Memory = Annotated[
    str | None, typer.Option("--memory", help="Memory of the device, for example 24GiB (default: the device's own)")
]
Time = Annotated[str | None, typer.Option("--time", help="Time that the run may take, for example 8h or 30min")]


def train(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="YAML config (stackwise init writes one); none with --extend"),
    ] = None,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="Run directory; must be new")] = Path("runs/train"),
    start: From = None,
    extend: Extend = None,
    recipe: RecipeName = None,
    memory: Memory = None,
    time: Time = None,
    trust_paths: TrustPaths = False,
    as_json: Json = False,
) -> None:
    """Train a model as CONFIG says, into a new run directory.

    The run is planned first. One that does not fit the memory or the time is refused, with settings that do.

    --from begins a new run: its own phases, steps from 1 on, the weights of another run. --extend goes on with a copy
    of a run, its weights, moments, counters and place in the data, as resume RUN KEY=VALUE would: train --extend RUN
    training.max_steps=2000 --out RUN2. Phases that are over stay as they are, those that are left share the rest of
    the budget, and of a complete run the last phase goes on. The rate is that of the longer schedule at that step: to
    extend without a jump what has decayed, take RUN@STEP from before its decay.
    """
    from stackwise.cli.results import show_summary
    from stackwise.training.progress import console_reporter

    limited = None if memory is None else parse_bytes(memory)
    seconds = None if time is None else parse_seconds(time)
    if extend is not None:
        from stackwise.runs.extend import extend_run

        for option, given in (("--from", start), ("--recipe", recipe), ("--memory", memory), ("--time", time)):
            if given is not None:
                raise UserError(f"--extend cannot be combined with {option}")
        changes = [*([] if config is None else [config]), *(overrides or [])]
        summary = extend_run(extend, out, changes, console_reporter(), trust_paths=trust_paths)
    else:
        from stackwise.runs.limits import Limits
        from stackwise.runs.run import train_run

        if config is None:
            raise UserError("CONFIG is missing: the YAML file that says what to train (stackwise init writes one)")
        limits = Limits(limited, seconds, decimal=memory is not None and is_decimal(memory))
        settings = read_config(Path(config), overrides, start, recipe)
        summary = train_run(settings, out, console_reporter(), limits=limits)
    show_summary(summary, out, as_json)
