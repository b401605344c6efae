"""How far counting gets one: entropies of single tokens and of pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Entropies:
    """Nats a token of the best unigram and the best bigram table of these very tokens.

    Tables fitted to the tokens that they are scored on are the strictest of their kind: no table learnt from other
    text does better.
    """

    unigram: float
    bigram: float


def ngram_entropies(tokens: np.ndarray) -> Entropies:
    """H(x_t) and H(x_t | x_{t−1}) of the empirical distribution of ``tokens`` (1-D ids)."""
    tokens = np.asarray(tokens, dtype=np.int64)
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens have no pairs")
    _, first = np.unique(tokens[:-1], return_counts=True)
    _, unigram = np.unique(tokens, return_counts=True)
    width = int(tokens.max()) + 1
    _, pairs = np.unique(tokens[:-1] * width + tokens[1:], return_counts=True)
    return Entropies(_entropy(unigram), _entropy(pairs) - _entropy(first))


def _entropy(counts: np.ndarray) -> float:
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())
