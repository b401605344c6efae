"""``stackwise finetune``: a run trained further on labelled texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from stackwise.cli.train import Json, Overrides


def finetune(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run to start from")],
    train: Annotated[
        list[Path], typer.Option("--train", metavar="F", help="Training rows: .tsv, .csv, .jsonl or .parquet")
    ],
    overrides: Overrides = None,
    validation: Annotated[
        list[Path] | None,
        typer.Option("--validation", metavar="F", help="Validation rows (default: a tenth of the training rows)"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Run directory; must be new")] = Path("runs/finetuned"),
    objective: Annotated[
        Literal["classification", "regression"],
        typer.Option("--objective", help="What a label is: classification: a class; regression: a number"),
    ] = "classification",
    trunk: Annotated[
        Literal["trainable", "lora", "frozen"],
        typer.Option("--trunk", help="What trains below the head: trainable: all; lora: adapters; frozen: nothing"),
    ] = "trainable",
    epochs: Annotated[float, typer.Option("--epochs", min=0.0, help="Passes over the training rows")] = 3.0,
    as_json: Json = False,
) -> None:
    """Train RUN further on texts, or pairs of texts, that have a class or a number each, into a new run directory.

    The columns of the GLUE tasks are known; name others with data.columns.text=NAME, data.columns.pair=NAME and
    data.columns.label=NAME. stackwise eval scores the new run; its config.yaml has all settings.
    """
    from stackwise.cli.results import show_summary
    from stackwise.runs.finetune import finetune_config
    from stackwise.runs.run import train_run
    from stackwise.training.progress import console_reporter

    reporter = console_reporter()
    config = finetune_config(
        run, train, validation or [], objective=objective, trunk=trunk, epochs=epochs, overrides=overrides or [],
        reporter=reporter,
    )  # fmt: skip
    show_summary(train_run(config, out, reporter), out, as_json)
