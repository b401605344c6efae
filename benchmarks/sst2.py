"""What masked pre-training that grows a tiny BERT is worth: fine-tuned on SST-2, against the same network from scratch.

    python benchmarks/sst2.py --text F… --train train.tsv --validation validation.tsv [--seeds 0 1] [--out runs/sst2]

It prints the commands that it runs, and runs none again whose run is there. The network from scratch is trained by the
config of the fine-tuned run without its initial weights, at several rates and for more epochs too, and the best of
these on the validation rows counts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parents[1] / "configs" / "tiny_bert.yaml"
SCRATCH = {"lr 1e-3": ("1e-3", 1), "lr 3e-3": ("3e-3", 1), "lr 1e-3, twice as long": ("1e-3", 2)}
"""Rates from scratch, and how many times the fine-tuned run's steps."""


def stackwise(*arguments: str) -> str:
    """The standard output of a command."""
    print("$ stackwise", shlex.join(arguments), flush=True)
    command = [sys.executable, "-m", "stackwise", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def trained(run: Path, *arguments: str) -> dict[str, Any]:
    """The summary of ``run``, which the command trains, or resumes, unless it is complete."""
    if (run / "config.yaml").exists():
        stackwise("resume", str(run))
    else:
        stackwise(*arguments, "--out", str(run))
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def accuracy(run: Path) -> dict[str, Any]:
    return json.loads(stackwise("eval", str(run), "--json"))["metrics"]["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("runs/sst2"))
    options = parser.parse_args()
    started, found = time.monotonic(), []
    for seed in options.seeds:
        folder = options.out / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        bert, tuned = folder / "bert", folder / "tuned"
        path = f"data.path={json.dumps(options.text)}"
        pre = trained(bert, "train", str(CONFIG), path, f"training.seed={seed}")
        labels = ["--train", options.train, "--validation", options.validation]
        trained(tuned, "finetune", str(bert), *labels, "--epochs", "4", "training.optimizer.lr=5e-4")
        steps = sum(phase["steps"] for phase in json.loads((tuned / "summary.json").read_text())["phases"])
        scratch = {}
        for name, (lr, times) in SCRATCH.items():
            run = folder / f"scratch-{lr}-{times}"
            changes = [f"training.optimizer.lr={lr}", f"training.max_steps={steps * times}", "model.initial=null"]
            trained(run, "train", str(tuned / "config.yaml"), *changes)
            scratch[name] = accuracy(run)["value"]
        found.append(
            {
                "seed": seed,
                "masked_loss": [phase["validation_loss"] for phase in pre["phases"]],
                "fine_tuned": accuracy(tuned),
                "scratch": scratch,
            }
        )
        print(json.dumps(found[-1], indent=1), flush=True)
    gains = [run["fine_tuned"]["value"] - max(run["scratch"].values()) for run in found]
    print(json.dumps({"gains": gains, "seconds": time.monotonic() - started, "seeds": found}))


if __name__ == "__main__":
    main()
