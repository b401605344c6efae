"""``stackwise generate``: text from a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stackwise.cli.train import Json


def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="Text to go on from (default: the start of a document); repeat it for several"),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to generate at most, for each prompt")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same text")] = 0,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token")] = 0.8,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Draw among so many tokens")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", min=0.0, max=1.0, help="Draw among this much probability")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option("--min-p", min=0.0, max=1.0, help="Leave out tokens less likely than this times the likeliest"),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; repeat it for several")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write text that goes on from a prompt, left to right."""
    from stackwise.cli.results import print_json
    from stackwise.generation.sampling import row_seeds
    from stackwise.generation.text import stream_texts
    from stackwise.training.run import load

    loaded = load(run)
    prompts = prompt or [""]
    seeds = row_seeds(seed, len(prompts))
    steps = stream_texts(
        loaded.rack, loaded.tokenizer, loaded.config, prompts, tokens, seed=seeds, stop=stop or (),
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    if len(prompts) == 1 and not as_json:
        print(prompts[0], end="", flush=True)
        for (piece,) in steps:
            print(piece, end="", flush=True)
        print()
        return
    texts = ["".join(pieces) for pieces in zip(*steps)]
    results = [{"prompt": p, "seed": s, "text": text} for p, s, text in zip(prompts, seeds, texts, strict=True)]
    if as_json:
        print_json(results if len(results) > 1 else results[0])
        return
    print("\n\n".join(f"{p}\n{text}" for p, text in zip(prompts, texts)))
