"""A memory budget, from the plan to the run: the first recipe that fits is trained, and what it took is measured.

    python examples/memory_budget.py --mebibytes 70

The plan dry-runs the steps of each recipe on tensors without data, so the search takes seconds. What the run then takes
is the peak of its resident memory above what the process held before the model was built. Takes a minute on two cores.
"""

from __future__ import annotations

import argparse
import sys

import stackwise
from stackwise.config import StackWiseConfig
from stackwise.growth.recipes import apply_recipe

RECIPES = ("end-to-end", "append-frozen", "append-cached")  # the first is the best and the largest
SETTINGS = {
    "model": {"d_model": 256, "n_heads": 4, "architecture": {"n_stacks": 6, "blocks_per_stack": 1}},
    "training": {"batch_size": 4, "seq_len": 64, "max_steps": 60, "device": "cpu", "cpu_allocator": "tight"},
    "data": {"source": "files", "path": argparse.__file__, "tokenizer": {"kind": "bytes"}},
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--mebibytes", type=float, default=70)
    parser.add_argument("--out", default="runs/memory-budget")
    options = parser.parse_args(arguments)
    config, chosen = StackWiseConfig.from_dict(SETTINGS, options.changes), None
    for name in RECIPES:
        planned = apply_recipe(config, name)
        peak = stackwise.plan(planned).to_dict()["peak_memory_bytes"] / 2**20
        print(f"{name:<15}{peak:7.1f} MiB planned {'fits' if peak <= options.mebibytes else 'does not fit'}")
        if chosen is None and peak <= options.mebibytes:
            chosen = planned
    if chosen is None:
        sys.exit(f"none of the recipes fits {options.mebibytes:g} MiB")
    summary = stackwise.train(chosen, options.out, resume=True)
    print(f"{summary['peak_memory_bytes'] / 2**20:.1f} MiB measured")


if __name__ == "__main__":
    main()
