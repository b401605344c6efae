"""Block diffusion with kept keys and values against reading everything again: the same tokens, and how much sooner.

    python benchmarks/sampling.py [--tokens 256] [--block 16] [--rounds 5] [--json]

A Rack of 6 Blocks of width 256 with random weights, one token a step; both ways in turn, one thread, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from stackwise.config import StackWiseConfig
from stackwise.generation.denoisers import generate_blocks
from stackwise.model.architecture import create_rack_from_config

V, MASK = 512, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = StackWiseConfig.from_dict(
        {
            "model": {"d_model": 256, "n_heads": 4, "architecture": {"n_stacks": 3, "blocks_per_stack": 2}},
            "training": {"progressive": {"training_objective": "diffusion"}, "seq_len": options.tokens},
        }
    )
    rack = create_rack_from_config(config, vocab_size=V).eval().requires_grad_(False)
    gaps = torch.full((1, options.tokens), MASK)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    texts = {}
    for _ in range(options.rounds):
        for cached, times in seconds.items():
            start = time.perf_counter()
            *_, texts[cached] = generate_blocks(
                rack, gaps, options.block, mask_id=MASK, order="first_hitting", cached=cached, seed=1
            )
            times.append(time.perf_counter() - start)
    if not torch.equal(texts[True], texts[False]):
        raise SystemExit("the two ways gave different tokens")
    with_cache, without = (statistics.median(seconds[cached]) for cached in (True, False))
    result = {
        "tokens": options.tokens,
        "block": options.block,
        "seconds_cached": with_cache,
        "seconds_uncached": without,
        "ratio": without / with_cache,
        "versions": {"torch": torch.__version__},
    }
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"kept {with_cache:.2f} s, read again {without:.2f} s: {result['ratio']:.2f} times as fast, same tokens")


if __name__ == "__main__":
    main()
