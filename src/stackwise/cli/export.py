"""``stackwise export``: a run as a Hugging Face folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from stackwise.cli.train import Json, Step
from stackwise.signals import stoppable


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; must be new or empty")],
    step: Step = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Longest sequence to declare (default: training.seq_len)"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write RUN as a folder that transformers loads: model, tokenizer and, where needed, the model's source."""
    from stackwise.cli.results import print_json
    from stackwise.interop.export import export_run

    with stoppable():
        result = export_run(run, folder, step, max_tokens)
    if as_json:
        print_json(result, "Exported")
        return
    remote = ", trust_remote_code=True" if result["remote_code"] else ""
    kind = "its own source, as no class of transformers equals it" if remote else "exactly equal"
    print(f"{folder}: {result['architecture']} ({kind}), {result['parameters']:,} parameters", file=sys.stderr)
    print(f'load it with  transformers.{result["auto_class"]}.from_pretrained("{folder}"{remote})', file=sys.stderr)
