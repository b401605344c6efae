"""Batches as a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stackwise.errors import UserError
from stackwise.randomness import permutation_index, seed_of

_SAMPLES_AT_ONCE = 1 << 10
"""Places of the stream whose samples are looked up together: for one batch, numpy's calls cost more than the work."""


@dataclass(frozen=True)
class Batch:
    """``tokens`` (B, T + 1) int64, sample id and epoch (B,) of each row.

    ``targets``, where they are given: of positions (B, T) int64; of sequences (B,), int64 classes or float32 numbers.
    ``mask``, where there is padding: boolean (B, T), True where a token is real.
    """

    tokens: NDArray[np.int64]
    sample: NDArray[np.int64]
    epoch: NDArray[np.int64]
    targets: NDArray[np.int64] | NDArray[np.float32] | None = None
    mask: NDArray[np.bool_] | None = None


class Order:
    """The samples 0 to N − 1 in batches, in an order that is new in every epoch.

    Position p of the endless stream is sample π_e(p mod N) of epoch e = p div N, with π_e a permutation that depends on
    (seed, e). There is no iterator state: resuming, several workers and several ranks cannot change the data.

    Of several sources with weights w_k, each has such a stream of its own, and each round of Σ w_k positions takes w_k
    from the stream of source k, spread evenly: the shares are exact in every round, whatever the sources' sizes. The
    epoch of a sample is that of its source.

    Args:
        counts: samples of each source, numbered one source after another.
        batch_size: B.
        seed: of the order.
        weights: of each source.
    """

    def __init__(self, counts: Sequence[int], batch_size: int, seed: int, weights: Sequence[int] = (1,)) -> None:
        self.counts, self.batch_size, self.seed = list(counts), batch_size, seed
        # Occurrence i of source k stands at (2 i + 1) / 2 w_k of a round.
        places = sorted(((2 * i + 1) / (2 * w), k, i) for k, w in enumerate(weights) for i in range(w))
        self._round = np.array([(k, i, weights[k]) for _, k, i in places], dtype=np.int64).T
        self._known = (0, np.empty((2, 0), dtype=np.int64))

    def samples(self, step: int) -> NDArray[np.int64]:
        """Sample ids and epochs, (2, B), of the batch of ``step``; remembers those that follow."""
        place = step * self.batch_size
        first, known = self._known
        if not first <= place <= first + known.shape[1] - self.batch_size:
            first = place
            places = np.arange(first, first + max(self.batch_size, _SAMPLES_AT_ONCE), dtype=np.int64)
            turn, within = np.divmod(places, self._round.shape[1])
            source, occurrence, weight = self._round[:, within]
            known = np.empty((2, len(places)), dtype=np.int64)
            for k, n in enumerate(self.counts):
                own = source == k
                epoch, index = np.divmod(turn[own] * weight[own] + occurrence[own], n)
                # The first source's order is that of a text alone.
                seed = self.seed if k == 0 else seed_of(self.seed, "source", k)
                known[:, own] = permutation_index(index, n, seed, epoch) + sum(self.counts[:k]), epoch
            known.flags.writeable = False  # batches are views of it
            self._known = first, known
        return known[:, place - first : place - first + self.batch_size]


class Batches:
    """Non-overlapping windows of a token array, in the ``Order`` of their numbers.

    Sample i is tokens[i·T : i·T + T + 1] of its source.

    Args:
        tokens: 1-D ids, in memory or memory-mapped.
        seq_len: T.
        batch_size: B.
        seed: of the order.
        sources: (tokens, weight) of each, which lie one after another in ``tokens``; default: all are one.
    """

    def __init__(
        self, tokens: np.ndarray, seq_len: int, batch_size: int, seed: int, sources: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.tokens, self.seq_len, self.batch_size, self.seed = tokens, seq_len, batch_size, seed
        lengths, weights = zip(*(sources or [(len(tokens), 1)]))
        counts = [(length - 1) // seq_len for length in lengths]
        self.n_samples = sum(counts)
        if min(counts) < 1:
            short = lengths[int(np.argmin(counts))]
            raise UserError(
                f"training.seq_len: {seq_len} needs at least {seq_len + 1} training tokens, but the text has "
                f"{short}; give more text or a smaller seq_len"
            )
        self._order = Order(counts, batch_size, seed, weights)
        # Samples are numbered through all sources, each of which ends with tokens that fill no window.
        self._ends = np.cumsum(counts)
        self._shifts = np.cumsum([0, *lengths[:-1]]) - np.array([0, *self._ends[:-1]]) * seq_len

    def batch(self, step: int) -> Batch:
        """The batch of ``step``, from 0."""
        sample, epoch = self._order.samples(step)
        source = np.searchsorted(self._ends, sample, side="right")
        return Batch(windows(self.tokens, sample * self.seq_len + self._shifts[source], self.seq_len), sample, epoch)


def windows(tokens: np.ndarray, starts: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """Rows tokens[s : s + seq_len + 1] of each start, int64."""
    return np.asarray(tokens)[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)


def validation_windows(n_tokens: int, seq_len: int, max_tokens: int | None = None) -> NDArray[np.int64]:
    """Starts of the windows to score: all that follow each other, or at most ``max_tokens`` (one window at least) of
    their targets, spread evenly.
    """
    n = (n_tokens - 1) // seq_len
    if n < 1:
        raise UserError(
            f"training.seq_len: {seq_len} needs at least {seq_len + 1} validation tokens, but there are {n_tokens}; "
            "give more text, a larger data.validation_fraction or a smaller seq_len"
        )
    wanted = n if max_tokens is None else min(n, max(1, max_tokens // seq_len))
    return (np.arange(wanted, dtype=np.int64) * n // wanted) * seq_len
