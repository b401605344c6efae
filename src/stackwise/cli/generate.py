"""``stackwise generate``: text from a trained run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from stackwise.cli.train import Json, Step
from stackwise.errors import UserError
from stackwise.kinds import OBJECTIVES, samplers

_Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory")]
_Prompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="Text to continue (default: the start of a document); may be repeated"),
]
_Tokens = Annotated[
    int, typer.Option("--tokens", min=1, max=1 << 24, help="Largest number of tokens to generate for each prompt")
]
_Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same text")]
_Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token")]
_TopK = Annotated[
    int | None, typer.Option("--top-k", min=1, max=1 << 24, help="clm: sample from this many of the likeliest tokens")
]
_TopP = Annotated[
    float | None,
    typer.Option("--top-p", min=0.0, max=1.0, help="Sample from the likeliest tokens that make up this probability"),
]
_MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p", min=0.0, max=1.0, help="clm: leave out tokens less likely than this share of the likeliest"
    ),
]
_Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="clm: stop before this text; may be repeated"),
]
_Template = Annotated[
    str | None,
    typer.Option(
        "--template", metavar="TEXT", help="mlm, diffusion: text whose gaps are filled; {20} is a gap of 20 tokens"
    ),
]
_Order = Annotated[
    str | None,
    typer.Option(
        "--order",
        help="mlm, diffusion: ancestral, first_hitting, confidence, margin, entropy or threshold (default: ancestral; "
        "in blocks first_hitting; of mlm confidence)",
    ),
]
_Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=1,
        help="mlm, diffusion: number of steps (default: one for each token); with time_interpretation depth, of each "
        "Stack",
    ),
]
_Threshold = Annotated[
    float | None,
    typer.Option(
        "--threshold", help="diffusion, order threshold: fill every gap whose likeliest token has this probability"
    ),
]
_Guidance = Annotated[
    float, typer.Option("--guidance", min=0.0, help="diffusion: strength of the guidance towards the given text")
]
_Show = Annotated[bool, typer.Option("--show", help="mlm, diffusion: show the text as it appears, on stderr")]


def generate(
    run: _Run,
    prompt: _Prompt = None,
    tokens: _Tokens = 200,
    seed: _Seed = 0,
    temperature: _Temperature = 0.8,
    top_k: _TopK = None,
    top_p: _TopP = None,
    min_p: _MinP = None,
    stop: _Stop = None,
    template: _Template = None,
    order: _Order = None,
    steps: _Steps = None,
    threshold: _Threshold = None,
    guidance: _Guidance = 0.0,
    show: _Show = False,
    step: Step = None,
    as_json: Json = False,
) -> None:
    """Generate text: continue a prompt, or fill gaps (mlm, diffusion)."""
    from stackwise.cli.results import print_json
    from stackwise.generation.sampling import row_seeds
    from stackwise.generation.text import stream_texts
    from stackwise.runs.run import load

    loaded = load(run, step)
    if template is not None and prompt:
        raise UserError("--template and --prompt are both given; put the prompt at the start of the template")
    prompts = prompt or [""]
    seeds = row_seeds(seed, len(prompts))
    _refuse_unread(
        loaded.config.training.objective,
        continuation={"--top-k": top_k, "--min-p": min_p, "--stop": stop},
        filling={
            "--template": template, "--order": order, "--steps": steps, "--threshold": threshold,
            "--guidance": guidance or None, "--show": show or None,
        },
    )  # fmt: skip
    filled = OBJECTIVES[loaded.config.training.objective].sampler == "filling"
    if filled:
        texts = _filled(
            loaded, prompts, tokens, template, show, seeds,
            order=order, steps=steps, threshold=threshold, guidance=guidance, temperature=temperature, top_p=top_p,
        )  # fmt: skip
        if template is not None:
            prompts = [template]
    else:
        pieces = stream_texts(
            loaded.rack, loaded.tokenizer, loaded.config, prompts, tokens, seed=seeds, stop=stop or (),
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        )  # fmt: skip
        if len(prompts) == 1 and not as_json:
            _print_as_written(prompts[0], pieces)
            return
        texts = ["".join(parts) for parts in zip(*pieces)]
    if as_json:
        results = [{"prompt": p, "seed": s, "text": text} for p, s, text in zip(prompts, seeds, texts, strict=True)]
        print_json(results if len(results) > 1 else results[0], "Generated")
        return
    print("\n\n".join(texts if filled else [f"{p}\n{text}" for p, text in zip(prompts, texts)]))


def _refuse_unread(objective: str, **of_sampler: dict[str, Any]) -> None:
    """Refuses options that only another sampler than the objective's uses, by name; None: not given."""
    for sampler, options in of_sampler.items():
        for option, value in options.items():
            if value is not None and sampler != OBJECTIVES[objective].sampler:
                readers = " and ".join(samplers(sampler))
                raise UserError(
                    f"{option} is only used for runs trained with {readers} (this run was trained with {objective})"
                )


def _print_as_written(prompt: str, pieces: Iterable[list[str]]) -> None:
    print(prompt, end="", flush=True)
    for (piece,) in pieces:
        print(piece, end="", flush=True)
    print()


def _filled(
    loaded: Any, prompts: list[str], n_tokens: int, template: str | None, show: bool, seeds: list[int],
    **options: Any,
) -> list[str]:  # fmt: skip
    """The whole texts, prompts included; prompts of unequal length one after another."""
    from stackwise.generation.filling import fill_texts, starting_ids

    texts = []
    for text, seed in zip(prompts, seeds):
        start = starting_ids(loaded.tokenizer, text, n_tokens, template)
        states = fill_texts(loaded.rack, loaded.tokenizer, loaded.config, [start], seed=seed, **options)
        for state in _shown(states) if show else states:
            last = state[0]
        texts.append(last)
    return texts


def _shown(states: Iterator[list[str]]) -> Iterator[list[str]]:
    """Shows each state: in one place where that is a terminal, else as lines."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)
    if not console.is_terminal:
        for state in states:
            console.print(Text(state[0]), soft_wrap=True)
            yield state
        return
    with Live(console=console, transient=True, refresh_per_second=20) as live:
        for state in states:
            live.update(Text(state[0]))
            yield state
