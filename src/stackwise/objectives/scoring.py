"""The validation score of a Rack under an objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from stackwise.data.batches import Batch, validation_windows, windows
from stackwise.model.architecture import Rack
from stackwise.objectives.base import Objective
from stackwise.ops.precision import autocast


@dataclass(frozen=True)
class Validation:
    """Mean nats a predicted token, e to that power, and bits a byte of text (``None`` if not all is predicted)."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Nats a token as bits a byte of UTF-8 text."""
    return nats_per_token / math.log(2) / bytes_per_token


@torch.no_grad()
def validate(
    rack: Rack,
    objective: Objective,
    tokens: np.ndarray,
    *,
    seq_len: int,
    batch_size: int,
    bytes_per_token: float,
    max_tokens: int | None = None,
    compute_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Validation:
    """Scores windows of ``seq_len`` tokens that follow each other without overlap; each token is predicted once.

    Args:
        tokens: 1-D ids.
        bytes_per_token: bytes of text per token of this set.
        max_tokens: score about so many, in windows spread evenly; default all.
        progress: called with windows done and in all.
    """
    starts = validation_windows(len(tokens), seq_len, max_tokens)
    modes = {module: module.training for module in rack.modules()}
    rack.eval()
    nats, count = 0.0, 0
    for first in range(0, len(starts), batch_size):
        index = starts[first : first + batch_size]
        batch = Batch(windows(tokens, index, seq_len), index, np.zeros_like(index))
        with autocast(rack.device, compute_dtype):
            more_nats, more = objective.score(rack, batch)
        nats, count = nats + more_nats, count + more
        if progress is not None:
            progress(first + len(index), len(starts))
    for module, training in modes.items():
        module.training = training
    loss = nats / count
    per_byte = bits_per_byte(loss, bytes_per_token) if objective.predicts_every_token else None
    return Validation(loss, math.exp(min(loss, 700.0)), per_byte, count)
