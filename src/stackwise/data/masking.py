"""Masks as pure functions of u = hash(seed, epoch, sample, position).

B sequences, T tokens.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stackwise.data.hashing import uniform
from stackwise.ops.losses import IGNORE

WHICH, HOW, WHAT = 1, 2, 3
"""Independent streams: which tokens are picked, how each is hidden, what it is replaced by."""


def bert_mask(
    tokens: NDArray[np.int64],
    epoch: NDArray[np.int64],
    sample: NDArray[np.int64],
    *,
    seed: int,
    rate: float,
    mask_share: float,
    random_share: float,
    mask_id: int,
    special_ids: frozenset[int],
    vocab_size: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Inputs and targets of masked language modelling (BERT, 1810.04805 §3.1), both (B, T).

    A token is picked when its u < ``rate``: nested in the rate, and new in every epoch. Of the picked, ``mask_share``
    become ``mask_id``, ``random_share`` a random ordinary token, the rest stay. ``special_ids`` are never picked and
    never drawn. Targets are ``IGNORE`` where nothing was picked.

    Args:
        tokens: (B, T); epoch, sample: (B,), where each row comes from.
    """
    special, ordinary = _vocabulary(special_ids, vocab_size)
    u = uniform(seed, epoch[:, None], sample[:, None], np.arange(tokens.shape[1]), stream=WHICH)
    picked = (u < rate) & ~special[tokens]
    targets = np.where(picked, tokens, IGNORE)
    row, position = np.nonzero(picked)
    place = (epoch[row], sample[row], position)
    how = uniform(seed, *place, stream=HOW)
    drawn = ordinary[(uniform(seed, *place, stream=WHAT) * len(ordinary)).astype(np.int64)]
    inputs = tokens.copy()
    hidden = np.where(how < mask_share, mask_id, drawn)
    inputs[row, position] = np.where(how < mask_share + random_share, hidden, tokens[row, position])
    return inputs, targets


@lru_cache(maxsize=8)
def _vocabulary(special_ids: frozenset[int], vocab_size: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Whether each id is special, and the ids that are not."""
    special = np.zeros(vocab_size, dtype=bool)
    special[sorted(special_ids)] = True
    ordinary = np.flatnonzero(~special)
    special.flags.writeable = ordinary.flags.writeable = False
    return special, ordinary
