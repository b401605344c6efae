"""``stackwise eval``: how well a trained run predicts text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stackwise.cli.train import Json, Step, TrustPaths


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory")],
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="F", help="Text, .jsonl or .parquet to score (default: the validation text)"),
    ] = None,
    step: Step = None,
    trust_paths: TrustPaths = False,
    as_json: Json = False,
) -> None:
    """Score RUN on its validation text, or on other text.

    Without --data, the text behind RUN's config must be the one that it was trained with.

    Bits per byte divide the nats of all predicted tokens by the bytes of the text; "given" counts tokens not predicted.
    """
    from stackwise.cli.results import print_json, table
    from stackwise.evaluation.evaluate import evaluate_run
    from stackwise.training.progress import console_reporter

    reporter = console_reporter()
    try:
        scores = evaluate_run(run, data, step, reporter, trust_paths=trust_paths)
    finally:
        reporter.close()
    if as_json:
        print_json(scores, "Evaluation")
        return
    rows: list[list[str]] = []
    for name, value in scores.items():
        if name == "nelbo":
            rows += [[f"bound: {part}", _number(number)] for part, number in value.items()]
        elif name == "given":
            rows += [
                [f"given, not predicted: {part.replace('_', ' ')}", _number(number)] for part, number in value.items()
            ]
        elif name == "curve":
            rows += [[f"nats where {rate:.0%} is masked", _number(mean)] for rate, mean, _ in value]
        else:
            rows.append([name, _number(value)])
    table("", ("score", "value"), rows, stderr=False)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "–" if value is None else (f"{value:,}" if isinstance(value, int) else str(value))
