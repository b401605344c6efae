"""Two adapters a Stack: the trunk stays frozen, and adapts to each Stack that joins it by low-rank updates alone.

    python examples/dual_lora.py

A Stack gets its stack adapter when it is created, and a progressive one when another Stack joins: the loss goes down
while the trunk's own weights stay bit-identical. Takes half a minute on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stackwise.config import StackWiseConfig
from stackwise.training import ProgressiveDataLoader, ProgressiveRackBuilder, ProgressiveTrainer

SETTINGS = {
    "model": {"vocab_size": 256, "d_model": 64, "n_heads": 4},
    "training": {
        "batch_size": 8, "seq_len": 64, "max_steps": 150, "optimizer": {"lr": 3e-3},
        "progressive": {"target_stacks": 3, "trunk_strategy": "qlora", "new_stack_init": "identity"},
        "qlora": {"enabled": True, "rank": 8, "alpha": 8, "progressive_enabled": True, "progressive_rank": 4},
    },
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    config = StackWiseConfig.from_dict(SETTINGS, options.changes)
    tokens = np.frombuffer(Path(argparse.__file__).read_bytes(), np.uint8).astype(np.int64)  # a text that is there
    builder, weights = ProgressiveRackBuilder(config), dict[str, torch.Tensor]()

    def own_weights() -> dict[str, torch.Tensor]:
        """Those of the first Stack, its adapters left out."""
        tensors = builder.rack.stacks[0].named_parameters()
        return {name: tensor.detach().clone() for name, tensor in tensors if ".adapters." not in name}

    def tell(phase: dict[str, Any]) -> None:
        print(f"{phase['name']}: loss {phase['last_loss']:.3f}, {phase['trainable_parameters']:,} parameters trained")
        weights.update(weights or own_weights())  # as the first phase left them

    ProgressiveTrainer(config, on_phase=tell).train_rack(builder, ProgressiveDataLoader(tokens, config))
    same = all(torch.equal(tensor, weights[name]) for name, tensor in own_weights().items())
    print(f"the first Stack's own weights have {'not ' if same else ''}moved since its phase")


if __name__ == "__main__":
    main()
