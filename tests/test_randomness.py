import hashlib

import numpy as np
import pytest
import torch

from stackwise.randomness import generator, permutation_index, seed_of, splitmix64, uniform


def test_splitmix64_gives_the_published_sequence() -> None:
    # The first outputs of the reference generator (https://prng.di.unimi.it/splitmix64.c) from the state 1234567.
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + k * gamma) % 2**64 for k in range(3)], dtype=np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 101, 1000, 4096, 4097, 65537])
def test_permutation_holds_every_index_once(n: int) -> None:
    for epoch in range(3):
        assert np.array_equal(np.sort(permutation_index(np.arange(n), n, 11, epoch)), np.arange(n))


def test_permutation_of_a_large_range_stays_inside_and_does_not_repeat() -> None:
    n = 3 * 10**12 + 7
    chosen = permutation_index(np.arange(n - 10007, n), n, 5, 2)
    assert chosen.min() >= 0 and chosen.max() < n and len(np.unique(chosen)) == 10007
    assert abs(chosen.mean() / n - 0.5) < 0.02


def test_permutation_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    index, n = np.arange(997), 997
    first = permutation_index(index, n, 3, 0)
    assert np.array_equal(first, permutation_index(index, n, 3, 0))
    assert (first == permutation_index(index, n, 3, 1)).mean() < 0.02
    assert (first == permutation_index(index, n, 4, 0)).mean() < 0.02
    assert (first == index).mean() < 0.02


def test_permutation_of_several_epochs_at_once_equals_each_alone() -> None:
    index, epoch = np.array([[0, 5], [12, 3]]), np.array([[4], [9]])
    together = permutation_index(index, 13, 1, epoch)
    assert together.tolist() == [[int(permutation_index(i, 13, 1, e[0])) for i in row] for row, e in zip(index, epoch)]


def test_every_element_of_a_permutation_lands_everywhere_equally_often() -> None:
    n, epochs = 11, 20000
    landed = permutation_index(np.full(epochs, 4), n, 1, np.arange(epochs))
    counts = np.bincount(landed, minlength=n)
    assert np.abs(counts - epochs / n).max() < 5 * np.sqrt(epochs / n)


@pytest.mark.parametrize("index", [-1, 7])
def test_permutation_refuses_an_index_outside_its_range(index: int) -> None:
    with pytest.raises(ValueError, match=r"range\(7\)"):
        permutation_index(index, 7, 0, 0)


def test_uniform_fills_the_unit_interval_evenly() -> None:
    u = uniform(7, 0, np.arange(300)[:, None], np.arange(331))
    assert u.shape == (300, 331) and u.dtype == np.float64
    assert u.min() >= 0.0 and u.max() < 1.0
    counts, _ = np.histogram(u, bins=20, range=(0, 1))
    chi2 = ((counts - u.size / 20) ** 2 / (u.size / 20)).sum()
    assert chi2 < 45  # 19 degrees of freedom: exceeded once in a thousand


def uncorrelated(u: np.ndarray, v: np.ndarray) -> bool:
    return bool(abs(np.corrcoef(u.ravel(), v.ravel())[0, 1]) < 4 / np.sqrt(u.size))


@pytest.mark.parametrize("change", ["seed", "stream", "epoch"])
def test_uniform_is_independent_between_neighbouring_seeds_streams_and_epochs(change: str) -> None:
    at = {"seed": 3, "stream": 1, "epoch": 2, "sample": np.arange(101)[:, None], "position": np.arange(103)}
    assert uncorrelated(uniform(**at), uniform(**at | {change: at[change] + 1}))


def test_uniform_is_independent_between_neighbouring_samples_and_positions() -> None:
    u = uniform(3, 2, np.arange(101)[:, None], np.arange(103))
    assert uncorrelated(u[1:], u[:-1]) and uncorrelated(u[:, 1:], u[:, :-1])


def test_uniform_of_swapped_coordinates_differs() -> None:
    assert uniform(0, 1, 2, 3) != uniform(0, 2, 1, 3) != uniform(0, 1, 3, 2)


def test_uniform_takes_the_largest_seed_and_broadcasts_numbers() -> None:
    assert 0.0 <= uniform(2**63 - 1, 0, 0, 0) < 1.0
    grid = uniform(2**63 - 1, np.array([0, 1])[:, None], 5, np.arange(3))
    assert grid[1, 2] == uniform(2**63 - 1, 1, 5, 2)


def test_a_stream_starts_from_the_sha256_of_its_coordinates() -> None:
    """Written down by hand, since weights that are drawn anew must stay what they are."""
    text = b"(5, 'stack', 3)"
    start = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") // 2
    assert seed_of(5, "stack", 3) == start < 2**63
    drawn = torch.rand(7, generator=generator(5, "stack", 3))
    assert torch.equal(drawn, torch.rand(7, generator=torch.Generator().manual_seed(start)))
    others = [
        generator(*c) for c in ((6, "stack", 3), (5, "stack", 4), (5, "stacks", 3), (5, "stack"), (5, 3, "stack"))
    ]
    assert not any(torch.equal(drawn, torch.rand(7, generator=other)) for other in others)
