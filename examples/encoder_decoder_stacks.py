"""Unlike Stacks in one Rack: grouped attention first, latent attention after it, each Stack with Blocks of its own.

    python examples/encoder_decoder_stacks.py

An "encoder" Stack of three Blocks reads with full attention and grouped queries; a "decoder" Stack of two Blocks keeps
keys and values in small latents (MLA). Both are causal, so the Rack is a language model; it trains end to end on a text
that every machine has. Takes half a minute on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from stackwise.config import StackWiseConfig
from stackwise.model.architecture import create_block_spec, create_rack_from_specs
from stackwise.training import ArchitectureTrainer, ProgressiveDataLoader

WIDTH = 96


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args(arguments)
    encoder = create_block_spec(WIDTH, 4 * WIDTH, n_heads=6, n_kv_heads=2, attention_mode="causal")
    latent = {"attention_type": "mla", "mla_rq": 48, "mla_rkv": 24}
    decoder = create_block_spec(WIDTH, 3 * WIDTH, 4, attention_mode="causal", attention_preset="custom",
                                attention_custom=latent)  # fmt: skip
    rack = create_rack_from_specs(256, WIDTH, [
        {"stack_id": 0, "n_blocks": 3, "block_spec": encoder},
        {"stack_id": 1, "n_blocks": 2, "block_spec": decoder},
    ])  # fmt: skip
    config = StackWiseConfig.from_dict(
        {"training": {"batch_size": 8, "seq_len": 64, "max_steps": options.steps, "optimizer": {"lr": 3e-3}}}
    )
    tokens = np.frombuffer(Path(argparse.__file__).read_bytes(), np.uint8).astype(np.int64)
    results = ArchitectureTrainer(config).train_architecture(rack, ProgressiveDataLoader(tokens, config))
    for stack in rack.stacks:
        weights = sum(parameter.numel() for parameter in stack.parameters())
        print(f"Stack {stack.stack_id}: {len(stack.blocks)} Blocks, {weights:,} weights")
    print(f"loss {results['phases'][0]['first_loss']:.3f} → {results['final_loss']:.3f}")


if __name__ == "__main__":
    main()
