import math

import pytest
import torch

from stackwise.generation.sampling import keep_top_k, keep_top_p, sample, suppress

PROBABILITIES = torch.tensor([[0.05, 0.4, 0.1, 0.3, 0.15], [0.6, 0.1, 0.1, 0.1, 0.1]])


def kept(logits):
    return [[i for i, x in enumerate(row) if x > float("-inf")] for row in logits.tolist()]


@pytest.mark.parametrize(
    "p, sets",
    [
        (0.0, [[1], [0]]),
        (0.39, [[1], [0]]),
        (0.41, [[1, 3], [0]]),
        (0.69, [[1, 3], [0, 1]]),
        (0.71, [[1, 3, 4], [0, 1, 2]]),
        (0.84, [[1, 3, 4], [0, 1, 2, 3]]),
        (0.86, [[1, 2, 3, 4], [0, 1, 2, 3]]),
        (0.96, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        (1.0, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, sets):
    logits = PROBABILITIES.log() + 3.0
    result = keep_top_p(logits, p)
    first, second = kept(result)
    assert first == sets[0]
    assert len(second) == len(sets[1]) and 0 in second  # which of four equals stay does not matter
    remaining = result > float("-inf")
    assert torch.equal(result[remaining], logits[remaining])


def test_top_k_keeps_the_k_largest_and_ties_with_the_last():
    logits = torch.tensor([[0.1, 3.0, -2.0, 3.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    assert kept(keep_top_k(logits, 1)) == [[1, 3], [0]]
    assert kept(keep_top_k(logits, 3)) == [[1, 3, 4], [0, 1, 2]]
    assert torch.equal(keep_top_k(logits, 50), logits)


def test_suppressed_tokens_are_impossible_and_others_untouched():
    result = suppress(PROBABILITIES, [1, 4])
    assert kept(result) == [[0, 2, 3]] * 2
    assert torch.equal(result[:, [0, 2, 3]], PROBABILITIES[:, [0, 2, 3]])
    assert suppress(PROBABILITIES, []) is PROBABILITIES


def test_temperature_zero_is_the_most_likely_token():
    assert sample(PROBABILITIES.log(), 0, torch.Generator()).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax_of_the_logits_over_the_temperature(temperature):
    n = 20000
    logits = PROBABILITIES.log()[:1]
    draws = sample(logits.expand(n, -1), temperature, torch.Generator().manual_seed(0))
    counts = torch.bincount(draws, minlength=5).double()
    expected = n * (logits[0].double() / temperature).softmax(-1)
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 18.5  # 4 degrees of freedom: exceeded once in 1000
    wrong = n * (logits[0].double() / (temperature * 1.1)).softmax(-1)
    assert float(((counts - wrong) ** 2 / wrong).sum()) > 18.5


def test_a_smaller_temperature_sharpens():
    generator = torch.Generator().manual_seed(0)
    draws = sample(PROBABILITIES.log()[:1].expand(500, -1), 0.02, generator)
    assert draws.unique().tolist() == [1]
    assert math.isclose(float(PROBABILITIES.sum()), 2.0, rel_tol=1e-6)
