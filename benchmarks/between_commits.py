"""Speed of this tree against another commit: tokens per second of training, and the time that ``--help`` takes.

    python benchmarks/between_commits.py COMMIT [--pairs 8] [--steps 400]

Both train the same small models on the same text through ``stackwise train``, one run after the other in turns, on one
thread; which of the two begins changes from pair to pair. A run's figure is the median of ``tokens_per_second`` in its
``metrics.jsonl``, the first record left out. ``ratio`` is the median over pairs of this tree's figure over the commit's
(above 1: this tree is faster); for the help it is the commit's seconds over this tree's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reference_runs import machine

ROOT = Path(__file__).parents[1]
COMMON = {
    "training.logging.every_steps": 20, "training.device": "cpu", "training.progressive.target_stacks": 4,
    "training.compute_dtype": "float32", "data.tokenizer.kind": "bytes",
    "data.source": "files",
    "data.path": "text.md",
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "end to end": {"training.strategy": "end_to_end", "model.d_model": 128, "model.d_ff": 512},
    "append, frozen": {
        "training.strategy": "progressive", "training.progressive.trunk_strategy": "frozen",
        "model.d_model": 64, "model.d_ff": 256,
    },
    "diffusion": {
        "training.strategy": "end_to_end", "training.progressive.training_objective": "diffusion",
        "model.attention_preset": "bert_style", "model.d_model": 64, "model.d_ff": 256,
    },
}  # fmt: skip
SHAPE = {
    "model.n_heads": 4, "model.architecture.n_stacks": 4, "model.architecture.blocks_per_stack": 1,
    "training.seq_len": 64, "training.batch_size": 12,
}  # fmt: skip


def environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}


def tokens_per_second(tree: Path, settings: dict[str, Any], steps: int, scratch: Path) -> float:
    out = scratch / "run"
    changes = [f"{key}={json.dumps(value)}" for key, value in {**settings, "training.max_steps": steps}.items()]
    command = [sys.executable, "-m", "stackwise", "train", scratch / "config.yaml", *changes, "--out", out]
    done = subprocess.run(command, env=environment(tree), cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    subprocess.run(["rm", "-r", out], check=True)
    return statistics.median([r["tokens_per_second"] for r in records if "tokens_per_second" in r][1:])


def help_seconds(tree: Path) -> float:
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "stackwise", "--help"], env=environment(tree), capture_output=True, check=True
    )
    return time.perf_counter() - begin


def in_turns(measure: Callable[[Path], float], here: Path, there: Path, pairs: int) -> tuple[list[float], list[float]]:
    """``pairs`` figures of each, taken next to each other."""
    measure(here), measure(there)  # warms the caches of files
    ours, theirs = [], []
    for pair in range(pairs):
        for tree, figures in ((here, ours), (there, theirs))[:: 1 if pair % 2 else -1]:
            figures.append(measure(tree))
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what this tree is compared with")
    parser.add_argument("--pairs", type=int, default=8, help="runs of each setting and tree (default 8)")
    parser.add_argument("--steps", type=int, default=400, help="steps of a run (default 400)")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "commit": options.commit, "pairs": options.pairs, "steps": options.steps,
        "machine": machine(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        scratch, there = Path(folder), Path(folder) / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", there, options.commit], check=True)
        try:
            preset = [sys.executable, "-m", "stackwise", "init", scratch / "config.yaml"]
            subprocess.run(preset, env=environment(ROOT), check=True, capture_output=True)
            (scratch / "text.md").write_text((ROOT / "docs/log.md").read_text()[:200_000])
            for name, settings in SETTINGS.items():
                settings = {**COMMON, **SHAPE, **settings}

                def speed(tree: Path, settings: dict[str, Any] = settings) -> float:
                    return tokens_per_second(tree, settings, options.steps, scratch)

                ours, theirs = in_turns(speed, ROOT, there, options.pairs)
                result[name] = {
                    "ratio": statistics.median(a / b for a, b in zip(ours, theirs)), "here": ours, "there": theirs,
                }  # fmt: skip
                print(f"{name}: {result[name]['ratio']:.3f}", flush=True)
            ours, theirs = in_turns(help_seconds, ROOT, there, 4 * options.pairs)
            ratio = statistics.median(b / a for a, b in zip(ours, theirs))
            result["help"] = {
                "ratio": ratio, "here": statistics.median(ours), "there": statistics.median(theirs),
            }  # fmt: skip
            print(f"--help: {ratio:.3f}")
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", there], check=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
