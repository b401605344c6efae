"""``stackwise embed``: texts as vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from stackwise.cli.train import Step


def embed(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory")],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="F",
            help="Texts: the rows of a .tsv, .csv, .jsonl or .parquet, or the lines of any other file",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="F", help="Where to write: .npy, .parquet or .jsonl")],
    column: Annotated[
        str | None, typer.Option("--column", metavar="NAME", help="Column of the text (default: a known one)")
    ] = None,
    pooling: Annotated[
        Literal["mean", "last"], typer.Option("--pooling", help="mean: over all tokens; last: the last token")
    ] = "mean",
    step: Step = None,
) -> None:
    """Write a vector for each text: what the head of RUN reads of it.

    .npy holds a matrix (texts, width) of 32-bit floats in the order of the texts; .parquet and .jsonl hold each text
    with its vector.
    """
    from stackwise.evaluation.embed import embed_rows
    from stackwise.evaluation.vectors import check_place, texts_in, write_vectors
    from stackwise.runs.run import load
    from stackwise.training.progress import console_reporter

    check_place(out)
    reporter = console_reporter()
    try:
        rows = texts_in(data, column)
        vectors, cut = embed_rows(
            rows, load(run, step), pooling, lambda done, total: reporter.work("embedding", done, total)
        )
        write_vectors(out, rows, vectors)
        reporter.note(f"{len(rows):,} vectors of {vectors.shape[1]:,} numbers are in {out}")
        if cut:
            reporter.note(f"{cut:,} texts were longer than training.seq_len and were cut")
    finally:
        reporter.close()
