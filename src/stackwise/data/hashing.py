"""Random numbers as functions of where they are used: no generator state, so nothing to save, order or share.

All functions work on arrays and broadcast.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(x: ArrayLike) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words that looks random."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        z = np.asarray(x, dtype=np.uint64) + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hash64(*coordinates: ArrayLike) -> NDArray[np.uint64]:
    """A 64-bit hash of the broadcast integer ``coordinates``, in their order."""
    state = np.uint64(0)
    for coordinate in coordinates:
        state = splitmix64(state ^ np.asarray(coordinate).astype(np.uint64))
    return np.asarray(state)


def uniform(
    seed: int, epoch: ArrayLike, sample: ArrayLike, position: ArrayLike, stream: int = 0
) -> NDArray[np.float64]:
    """Uniform on [0, 1), with 53 bits. ``stream`` gives independent numbers at the same place."""
    return (hash64(stream, seed, epoch, sample, position) >> np.uint64(11)) * 2.0**-53


def permutation_index(index: ArrayLike, n: int, seed: int, epoch: ArrayLike) -> NDArray[np.int64]:
    """Elements ``index`` of a pseudo-random permutation of range(n), in O(1) memory.

    Four Feistel rounds over the smallest 4^w ≥ n; a value outside range(n) is permuted again until it is inside
    ("cycle walking", Black and Rogaway 2002), which keeps the map a bijection.
    """
    half = max(1, ((max(n, 2) - 1).bit_length() + 1) // 2)
    shift, low = np.uint64(half), np.uint64((1 << half) - 1)
    keys = [hash64(0x5045524D, seed, epoch, r) for r in range(4)]

    def permute(x: NDArray[np.uint64], keys: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
        left, right = x >> shift, x & low
        for key in keys:
            left, right = right, left ^ (splitmix64(right ^ key) & low)
        return (left << shift) | right

    x, *spread = np.broadcast_arrays(np.asarray(index).astype(np.uint64), *keys)
    x = permute(x, spread)
    outside = x >= n
    while outside.any():
        x[outside] = permute(x[outside], [key[outside] for key in spread])
        outside = x >= n
    return x.astype(np.int64)
