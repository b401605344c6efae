"""How well a run labels texts: accuracy, F1 and correlations, each with the interval that a bootstrap gives it.

The rows are drawn again with replacement, and the interval spans the middle 95 % of what the drawn rows score (Efron
and Tibshirani 1993, §13.3). N rows, K classes, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stackwise.data.labelled import LabelledRows
from stackwise.data.tables import Row
from stackwise.model.architecture import Rack
from stackwise.objectives.sequences import SequenceObjective
from stackwise.ops.precision import autocast

DRAWS = 1000
CONFIDENCE = 0.95
SEED = 0
"""Of the draws."""
SHOWN = 20
"""Wrong examples that are listed."""

Floats = NDArray[np.float64]


@torch.no_grad()
def outputs_of(
    rack: Rack,
    objective: SequenceObjective,
    rows: LabelledRows,
    batch_size: int,
    compute_dtype: torch.dtype | None,
    progress: Callable[[int, int], None],
) -> Floats:
    """(N, outputs): what the run gives for each row."""
    found = []
    for first in range(0, len(rows), batch_size):
        index = np.arange(first, min(first + batch_size, len(rows)))
        reading = objective.corrupt(rows.batch(index, np.zeros_like(index))).reading.to(rack.device)
        assert reading.ids is not None
        with autocast(rack.device, compute_dtype):
            found.append(objective.logits(rack, reading.ids, reading.attention_mask).float().cpu().double().numpy())
        progress(int(index[-1]) + 1, len(rows))
    return np.concatenate(found)


def class_scores(truth: NDArray[Any], outputs: Floats, names: tuple[str, ...]) -> dict[str, Any]:
    """Scores of classes.

    Args:
        truth: (N,) whole numbers, ids; outputs: (N, K) logits; names: of the classes.

    Returns:
        ``metrics`` with their intervals, ``majority``, the share of the commonest class, ``confusion``: how many rows
        of each class (a row) were taken for which (a column), and ``wrong``, the surest mistakes: the number of a row,
        its label, what was predicted and with which probability.
    """
    predicted, K, N = outputs.argmax(axis=1), len(names), len(truth)
    confusion = np.bincount(truth * K + predicted, minlength=K * K).reshape(K, K)
    # Rows drawn with replacement fall into the cells of the table as a multinomial says.
    drawn = np.random.default_rng(SEED).multinomial(N, confusion.ravel() / N, size=DRAWS).reshape(DRAWS, K, K)
    logs = outputs - outputs.max(axis=1, keepdims=True)
    certainty = 1 / np.exp(logs).sum(axis=1)  # the probability of what was predicted
    wrong = np.flatnonzero(predicted != truth)
    surest = wrong[np.argsort(-certainty[wrong], kind="stable")][:SHOWN]
    values, samples = of_confusions(confusion[None], names), of_confusions(drawn, names)
    return {
        "metrics": {name: _interval(float(values[name][0]), samples[name]) for name in values},
        "majority": float(np.bincount(truth).max() / N),
        "classes": list(names),
        "confusion": confusion.tolist(),
        "wrong": [
            {
                "row": int(i),
                "label": names[truth[i]],
                "predicted": names[predicted[i]],
                "probability": float(certainty[i]),
            }
            for i in surest
        ],
    }


def of_confusions(tables: NDArray[np.int64], names: tuple[str, ...]) -> dict[str, Floats]:
    """(R, K, K) confusion tables, truth by rows → name of a score → (R,).

    F1 of a class that neither occurs nor is predicted is 0, and so is Matthews' coefficient (of K classes: Gorodkin
    2004) where one side has a single class.
    """
    counts = tables.astype(np.float64)
    total, right = counts.sum(axis=(1, 2)), np.trace(counts, axis1=1, axis2=2)
    there, said = counts.sum(axis=2), counts.sum(axis=1)
    f1 = _ratio(2 * np.diagonal(counts, axis1=1, axis2=2), there + said)
    spread = np.sqrt((total**2 - (there**2).sum(axis=1)) * (total**2 - (said**2).sum(axis=1)))
    binary = {f"f1 of {names[1]}": f1[:, 1]} if len(names) == 2 else {}
    return {
        "accuracy": right / total,
        **binary,
        "f1 macro": f1.mean(axis=1),
        "matthews": _ratio(right * total - (there * said).sum(axis=1), spread),
    }


def number_scores(truth: NDArray[Any], outputs: Floats) -> dict[str, Any]:
    """Scores of numbers: truth (N,), outputs (N, 1). ``wrong``: the largest errors, as of ``class_scores``."""
    there, said = truth.astype(np.float64), outputs[:, 0]
    largest = np.argsort(-np.abs(there - said), kind="stable")[:SHOWN]
    draws = np.random.default_rng(SEED)
    samples: dict[str, list[float]] = {name: [] for name in _OF_NUMBERS}
    for _ in range(DRAWS):
        index = draws.integers(0, len(there), len(there))
        for name, score in _OF_NUMBERS.items():
            samples[name].append(score(there[index], said[index]))
    return {
        "metrics": {
            name: _interval(score(there, said), np.array(samples[name])) for name, score in _OF_NUMBERS.items()
        },
        "wrong": [{"row": int(i), "label": float(there[i]), "predicted": float(said[i])} for i in largest],
    }


def _mean_squared_error(a: Floats, b: Floats) -> float:
    return float(np.square(a - b).mean())


def _pearson(a: Floats, b: Floats) -> float:
    """Not a number where one side is constant."""
    a, b = a - a.mean(), b - b.mean()
    spread = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / spread if spread > 0 else math.nan


def _ranks(a: Floats) -> Floats:
    """From 1; equal numbers share the mean of theirs."""
    _, which, counts = np.unique(a, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


_OF_NUMBERS: dict[str, Callable[[Floats, Floats], float]] = {
    "mean squared error": _mean_squared_error,
    "pearson": _pearson,
    "spearman": lambda a, b: _pearson(_ranks(a), _ranks(b)),
}


def _ratio(a: Floats, b: Floats) -> Floats:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _interval(value: float, samples: Floats) -> dict[str, float | None]:
    """``None`` stands for what is not defined, in the rows or in some drawn ones."""
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    numbers = {"value": value, "low": float(low), "high": float(high)}
    return {part: number if math.isfinite(number) else None for part, number in numbers.items()}


def with_texts(scores: dict[str, Any], rows: Iterable[Row]) -> dict[str, Any]:
    """``scores`` whose wrong examples say where they stand and what their texts are."""
    wanted = {example["row"] for example in scores["wrong"]}
    found = {i: row for i, row in enumerate(rows) if i in wanted}
    wrong = [{"where": found[e["row"]].where, "texts": list(found[e["row"]].texts), **e} for e in scores["wrong"]]
    return scores | {"wrong": wrong}
