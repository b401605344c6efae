"""Random numbers as functions of where they are used: no generator state, so nothing to save, order or share.

Two ways: hashes of integer coordinates, one number for each place of an array (masks, the order of samples, noise
levels), and a generator for each named stream, for tensors drawn whole (weights, dropout, rounding).
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_PERMUTATION = 0x5045524D  # the stream of permutations; others are small numbers
_ROUNDS = 6


def seed_of(seed: int, *stream: int | str) -> int:
    """63 bits that depend on ``seed`` and the names and numbers of what is drawn, and on nothing else."""
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *stream: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that starts from ``seed_of`` the same. Numbers differ between kinds of devices."""
    return torch.Generator(device).manual_seed(seed_of(seed, *stream))


def splitmix64(x: ArrayLike) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words that looks random."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        z = np.asarray(x, dtype=np.uint64) + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hash64(*coordinates: ArrayLike) -> NDArray[np.uint64]:
    """A 64-bit hash of the broadcast integer ``coordinates``, in their order; arrays broadcast, as below."""
    state = np.zeros((), dtype=np.uint64)
    for coordinate in coordinates:
        state = splitmix64(state ^ np.asarray(coordinate).astype(np.uint64))
    return state


def uniform(
    seed: int, epoch: ArrayLike, sample: ArrayLike, position: ArrayLike, stream: int = 0
) -> NDArray[np.float64]:
    """Uniform on [0, 1), with 53 bits. ``stream`` gives independent numbers at the same place."""
    return (hash64(stream, seed, epoch, sample, position) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation_index(index: ArrayLike, n: int, seed: int, epoch: ArrayLike) -> NDArray[np.int64]:
    """Elements ``index`` of the pseudo-random permutation of range(n) that (seed, epoch) names, in O(1) memory.

    Feistel rounds over pairs (left, right) of Z_a × Z_b with a·b ≥ n and a ≈ b ≈ √n; a value outside range(n) is
    permuted again until it is inside ("cycle walking", Black and Rogaway 2002), which keeps the map a bijection. The
    domain exceeds n by at most about √n, so that this is rare; over a power of two it would be the rule.

    Raises:
        ValueError: an index outside range(n).
    """
    wanted, epochs = np.broadcast_arrays(np.asarray(index, dtype=np.int64), np.asarray(epoch))
    if n < 1 or (wanted.size and (wanted.min() < 0 or wanted.max() >= n)):
        raise ValueError(f"an index lies outside range({n})")
    keys = hash64(_PERMUTATION, seed, epochs.ravel(), np.arange(_ROUNDS)[:, None])  # (rounds, size of index)
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    x = _permute(wanted.ravel().astype(np.uint64), keys, a, b)
    while (outside := np.flatnonzero(x >= n)).size:
        x[outside] = _permute(x[outside], keys[:, outside], a, b)
    return x.astype(np.int64).reshape(wanted.shape)


def _permute(x: NDArray[np.uint64], keys: NDArray[np.uint64], a: int, b: int) -> NDArray[np.uint64]:
    """A bijection of range(a·b), whatever the keys: each round adds to one half what depends on the other alone."""
    left, right = np.divmod(x, np.uint64(b))
    for number, key in enumerate(keys):
        if number % 2:
            right = (right + (splitmix64(key ^ left) >> np.uint64(16))) % np.uint64(b)
        else:
            left = (left + (splitmix64(key ^ right) >> np.uint64(16))) % np.uint64(a)
    return left * np.uint64(b) + right
