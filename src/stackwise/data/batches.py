"""Batches as a function of (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stackwise.errors import UserError
from stackwise.randomness import permutation_index

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
    """

    def __init__(self, n_samples: int, batch_size: int, seed: int) -> None:
        self.n_samples, self.batch_size, self.seed = n_samples, batch_size, seed
        self._known = (0, np.empty((2, 0), dtype=np.int64))

    def samples(self, step: int) -> NDArray[np.int64]:
        """Sample ids and epochs, (2, B), of the batch of ``step``; remembers those that follow."""
        place = step * self.batch_size
        first, known = self._known
        if not first <= place <= first + known.shape[1] - self.batch_size:
            first = place
            places = np.arange(first, first + max(self.batch_size, _SAMPLES_AT_ONCE), dtype=np.int64)
            epoch, within = places // self.n_samples, places % self.n_samples
            known = np.stack((permutation_index(within, self.n_samples, self.seed, epoch), epoch))
            known.flags.writeable = False  # batches are views of it
            self._known = first, known
        return known[:, place - first : place - first + self.batch_size]


class Batches:
    """Non-overlapping windows of a token array, in the ``Order`` of their numbers.

    Sample i is tokens[i·T : i·T + T + 1].

    Args:
        tokens: 1-D ids, in memory or memory-mapped.
        seq_len: T.
        batch_size: B.
        seed: of the order.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, batch_size: int, seed: int) -> None:
        self.tokens, self.seq_len, self.batch_size, self.seed = tokens, seq_len, batch_size, seed
        self.n_samples = (len(tokens) - 1) // seq_len
        if self.n_samples < 1:
            raise UserError(
                f"training.seq_len: {seq_len} needs at least {seq_len + 1} training tokens, but the text has "
                f"{len(tokens)}; give more text or a smaller seq_len"
            )
        self._order = Order(self.n_samples, batch_size, seed)

    def batch(self, step: int) -> Batch:
        """The batch of ``step``, from 0."""
        sample, epoch = self._order.samples(step)
        return Batch(windows(self.tokens, sample * self.seq_len, self.seq_len), sample, epoch)


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
