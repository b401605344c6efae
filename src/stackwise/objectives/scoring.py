"""The validation score of a Rack under an objective.

Bits per byte have one definition for all objectives: the nats of all predicted tokens of a text, as bits, over the
bytes of UTF-8 of that text. End tokens have no bytes: clm predicts them and pays for them; an objective that is given
them (``Objective.special_ids``) has them for free. What is not scored (of clm the first token of a text, a last window
that is not full, windows beyond ``max_tokens``) counts neither in the nats nor, by its share of tokens, in the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stackwise.data.batches import Batch, validation_windows, windows
from stackwise.errors import UserError
from stackwise.model.architecture import Rack
from stackwise.objectives.base import Objective, Score
from stackwise.ops.precision import autocast
from stackwise.signals import stop_if_asked
from stackwise.units import count

RATE_BINS = 10
"""Points of the curve c(r)."""

_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Validation:
    """Mean nats a predicted token, e to that power (``None`` where the loss is no likelihood), and bits per byte
    (``None`` if not all text is predicted, or its bytes are not known).

    Attributes:
        tokens: that the mean is over.
        accuracy: share of the predicted tokens that were the likeliest; of masked models, of those that were masked.
        nelbo: where the loss is a bound on −log p of the whole text: nats_per_token, its standard_error, and how many
            draws of masks each sequence had.
        curve: (share of tokens masked, mean nats of a masked one) in equal parts of the noise levels, and each one's
            standard error.

    Standard errors take the sequences (windows) as independent, but not the draws of one sequence.
    """

    loss: float
    perplexity: float | None
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
    """Both are per predicted token."""
    return nats_per_token / math.log(2) / bytes_per_token


def predicted_share(tokens: np.ndarray, given: frozenset[int]) -> float:
    """The share of ``tokens`` (1-D ids) that an objective predicts, to which it gives the ids ``given``."""
    ids = sorted(given)
    free = sum(int(np.isin(tokens[i : i + _AT_ONCE], ids).sum()) for i in range(0, len(tokens), _AT_ONCE))
    return 1 - free / len(tokens)


def check_scorable(
    objective: Objective, tokens: np.ndarray, *, seq_len: int, batch_size: int, max_tokens: int | None
) -> None:
    """Before anything is trained: UserError where ``validate`` would find no window, or no token to predict in any."""
    starts = validation_windows(len(tokens), seq_len, max_tokens)
    for first in range(0, len(starts), batch_size):
        index = starts[first : first + batch_size]
        if objective.evaluated(Batch(windows(tokens, index, seq_len), index, np.zeros_like(index))).n_targets:
            return
    raise UserError(_nothing_masked(len(starts)))


def _nothing_masked(n_windows: int) -> str:
    return f"no token is masked in the {count(n_windows, 'window')} of text to score; give more text"


@contextmanager
def evaluating(rack: Rack) -> Iterator[None]:
    """Within the block ``rack`` is in evaluation mode; afterwards every part of it is in its own again."""
    modes = {module: module.training for module in rack.modules()}
    rack.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def validate(
    rack: Rack,
    objective: Objective,
    tokens: np.ndarray,
    *,
    seq_len: int,
    batch_size: int,
    bytes_per_token: float | None,
    max_tokens: int | None = None,
    draws: int = 1,
    compute_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Validation:
    """Scores windows of ``seq_len`` tokens that follow each other without overlap; each token is predicted once.

    Args:
        tokens: 1-D ids.
        bytes_per_token: bytes of text per token of this set, end tokens among them; ``None``: not known.
        max_tokens: about how many are scored, in windows spread evenly; default all.
        draws: masks drawn for each window, where the objective is a bound.
        progress: called with windows done and in all.

    Raises:
        StoppedBySignal, Stopped: a signal is noted; between two batches.
    """
    starts = validation_windows(len(tokens), seq_len, max_tokens)
    bytes_per_predicted = None
    if bytes_per_token is not None:
        bytes_per_predicted = bytes_per_token / predicted_share(tokens, objective.special_ids)

    def batch_of(index: NDArray[np.int64], draw: NDArray[np.int64]) -> Batch:
        return Batch(windows(tokens, index, seq_len), index, draw)

    return validate_samples(
        rack, objective, starts, batch_of, batch_size=batch_size, bytes_per_predicted=bytes_per_predicted, draws=draws,
        compute_dtype=compute_dtype, progress=progress,
    )  # fmt: skip


@torch.no_grad()
def validate_samples(
    rack: Rack,
    objective: Objective,
    samples: NDArray[np.int64],
    batch_of: Callable[[NDArray[np.int64], NDArray[np.int64]], Batch],
    *,
    batch_size: int,
    bytes_per_predicted: float | None = None,
    draws: int = 1,
    compute_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Validation:
    """Scores ``samples``, by their ids; ``batch_of`` gives the batch of some of them, and the draw of each.

    Args:
        bytes_per_predicted: bytes of text per predicted token; ``None``: not known. The others as for ``validate``.

    Raises:
        StoppedBySignal, Stopped: as ``validate`` does.
    """
    objective = objective.of(rack)
    scores: list[Score] = []
    sequences: list[NDArray[np.int64]] = []
    with evaluating(rack):
        for draw in range(draws if objective.is_bound else 1):
            for first in range(0, len(samples), batch_size):
                stop_if_asked()
                index = samples[first : first + batch_size]
                with autocast(rack.device, compute_dtype):
                    scores.append(objective.score(rack, batch_of(index, np.full_like(index, draw))))
                sequences.append(index)
                if progress is not None:
                    progress(draw * len(samples) + first + len(index), len(samples) * draws)
    return _validation(scores, np.concatenate(sequences), objective, bytes_per_predicted, draws)


def _validation(
    scores: list[Score],
    sequences: NDArray[np.int64],
    objective: Objective,
    bytes_per_predicted: float | None,
    draws: int,
) -> Validation:
    nats, count = (np.concatenate([getattr(score, name) for score in scores]) for name in ("nats", "tokens"))
    if not count.sum():
        raise UserError(_nothing_masked(len(np.unique(sequences))))
    loss = float(nats.sum() / count.sum())
    whole = objective.predicts_every_token
    nelbo = None
    if objective.is_bound and whole:
        error = clustered_error(nats - loss * count, sequences, float(count.sum()))
        nelbo = {"nats_per_token": loss, "standard_error": error, "draws": draws}
    accuracy = None
    if not whole:
        judged = sum(score.predicted for score in scores)
        accuracy = sum(score.right for score in scores) / judged if judged else None
    return Validation(
        loss,
        math.exp(min(loss, 700.0)) if objective.is_likelihood else None,
        bits_per_byte(loss, bytes_per_predicted) if whole and bytes_per_predicted is not None else None,
        int(count.sum()),
        accuracy,
        nelbo,
        _curve(scores, sequences),
    )


def clustered_error(residuals: NDArray[np.float64], clusters: NDArray[np.int64], total: float) -> float | None:
    """Standard error of a ratio Σy / Σx from y − (Σy / Σx) · x of each observation, and Σx.

    Observations of one cluster may depend on each other in any way, clusters may not: the variance is that of the sums
    of residuals of whole clusters (Cochran, Sampling Techniques, 1977, §9A.2). Of a single cluster it is not known.
    """
    _, which = np.unique(clusters, return_inverse=True)
    sums = np.bincount(which, weights=residuals)
    n = len(sums)
    return float((n / (n - 1) * (sums**2).sum()) ** 0.5 / total) if n > 1 else None


def _curve(scores: list[Score], sequences: NDArray[np.int64]) -> tuple[tuple[float, float, float | None], ...] | None:
    """c(r), the mean cross-entropy of a token masked at rate r."""
    rates, means = (np.concatenate([getattr(score, name) for score in scores]) for name in ("rates", "means"))
    if not len(rates):
        return None
    bins = np.clip(np.ceil(rates * RATE_BINS - 1e-9).astype(int) - 1, 0, RATE_BINS - 1)
    points = []
    for k in np.unique(bins):
        here = bins == k
        mean = float(means[here].mean())
        error = clustered_error(means[here] - mean, sequences[here], float(here.sum()))
        points.append((float(rates[here].mean()), mean, error))
    return tuple(points)
