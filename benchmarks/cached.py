"""Training the last Stack from cached activations against training a Rack of one Stack, and against other depths.

    python benchmarks/cached.py [--d-model 1024] [--steps 8] [--rounds 1] [--json]

Each run is a process of its own. The last of 8 (and of 32) one-Block Stacks trains from the cache, the trunk on disk;
beside it the only Stack of a Rack of one. Time is the median of its steps, peak memory that of its phase.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def run(n_stacks: int, d_model: int, steps: int) -> dict[str, float]:
    """Trains in this process: seconds a step and peak bytes of the last phase, and what the plan says of it."""
    from stackwise.config import StackWiseConfig
    from stackwise.planning.plan import plan_run
    from stackwise.runs.run import train_run
    from stackwise.store.rundir import RunDir
    from stackwise.training.progress import SilentReporter

    total = n_stacks - 1 + steps
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("".join(random.Random(0).choices("abcdefgh \n", k=400_000)))
        settings: dict[str, object] = {
            "model": {
                "d_model": d_model,
                "n_heads": max(1, d_model // 64),
                "architecture": {"n_stacks": n_stacks, "blocks_per_stack": 1},
            },
            "training": {
                "batch_size": 8,
                "seq_len": 256,
                "max_steps": total,
                "cpu_allocator": "tight",
                "evaluation": {"max_tokens": 256},
                "logging": {"every_steps": 1},
                "checkpoint": {"keep_last": 1},
                "schedule": {"kind": "constant", "warmup_steps": 0, "rewarmup_steps": 0},
                "progressive": {
                    "trunk_strategy": "frozen",
                    "new_stack_init": "identity",
                    "cache_activations": n_stacks > 1,
                    "phase_fractions": [1 / total] * (n_stacks - 1) + [steps / total],
                },
            },
            "data": {
                "source": "files",
                "path": str(text),
                "tokenizer": {"kind": "bytes"},
                "cache_dir": folder,
            },
        }
        config = StackWiseConfig.from_dict(settings)
        planned = plan_run(config, Path(folder)).costs[-1]
        out = RunDir(Path(folder, "run"))
        summary = train_run(config, out.path, SilentReporter())
        rates = [line["tokens_per_second"] for line in out.read_metrics() if line["step"] > total - steps + 2]
    return {
        "seconds": statistics.median(8 * 256 / rate for rate in rates),
        "peak_bytes": summary["phases"][-1]["peak_memory_bytes"],
        "planned_bytes": planned.peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--stacks", type=int, help="run one, in this process, and print JSON")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.stacks:
        print(json.dumps(run(options.stacks, options.d_model, options.steps)))
        return
    rows: dict[int, list[dict[str, float]]] = {1: [], 8: [], 32: []}
    for round_ in range(options.rounds):
        for stacks in rows if round_ == 0 else (1, 8):
            command = [sys.executable, __file__, "--stacks", str(stacks), "--d-model", str(options.d_model)]
            command += ["--steps", str(options.steps)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows[stacks].append(json.loads(done.stdout))
    seconds = {n: statistics.median(row["seconds"] for row in found) for n, found in rows.items()}
    peaks = {n: max(row["peak_bytes"] for row in found) for n, found in rows.items()}
    result = {
        "d_model": options.d_model,
        "seconds": seconds,
        "peak_bytes": peaks,
        "planned_bytes": {n: found[0]["planned_bytes"] for n, found in rows.items()},
        "time_of_one_stack": seconds[8] / seconds[1],
        "peak_32_of_8": peaks[32] / peaks[8],
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{'Stacks':8}{'ms a step':>12}{'peak MiB':>12}{'planned MiB':>14}")
    for n in rows:
        planned = result["planned_bytes"][n] / 2**20  # type: ignore[index]
        print(f"{n:<8}{seconds[n] * 1e3:12.1f}{peaks[n] / 2**20:12.0f}{planned:14.0f}")
    print(f"the last of 8 takes {result['time_of_one_stack']:.3f} of the time of one; ", end="")
    print(f"32 Stacks take {result['peak_32_of_8']:.3f} of the memory of 8")


if __name__ == "__main__":
    main()
