"""A run that is killed, without warning, and goes on: it ends in the same weights, bit for bit, as one left alone.

    python examples/kill_and_resume.py

The second run is killed by SIGKILL (as the power going off would) in the middle of a phase, and started again by the
same call. Takes a minute on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import stackwise

SETTINGS = {
    "model": {"d_model": 48, "n_heads": 4, "architecture": {"n_stacks": 2, "blocks_per_stack": 1}},
    "training": {
        "batch_size": 8, "seq_len": 32, "max_steps": 40, "device": "cpu", "checkpoint": {"every_steps": 7},
        "progressive": {"trunk_strategy": "frozen"},
    },
    "data": {"source": "files", "path": argparse.__file__, "tokenizer": {"kind": "bytes"}},
}  # fmt: skip


def train(out: Path, killed_after: int | None = None) -> str:
    """Trains, or goes on with, the run in ``out``; returns the hash of its weights."""

    def kill(seen: dict[str, Any]) -> None:
        if seen["step"] == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)

    return str(stackwise.train(SETTINGS, out, resume=True, on_step=kill)["weights_sha256"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/kill-and-resume"))
    parser.add_argument("--killed-after", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.killed_after:
        train(options.out, options.killed_after)
        return
    shutil.rmtree(options.out, ignore_errors=True)
    whole = train(options.out / "left-alone")
    command = [sys.executable, __file__, "--out", str(options.out / "killed"), "--killed-after", "26"]
    ended = subprocess.run(command, stderr=subprocess.DEVNULL, check=False)
    print(f"the process ended by signal {-ended.returncode}")
    resumed = train(options.out / "killed")
    print(f"{whole[:16]} left alone\n{resumed[:16]} killed and resumed: {'equal' if whole == resumed else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
