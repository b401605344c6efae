"""Masked diffusion with depth as time: each Stack removes the noise of one interval of noise levels, alone.

    python examples/depth_as_time.py
    python examples/depth_as_time.py data.source=files data.path=mybook.txt --out runs/mybook

The Stacks ("experts") train one after another, each with the memory of one Stack, and share the embedding and the head.
Together they bound the negative log-likelihood of the text; then they fill the gap in a line.
Words KEY=VALUE change settings, as on the command line of stackwise. Takes three minutes on two cores.
"""

from __future__ import annotations

import argparse

import stackwise
from stackwise.config import StackWiseConfig

SETTINGS = {
    "model": {"d_model": 128, "n_heads": 4, "architecture": {"n_stacks": 2, "blocks_per_stack": 2}},
    "training": {
        "batch_size": 32, "seq_len": 64, "max_steps": 600, "optimizer": {"lr": 2e-3},
        "progressive": {"training_objective": "diffusion", "time_interpretation": "depth", "new_stack_init": "random"},
        "diffusion": {"depth_variant": "experts", "weighting": "exact_counts"},
    },
    "data": {"tokenizer": {"kind": "characters"}},
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", default="runs/depth-as-time")
    options = parser.parse_args(arguments)
    config = StackWiseConfig.from_dict(SETTINGS, options.changes)
    summary = stackwise.train(config, options.out, resume=True)
    for phase in summary["phases"]:
        print(f"{phase['name']}: {phase['trainable_parameters']:,} parameters trained")
    print(f"at most {summary['validation']['bits_per_byte']:.3f} bits per byte")
    print(stackwise.generate(options.out, template="def {30} return None", order="confidence"))


if __name__ == "__main__":
    main()
