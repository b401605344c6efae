"""nanoGPT's CPU setting on Shakespeare: end to end against grown, at equal true FLOPs.

    python benchmarks/shakespeare.py shakespeare.txt [--seeds 3] [--out runs/shakespeare]

Runs ``configs/shakespeare_char.yaml`` and ``configs/shakespeare_char_grown.yaml`` with each seed, two processes of one
thread each at a time, and prints the loss on the last tenth of the text. Finished runs in the folder are not repeated.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import torch

CONFIGS = {
    name: Path(__file__).parents[1] / "configs" / f"{file}.yaml"
    for name, file in (("end-to-end", "shakespeare_char"), ("grown", "shakespeare_char_grown"))
}


def run(name: str, seed: int, text: Path, out: Path) -> dict[str, object]:
    """The summary of one run, trained or gone on with as needed."""
    folder = out / f"{name}-{seed}"
    if (folder / "config.yaml").exists():
        command = ["resume", str(folder)]
    else:
        command = ["train", str(CONFIGS[name]), f"data.path={text}", f"training.seed={seed}", "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "stackwise", *command, "--json"], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/shakespeare"))
    options = parser.parse_args()
    jobs = [(name, seed) for seed in range(options.seeds) for name in CONFIGS]
    with ThreadPoolExecutor(2) as pool:
        summaries = list(pool.map(lambda job: run(*job, options.text.resolve(), options.out), jobs))
    print(f"{'':12}{'seed':>6}{'loss':>10}{'FLOPs':>12}{'tokens':>12}{'seconds':>10}")
    losses: dict[str, list[float]] = {name: [] for name in CONFIGS}
    for (name, seed), summary in zip(jobs, summaries):
        losses[name].append(summary["validation"]["loss"])
        print(
            f"{name:12}{seed:6}{summary['validation']['loss']:10.4f}{summary['flops']:12.4g}"
            f"{summary['tokens']:12,}{summary['wall_seconds']:10.0f}"
        )
    means = {name: mean(values) for name, values in losses.items()}
    for name, value in means.items():
        print(f"{name:12}{'mean':>6}{value:10.4f}")
    print(
        json.dumps(
            {
                "losses": losses,
                "means": means,
                "flops": {name: s["flops"] for (name, _), s in zip(jobs, summaries)},
                "platform": platform.platform(),
                "python": platform.python_version(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
