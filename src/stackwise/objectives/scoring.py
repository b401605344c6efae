"""The validation score of a Rack under an objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stackwise.data.batches import Batch, validation_windows, windows
from stackwise.model.architecture import Rack
from stackwise.objectives.base import Objective, Score
from stackwise.ops.precision import autocast

RATE_BINS = 10
"""Points of the curve c(r)."""


@dataclass(frozen=True)
class Validation:
    """Mean nats a token, e to that power, and bits a byte of text (``None`` if not all is predicted).

    Attributes:
        tokens: that the mean is over.
        accuracy: share of the predicted tokens that were the likeliest; of masked models, of those that were masked.
        nelbo: where the loss is a bound on −log p of the whole text: nats_per_token, its standard_error over sequences
            and draws, and how many draws of masks each sequence had.
        curve: (share of tokens masked, mean nats of a masked one) in equal parts of the noise levels, and each one's
            standard error.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    accuracy: float | None = None
    nelbo: dict[str, float | None] | None = None
    curve: tuple[tuple[float, float, float | None], ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Without what is not there."""
        optional = ("accuracy", "nelbo", "curve")
        return {k: v for k, v in asdict(self).items() if v is not None or k not in optional}


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
    draws: int = 1,
    compute_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Validation:
    """Scores windows of ``seq_len`` tokens that follow each other without overlap; each token is predicted once.

    Args:
        tokens: 1-D ids.
        bytes_per_token: bytes of text per token of this set.
        max_tokens: score about so many, in windows spread evenly; default all.
        draws: masks drawn for each window, where the objective is a bound.
        progress: called with windows done and in all.
    """
    starts = validation_windows(len(tokens), seq_len, max_tokens)
    modes = {module: module.training for module in rack.modules()}
    rack.eval()
    objective = objective.of(rack)
    scores: list[Score] = []
    for draw in range(draws if objective.is_bound else 1):
        for first in range(0, len(starts), batch_size):
            index = starts[first : first + batch_size]
            batch = Batch(windows(tokens, index, seq_len), index, np.full_like(index, draw))
            with autocast(rack.device, compute_dtype):
                scores.append(objective.score(rack, batch))
            if progress is not None:
                progress(draw * len(starts) + first + len(index), len(starts) * draws)
    for module, training in modes.items():
        module.training = training
    return _validation(scores, objective, bytes_per_token, draws)


def _validation(scores: list[Score], objective: Objective, bytes_per_token: float, draws: int) -> Validation:
    nats, count = (np.concatenate([getattr(score, name) for score in scores]) for name in ("nats", "tokens"))
    loss = float(nats.sum() / count.sum())
    whole = objective.predicts_every_token
    nelbo = None
    if objective.is_bound and whole:
        error = _standard_error((nats - loss * count) / count.mean())
        nelbo = {"nats_per_token": loss, "standard_error": error, "draws": draws}
    accuracy = None
    if not whole:
        accuracy = sum(score.right for score in scores) / sum(score.predicted for score in scores)
    return Validation(
        loss,
        math.exp(min(loss, 700.0)),
        bits_per_byte(loss, bytes_per_token) if whole else None,
        int(count.sum()),
        accuracy,
        nelbo,
        _curve(scores),
    )


def _standard_error(x: NDArray[np.float64]) -> float | None:
    """Of the mean of ``x``; of a single value it is not known."""
    return float(x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else None


def _curve(scores: list[Score]) -> tuple[tuple[float, float, float | None], ...] | None:
    """c(r), the mean cross-entropy of a token masked at rate r."""
    rates, means = (np.concatenate([getattr(score, name) for score in scores]) for name in ("rates", "means"))
    if not len(rates):
        return None
    bins = np.clip(np.ceil(rates * RATE_BINS - 1e-9).astype(int) - 1, 0, RATE_BINS - 1)
    return tuple(
        (float(rates[bins == k].mean()), float(means[bins == k].mean()), _standard_error(means[bins == k]))
        for k in range(RATE_BINS)
        if (bins == k).any()
    )
