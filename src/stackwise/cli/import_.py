"""``stackwise import``: a Hugging Face folder as a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from stackwise.cli.train import Json
from stackwise.signals import stoppable
from stackwise.units import count


def import_(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Hugging Face folder: config.json, safetensors, tokenizer")
    ],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory; must be new")],
    stacks: Annotated[int, typer.Option("--stacks", min=1, help="Stacks to split the layers into")] = 1,
    as_json: Json = False,
) -> None:
    """Import a pretrained model as RUN, ready to evaluate, generate from, and grow (train --from RUN).

    Llama, Qwen3, GPT-2, ModernBERT and DeepSeek-V3 without experts.
    """
    from stackwise.cli.results import print_json
    from stackwise.interop.importing import import_folder

    with stoppable():
        result = import_folder(folder, run, stacks)
    if as_json:
        print_json(result, "Imported")
        return
    print(
        f"{run}: {result['family']}, {result['parameters']:,} parameters, {count(result['blocks'], 'Block')} in "
        f"{count(result['stacks'], 'Stack')}\ngrow it with  stackwise train CONFIG --from {run} --out RUN",
        file=sys.stderr,
    )
