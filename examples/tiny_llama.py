"""A small Llama (grouped queries, rotary positions, SwiGLU, RMSNorm), grown Stack by Stack, which then writes.

    python examples/tiny_llama.py
    python examples/tiny_llama.py data.source=files data.path=mybook.txt --out runs/mybook

Words KEY=VALUE change settings, as on the command line of stackwise. Takes two minutes on two cores.
"""

from __future__ import annotations

import argparse

import stackwise
from stackwise.config import StackWiseConfig

SETTINGS = {
    "model": {
        "d_model": 128, "n_heads": 4, "n_kv_heads": 2, "d_ff": 344, "attention_preset": "efficient_gqa",
        "architecture": {"n_stacks": 3, "blocks_per_stack": 1},
    },
    "training": {
        "batch_size": 16, "seq_len": 64, "max_steps": 600, "optimizer": {"lr": 3e-3},
        "progressive": {"new_stack_init": "copy", "trunk_strategy": "trainable"},
    },
    "data": {"tokenizer": {"kind": "bytes"}},
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", default="runs/tiny-llama")
    options = parser.parse_args(arguments)
    config = StackWiseConfig.from_dict(SETTINGS, options.changes)
    summary = stackwise.train(config, options.out, resume=True)
    for phase in summary["phases"]:
        print(f"{phase['name']:<10} validation loss {phase['validation_loss']:.3f} nats a byte")
    print(stackwise.generate(options.out, "def ", 200))


if __name__ == "__main__":
    main()
