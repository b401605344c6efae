"""A curriculum of your own, as a list of phases: masked reading first, growth, sweeps, then left-to-right writing.

    python examples/custom_curriculum.py
    python examples/custom_curriculum.py data.source=files data.path=mybook.txt --out runs/mybook

Each entry of ``training.phases`` adds Stacks, or trains some, or sweeps over all, for its share of the budget; an entry
may have its own objective, and the run is used with that of the last one. The plan lists the phases before anything
runs. (For what a list cannot say, CONTRIBUTING.md adds a curriculum in Python.) Takes a minute on two cores.
"""

from __future__ import annotations

import argparse

import stackwise
from stackwise.config import StackWiseConfig

SETTINGS = {
    "model": {"d_model": 64, "n_heads": 4, "architecture": {"n_stacks": 4, "blocks_per_stack": 1}},
    "training": {
        "strategy": "phases",
        "batch_size": 16, "seq_len": 64, "max_steps": 400, "optimizer": {"lr": 3e-3},
        "phases": [
            {"add": 2, "share": 0.3, "objective": "mlm"},  # two Stacks read in both directions
            {"add": "each", "trunk": "frozen", "share": 0.3, "objective": "mlm"},  # two more, one by one
            {"sweep": "right_to_left", "share": 0.2},  # one Stack after another learns to write
            {"trains": "all", "share": 0.2},  # all of them together
        ],
        "progressive": {"training_objective": "clm", "new_stack_init": "identity"},
    },
    "data": {"tokenizer": {"kind": "bytes"}},
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", default="runs/custom-curriculum")
    options = parser.parse_args(arguments)
    config = StackWiseConfig.from_dict(SETTINGS, options.changes)
    for phase in stackwise.plan(config).to_dict()["phases"]:
        print(f"planned: {phase['name']:<18} {phase['trainable_parameters']:>9,} parameters train")
    summary = stackwise.train(config, options.out, resume=True)
    for phase in summary["phases"]:
        print(f"{phase['name']:<18} {phase['objective']}: validation loss {phase['validation_loss']:.3f}")


if __name__ == "__main__":
    main()
