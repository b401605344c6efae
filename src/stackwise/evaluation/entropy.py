"""How far counting gets one: entropies of single tokens and of pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Entropies:
    """Nats a predicted token of the best unigram and the best bigram table of these very tokens.

    Tables fitted to the tokens that they are scored on are the strictest of their kind: no table learnt from other
    text does better.
    """

    unigram: float
    bigram: float


def ngram_entropies(tokens: np.ndarray, given: frozenset[int] = frozenset()) -> Entropies:
    """H(x_t) and H(x_t | x_{t−1}) of the empirical distribution of ``tokens`` (1-D ids), x_t none of ``given``."""
    tokens = np.asarray(tokens, dtype=np.int64)
    predicted = ~np.isin(tokens, sorted(given))
    before, after = tokens[:-1][predicted[1:]], tokens[1:][predicted[1:]]
    if not len(after):
        raise ValueError(f"{len(tokens)} tokens make no pair; at least 2 are needed")
    _, first = np.unique(before, return_counts=True)
    _, unigram = np.unique(tokens[predicted], return_counts=True)
    width = int(tokens.max()) + 1
    _, pairs = np.unique(before * width + after, return_counts=True)
    return Entropies(_entropy(unigram), _entropy(pairs) - _entropy(first))


def _entropy(counts: np.ndarray) -> float:
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())
