"""``stackwise generate``: text from a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stackwise.cli.train import Json


def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory")],
    prompt: Annotated[str, typer.Option("--prompt", help="Text to go on from (default: the start of a document)")] = "",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to generate at most")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same text")] = 0,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token")] = 0.8,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Draw among so many tokens")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", min=0.0, max=1.0, help="Draw among this much probability")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write text that goes on from a prompt, left to right."""
    from stackwise.cli.results import print_json
    from stackwise.generation.text import stream_text
    from stackwise.training.run import load

    loaded = load(run)
    pieces = stream_text(
        loaded.rack, loaded.tokenizer, loaded.config, prompt, tokens,
        seed=seed, temperature=temperature, top_k=top_k, top_p=top_p,
    )  # fmt: skip
    if as_json:
        print_json({"prompt": prompt, "seed": seed, "text": "".join(pieces)})
        return
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
