"""``stackwise eval``: how well a trained run predicts text, or labels texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stackwise.cli.train import Json, Step, TrustPaths


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="F",
            help="What to score: text, .jsonl or .parquet, or labelled rows where RUN has learnt labels (default: the "
            "validation text or rows)",
        ),
    ] = None,
    step: Step = None,
    context_stride: Annotated[
        int | None,
        typer.Option(
            "--context-stride",
            metavar="N",
            min=1,
            help="clm: windows overlap and move by N tokens, so that each token is predicted from the longest context",
        ),
    ] = None,
    trust_paths: TrustPaths = False,
    as_json: Json = False,
) -> None:
    """Score RUN on its validation text or rows, or on others.

    Without --data, the text behind RUN's config must be the one that it was trained with.

    Bits per byte divide the nats of all predicted tokens by the bytes of the text; "given" counts tokens not predicted.
    Scores of labels come with the 95 % interval of a bootstrap; --json adds the confusion table and the surest
    mistakes.
    """
    from stackwise.cli.results import print_json
    from stackwise.evaluation.evaluate import evaluate_run
    from stackwise.training.progress import console_reporter

    reporter = console_reporter()
    try:
        scores = evaluate_run(run, data, step, reporter, trust_paths=trust_paths, context_stride=context_stride)
    finally:
        reporter.close()
    if as_json:
        print_json(scores, "LabelScores" if "metrics" in scores else "Evaluation")
    elif "metrics" in scores:
        _show_labels(scores)
    else:
        _show_text(scores)


def _show_text(scores: dict[str, Any]) -> None:
    """The scores of a text."""
    from stackwise.cli.results import table

    rows: list[list[str]] = []
    for name, value in scores.items():
        if name == "nelbo":
            rows += [[f"bound: {part}", _number(number)] for part, number in value.items()]
        elif name == "given":
            rows += [
                [f"given, not predicted: {part.replace('_', ' ')}", _number(number)] for part, number in value.items()
            ]
        elif name == "sources":
            rows += [
                [f"{part}: {key.replace('_', ' ')}", _number(number)]
                for part, numbers in value.items()
                for key, number in numbers.items()
                if key in ("loss", "bits_per_byte")
            ]
        elif name == "curve":
            rows += [[f"nats where {rate:.0%} is masked", _number(mean)] for rate, mean, _ in value]
        else:
            rows.append([name, _number(value)])
    table("", ("score", "value"), rows, stderr=False)


def _show_labels(scores: dict[str, Any]) -> None:
    """The scores of labels, and of classes the confusion table."""
    from stackwise.cli.results import table

    rows = [
        [name, *(_number(found[part]) for part in ("value", "low", "high"))]
        for name, found in scores["metrics"].items()
    ]
    if "majority" in scores:
        rows.append(["share of the commonest class", _number(scores["majority"]), "", ""])
    table(f"{scores['rows']:,} rows", ("score", "value", "low", "high"), rows, stderr=False)
    if "confusion" in scores:
        counts = [[name, *map(_number, line)] for name, line in zip(scores["classes"], scores["confusion"])]
        table("is … (row), taken for … (column)", ("", *scores["classes"]), counts, stderr=False)
    if scores["truncated"]:
        print(f"{scores['truncated']:,} rows were longer than training.seq_len and were cut")


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "–" if value is None else (f"{value:,}" if isinstance(value, int) else str(value))
