"""Measured peak memory of training against what ``plan`` says, each run in a process of its own.

    python benchmarks/memory.py [--d-model 512] [--json]

Eight one-Block Stacks in fp32: end to end, end to end with activation checkpointing, and append with a frozen and with
a trainable trunk. Measured is the resident peak above what the process held before the model was built.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

SETTINGS = [
    "model.architecture={n_stacks: 8, blocks_per_stack: 1}",
    "training.batch_size=8",
    "training.seq_len=256",
    "training.max_steps=24",
    "training.evaluation.max_tokens=256",
    "data.source=files",
    "data.tokenizer.kind=bytes",
]
RECIPES = {
    "end-to-end": ["training.strategy=end_to_end", "training.max_steps=3"],
    "end-to-end, checkpointed": [
        "training.strategy=end_to_end",
        "training.max_steps=3",
        "training.activation_checkpointing=true",
    ],
    "append, frozen trunk": ["training.progressive.trunk_strategy=frozen"],
    "append, trainable trunk": ["training.progressive.trunk_strategy=trainable"],
}


def run(recipe: str, d_model: int) -> dict[str, object]:
    """Trains in this process; bytes measured and planned, by phase."""
    from stackwise.config import StackWiseConfig
    from stackwise.planning.plan import plan_run
    from stackwise.training.progress import SilentReporter
    from stackwise.training.run import train_run

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("".join(random.Random(0).choices("abcdefgh \n", k=300_000)))
        config = StackWiseConfig.from_dict({"model": {"d_model": d_model, "n_heads": max(1, d_model // 64)}})
        config = config.override([*SETTINGS, f"data.path={text}", f"data.cache_dir={folder}", *RECIPES[recipe]])
        plan = plan_run(config, Path(folder))
        summary = train_run(config, Path(folder, "run"), SilentReporter())
    return {
        "recipe": recipe,
        "measured": [phase["peak_memory_bytes"] for phase in summary["phases"]],
        "planned": [cost.peak for cost in plan.costs],
        "seconds": [round(phase["seconds"], 1) for phase in summary["phases"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--recipe", choices=sorted(RECIPES), help="run one, in this process, and print JSON")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.recipe:
        print(json.dumps(run(options.recipe, options.d_model)))
        return
    rows = []
    for recipe in RECIPES:
        command = [sys.executable, __file__, "--recipe", recipe, "--d-model", str(options.d_model)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    base = max(rows[0]["measured"])
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{'recipe':26}{'measured MiB':>14}{'planned MiB':>14}{'plan/measured':>15}{'of end-to-end':>15}")
    for row in rows:
        measured, planned = max(row["measured"]), max(row["planned"])
        print(
            f"{row['recipe']:26}{measured / 2**20:14.0f}{planned / 2**20:14.0f}"
            f"{planned / measured:15.3f}{measured / base:15.3f}"
        )


if __name__ == "__main__":
    main()
