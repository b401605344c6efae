"""Masks as pure functions of u = hash(seed, epoch, sample, position).

B sequences, T tokens.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stackwise.ops.losses import IGNORE
from stackwise.randomness import uniform

WHICH, HOW, WHAT, SPAN = 1, 2, 3, 4
"""Independent streams: which tokens are picked, how each is hidden, what it is replaced by, where spans begin."""

Unit = Literal["token", "word", "span"]


def mask_uniforms(
    tokens: NDArray[np.int64],
    epoch: NDArray[np.int64],
    sample: NDArray[np.int64],
    *,
    seed: int,
    unit: Unit = "token",
    starts: NDArray[np.bool_] | None = None,
    span_length: float = 3.0,
) -> NDArray[np.float64]:
    """u of each position, (B, T), uniform on [0, 1).

    A token is masked at the rate r when u < r: so masks are nested in the rate, and one u is a whole trajectory from
    nothing masked to everything.

    Args:
        tokens: (B, T); epoch, sample: (B,), where each row comes from.
        unit: token: each has its own u; word: the tokens of a word share that of its first one; span: neighbours share
            it, in spans of geometric length (SpanBERT, 1907.10529 §3.1).
        starts: (V,), for words: which tokens begin one. The first position does too.
        span_length: mean length of a span, at least 1.
    """
    place = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    epoch, sample = epoch[:, None], sample[:, None]
    if unit != "token":
        if unit == "word":
            if starts is None:
                raise ValueError("unit word requires starts, which says where words begin")
            begins = starts[tokens]
        else:
            if span_length < 1.0:
                raise ValueError(f"span_length is {span_length}; allowed: 1 and above")
            begins = uniform(seed, epoch, sample, place, stream=SPAN) < 1.0 / span_length
        place = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    return uniform(seed, epoch, sample, place, stream=WHICH)


def protected(tokens: NDArray[np.int64], special_ids: frozenset[int], vocab_size: int) -> NDArray[np.bool_]:
    """(B, T): the tokens that are never masked."""
    return _vocabulary(special_ids, vocab_size)[0][tokens]


def rate_mask(u: NDArray[np.float64], rate: float | NDArray[np.float64], fixed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(B, T): u < ``rate`` (a number, or one a row as (B, 1)) where not ``fixed``."""
    return (u < rate) & ~fixed


def count_mask(u: NDArray[np.float64], count: NDArray[np.int64], fixed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(B, T): in each row exactly ``count`` (B,) of the positions that are not ``fixed``, those with the smallest u.

    Equal u are taken from left to right. ValueError where there are fewer.
    """
    there = (~fixed).sum(axis=1)
    if (count > there).any() or (count < 0).any():
        row = int(np.flatnonzero((count > there) | (count < 0))[0])
        raise ValueError(f"row {row} has {there[row]} positions that can be masked; {count[row]} were asked for")
    order = np.argsort(np.where(fixed, np.inf, u), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(u.shape[1]), u.shape), axis=1)
    return np.asarray(rank < count[:, None])


def bert_mask(
    tokens: NDArray[np.int64],
    epoch: NDArray[np.int64],
    sample: NDArray[np.int64],
    *,
    seed: int,
    rate: float | NDArray[np.float64],
    mask_share: float,
    random_share: float,
    mask_id: int,
    special_ids: frozenset[int],
    vocab_size: int,
    unit: Unit = "token",
    starts: NDArray[np.bool_] | None = None,
    span_length: float = 3.0,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Inputs and targets of masked language modelling (BERT, 1810.04805 §3.1), both (B, T).

    A token is picked when its u < ``rate``: nested in the rate, and new in every epoch. Of the picked, ``mask_share``
    become ``mask_id``, ``random_share`` a random ordinary token, the rest stay; each token by itself, in words and
    spans too. ``special_ids`` are never picked and never drawn. Targets are ``IGNORE`` where nothing was picked.

    Args:
        tokens: (B, T); epoch, sample: (B,), where each row comes from.
        rate: a number, or one a row, (B,).
        unit, starts, span_length: see ``mask_uniforms``.
    """
    _, ordinary = _vocabulary(special_ids, vocab_size)
    u = mask_uniforms(tokens, epoch, sample, seed=seed, unit=unit, starts=starts, span_length=span_length)
    picked = rate_mask(u, np.reshape(rate, (-1, 1)), protected(tokens, special_ids, vocab_size))
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
