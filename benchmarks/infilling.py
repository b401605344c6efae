"""Filling gaps in held-out text: masked diffusion, which reads both sides, against left to right, which reads one.

    python benchmarks/infilling.py --diffusion RUN --clm RUN [--gap 20] [--windows 200] [--json]

Both runs on the same text and tokenizer. From the middle of each window a gap is cut; diffusion fills it in each order,
the causal model goes on from what is before it. Judge is the causal model itself: its loss of gap and following text,
given what is before. Told are the share of gaps where diffusion's text has the lower loss, and the mean losses, those
of the text that was there too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stackwise.data.batches import validation_windows, windows
from stackwise.data.store import prepare
from stackwise.generation.autoregressive import generate
from stackwise.generation.denoisers import RackDenoiser
from stackwise.generation.diffusion import unmask
from stackwise.objectives import DiffusionObjective, create_objective
from stackwise.runs.run import load

ORDERS = ("first_hitting", "confidence", "margin", "entropy")


@torch.no_grad()
def losses(rack: Any, rows: Tensor, start: int) -> Tensor:
    """Mean nats of the tokens from ``start`` on, (B,), under a causal Rack."""
    log_p = rack(rows[:, :-1]).log_softmax(-1).gather(-1, rows[:, 1:, None]).squeeze(-1)
    return -log_p[:, start - 1 :].mean(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusion", type=Path, required=True)
    parser.add_argument("--clm", type=Path, required=True)
    parser.add_argument("--gap", type=int, default=20)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    filler, causal = load(options.diffusion), load(options.clm)
    if filler.tokenizer.fingerprint != causal.tokenizer.fingerprint:
        parser.error("the runs have different tokenizers")
    objective, mask_id = create_objective(filler.config, filler.tokenizer), filler.tokenizer.mask_id
    if not isinstance(objective, DiffusionObjective) or causal.config.training.objective != "clm":
        parser.error("--diffusion must be a run of diffusion, --clm one of clm")
    T = min(filler.config.training.seq_len, causal.config.training.seq_len)
    tokens = prepare(causal.config.data, tokenizer=causal.tokenizer).validation
    starts = validation_windows(len(tokens), T, options.windows * T)
    rows = torch.from_numpy(windows(np.asarray(tokens), starts, T)[:, :-1])
    first = (T - options.gap) // 2
    end, never = first + options.gap, causal.tokenizer.special_ids

    continued = list(generate(causal.rack, rows[:, :first], options.gap, seed=1, suppressed_ids=never))
    left_to_right = torch.cat((rows[:, :first], torch.stack(continued, dim=1), rows[:, end:]), dim=1)
    one_sided, truth = losses(causal.rack, left_to_right, first), losses(causal.rack, rows, first)
    result: dict[str, Any] = {
        "windows": len(rows), "gap": options.gap, "context": T,
        "loss": {"there": float(truth.mean()), "left to right": float(one_sided.mean())},
        "better_than_left_to_right": {},
    }  # fmt: skip
    gaps = rows.clone()
    gaps[:, first:end] = mask_id
    for order in ORDERS:
        denoise = RackDenoiser(filler.rack, objective)
        *_, filled = unmask(denoise, gaps, mask_id=mask_id, order=order, suppressed_ids=never, seed=1)
        loss = losses(causal.rack, filled, first)
        result["loss"][order] = float(loss.mean())
        result["better_than_left_to_right"][order] = float((loss < one_sided).float().mean())
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{len(rows)} gaps of {options.gap} tokens in windows of {T}; nats a token of gap and what follows")
    for name, nats in result["loss"].items():
        share = result["better_than_left_to_right"].get(name)
        print(
            f"{name:15} {nats:.3f}" + ("" if share is None else f"   better than left to right in {share:.0%} of gaps")
        )


if __name__ == "__main__":
    main()
