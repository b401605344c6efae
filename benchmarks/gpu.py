"""Speed and memory of training on the GPU that is here, as a table in Markdown.

    python benchmarks/gpu.py [--steps 20]

Each row trains the same Rack by one recipe; tokens a second are those of the last phase, MFU is against the data sheet,
or the best measured product where the GPU is not listed. "held" is what the allocator had from the device at most,
"beside" what the device lost on top: context and workspaces.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROWS: dict[str, list[str]] = {
    "end to end": ["training.strategy=end_to_end"],
    "end to end, checkpointed": ["training.strategy=end_to_end", "training.activation_checkpointing=true"],
    "end to end, compiled": ["training.strategy=end_to_end", "training.compile=true"],
    "append, frozen trunk": ["training.progressive.trunk_strategy=frozen"],
    "append, frozen trunk in nf4": [
        "training.progressive.trunk_strategy=frozen", "training.progressive.trunk_precision=nf4",
    ],
    "append, frozen trunk on the host": ["training.progressive.trunk_strategy=frozen", "training.offload=host"],
    "append, cached": ["training.progressive.trunk_strategy=frozen", "training.progressive.cache_activations=true"],
}  # fmt: skip


def row(overrides: list[str], steps: int, folder: Path) -> dict[str, Any]:
    from stackwise.config import StackWiseConfig
    from stackwise.planning.plan import plan_run
    from stackwise.runs.run import train_run
    from stackwise.training.progress import SilentReporter

    base = {
        "model": {"d_model": 1024, "n_heads": 16, "architecture": {"n_stacks": 4, "blocks_per_stack": 2}},
        "training": {
            "batch_size": 16, "seq_len": 1024, "max_steps": 4 * steps, "device": "cuda",
            "evaluation": {"max_tokens": 1024}, "logging": {"every_steps": 1},
        },
        "data": {
            "source": "files", "path": str(folder / "text.txt"), "tokenizer": {"kind": "bytes"},
            "cache_dir": str(folder / "store"),
        },
    }  # fmt: skip
    config = StackWiseConfig.from_dict(base, overrides)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    plan = plan_run(config, folder)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        summary = train_run(config, Path(out) / "run", SilentReporter())
        metrics = [json.loads(line) for line in (Path(out) / "run/metrics.jsonl").read_text().splitlines()]
    last = [line for line in metrics if line["phase"] == summary["phases"][-1]["name"]][-steps // 2 :]
    rates, shares = (
        sorted(line[key] for line in last if line[key] is not None) for key in ("tokens_per_second", "mfu")
    )
    free, total = torch.cuda.mem_get_info()
    return {
        "tokens_per_second": rates[len(rates) // 2],
        "mfu": shares[len(shares) // 2] if shares else None,
        "measured": summary["peak_memory_bytes"],
        "planned": plan.peak_memory_bytes,
        "held": torch.cuda.max_memory_reserved(),
        "beside": total - free - torch.cuda.memory_reserved(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="a phase (default 20)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: skipped, there is no GPU")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| run | tokens/s | MFU | peak GiB | planned GiB | held GiB | beside GiB |\n|---|---|---|---|---|---|---|")
    found, begin = {}, time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40_000)
        for label, overrides in ROWS.items():
            found[label] = made = row(overrides, options.steps, folder)
            sizes = " | ".join(f"{made[key] / 2**30:.2f}" for key in ("measured", "planned", "held", "beside"))
            mfu = "" if made["mfu"] is None else f"{made['mfu']:.2f}"
            print(f"| {label} | {made['tokens_per_second']:,.0f} | {mfu} | {sizes} |", flush=True)
    print()
    print(json.dumps({"seconds": time.perf_counter() - begin, "rows": found}))


if __name__ == "__main__":
    main()
