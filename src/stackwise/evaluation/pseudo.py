"""How well a masked model predicts each token from all others."""

from __future__ import annotations

import math

import numpy as np
import torch

from stackwise.data.batches import validation_windows, windows
from stackwise.model.architecture import Rack
from stackwise.model.reading import Reading

TOKENS = 1024
"""Tokens scored by default: each takes a pass over its whole window."""


@torch.no_grad()
def pseudo_perplexity(
    rack: Rack,
    mask_id: int,
    special_ids: frozenset[int],
    tokens: np.ndarray,
    seq_len: int,
    batch_size: int,
    max_tokens: int = TOKENS,
) -> dict[str, float | int]:
    """e to the mean cross-entropy of a token when it alone is masked (1910.14659 §2); special tokens are left out.

    Args:
        mask_id: the mask token; special_ids: tokens that are not scored.
        tokens: 1-D ids; windows of ``seq_len`` are spread evenly over them.
        batch_size: windows at a time, each with another token masked.
        max_tokens: how many are scored at most, in whole windows; at least one window is.
    """
    special = np.array(sorted(special_ids))
    total, count = 0.0, 0
    for start in validation_windows(len(tokens), seq_len, max_tokens):
        row = torch.from_numpy(windows(tokens, np.array([start]), seq_len)[0, :-1])
        places = torch.from_numpy(np.flatnonzero(~np.isin(row.numpy(), special)))
        for some in places.split(batch_size):
            index = torch.arange(len(some))
            inputs = row.repeat(len(some), 1)
            inputs[index, some] = mask_id
            hidden = rack(Reading(inputs.to(rack.device)))[index.to(rack.device), some.to(rack.device)]
            targets = row[some].to(rack.device)
            terms, _ = rack.cross_entropy_terms(hidden, targets)
            total, count = total + float(terms.cpu().double().sum()), count + len(some)
    return {"pseudo_perplexity": math.exp(total / count), "pseudo_perplexity_tokens": count}
