"""``stackwise demo``: the main job on text that every machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stackwise.cli.train import Json


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Run directory; a demo that was stopped there is continued")
    ] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Grow a small model on Python's own library sources: about three minutes on two cores."""
    from rich.console import Console

    from stackwise.cli.results import print_json, show_summary
    from stackwise.config.template import preset_config
    from stackwise.evaluation.evaluate import evaluate_run
    from stackwise.generation.text import stream_text
    from stackwise.runs.run import load, resume_run, train_run
    from stackwise.training.progress import SilentReporter, console_reporter

    config = preset_config("demo")
    going_on = (out / "config.yaml").exists()
    summary = resume_run(out, console_reporter()) if going_on else train_run(config, out, console_reporter())
    scores = evaluate_run(out, None, None, SilentReporter())
    loaded = load(out)
    sample = "".join(stream_text(loaded.rack, loaded.tokenizer, loaded.config, "def ", 160, seed=1, temperature=0.7))
    if as_json:
        print_json({**summary, "evaluation": scores, "sample": sample}, "Demo")
        return
    show_summary(summary, out, False)
    console = Console(stderr=True)
    steps = " → ".join(f"{p['bits_per_byte']:.3f}" for p in summary["phases"])
    console.print(
        f"\nbits per byte of the validation text, phase by phase: {steps}\n"
        f"of the same tokens: unigram entropy {scores['unigram_bits_per_byte']:.3f}, "
        f"bigram entropy {scores['bigram_bits_per_byte']:.3f}\n\na sample:\n",
        highlight=False,
        soft_wrap=True,
    )
    print("def " + sample)
