import math

import pytest
import torch

from stackwise.generation.sampling import (
    UniformStreams,
    check_draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_token,
    row_seeds,
    sample,
    suppress,
)

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


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_top_p_of_0_keeps_one_token_and_of_1_all_whatever_is_rounded(p):
    logits = torch.randn(2, 5003, generator=torch.Generator().manual_seed(0)) * 9
    logits[1] = 0.0  # equals: the first stays
    result = kept(keep_top_p(logits, p))
    assert result == ([[int(logits[0].argmax())], [0]] if p == 0 else [list(range(5003))] * 2)


@pytest.mark.parametrize(
    "p, sets",
    [  # of the largest, 0.4: 0.05 is 1/8, 0.1 is 1/4, 0.15 is 3/8, 0.3 is 3/4; of 0.6: 0.1 is 1/6
        (0.0, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        (0.12, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        (0.13, [[1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        (0.17, [[1, 2, 3, 4], [0]]),
        (0.26, [[1, 3, 4], [0]]),
        (0.38, [[1, 3], [0]]),
        (0.74, [[1, 3], [0]]),
        (0.76, [[1], [0]]),
        (1.0, [[1], [0]]),
    ],
)
def test_min_p_keeps_tokens_of_at_least_p_times_the_largest_probability(p, sets):
    logits = PROBABILITIES.log() - 2.0
    result = keep_min_p(logits, p)
    assert kept(result) == sets
    remaining = result > float("-inf")
    assert torch.equal(result[remaining], logits[remaining])


def test_min_p_of_1_keeps_equals_of_the_largest_and_of_0_leaves_suppressed_tokens_out():
    logits = torch.tensor([[2.0, 3.0, 3.0, float("-inf"), 1.0]])
    assert kept(keep_min_p(logits, 1.0)) == [[1, 2]]
    assert kept(keep_min_p(logits, 0.0)) == [[0, 1, 2, 4]]


def draws(logits, n=20000, **settings):
    """How often each token comes, when the numbers of the draw cover [0, 1) evenly."""
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.bincount(next_token(logits.expand(n, -1), uniform, **settings), minlength=logits.shape[-1]).double()


def test_temperature_zero_is_the_most_likely_token_that_is_not_suppressed():
    assert next_token(PROBABILITIES.log(), None, temperature=0).tolist() == [1, 0]
    assert next_token(PROBABILITIES.log(), None, [0, 1], temperature=0).tolist() == [3, 2]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax_of_the_logits_over_the_temperature(temperature):
    n, logits = 20000, PROBABILITIES.log()[:1]
    expected = n * (logits[0].double() / temperature).softmax(-1)
    assert (draws(logits, n, temperature=temperature) - expected).abs().max() <= 1
    wrong = n * (logits[0].double() / (temperature * 1.1)).softmax(-1)
    assert (draws(logits, n, temperature=temperature) - wrong).abs().max() > 100


@pytest.mark.parametrize("temperature", [1e-30, 1e-320, 1e30])
def test_extreme_temperatures_sharpen_and_flatten(temperature):
    logits = suppress(torch.tensor([[2e4, 3e4, -1e4]]), [0])
    shares = draws(logits, 1000, temperature=temperature)
    assert shares.tolist() == ([0, 1000, 0] if temperature < 1 else [0, 500, 500])


@pytest.mark.parametrize(
    "settings, shares",
    [
        # squared and renormalised, 0.05 0.4 0.1 0.3 0.15 are 1 64 4 36 9 out of 114
        ({"temperature": 0.5}, [1, 64, 4, 36, 9]),
        ({"temperature": 0.5, "top_p": 0.6}, [0, 64, 0, 36, 0]),
        ({"temperature": 0.5, "min_p": 0.1}, [0, 64, 0, 36, 9]),
        ({"temperature": 1.0, "min_p": 0.1}, [5, 40, 10, 30, 15]),
        # of the three that top-k leaves, out of 85, the first two have 70/85 = 0.82; of all they have 0.7
        ({"top_k": 3, "top_p": 0.8}, [0, 40, 0, 30, 0]),
        ({"top_k": 3, "top_p": 0.83}, [0, 40, 0, 30, 15]),
        ({"top_p": 0.8}, [0, 40, 0, 30, 15]),
        # top-p of a half leaves 0.4 and 0.3, were min-p applied before, 0.4 alone would have 1
        ({"top_p": 0.5, "min_p": 0.7}, [0, 40, 0, 30, 0]),
        ({"top_p": 0.5, "min_p": 0.8}, [0, 40, 0, 0, 0]),
        ({"top_k": 2, "suppressed_ids": [1]}, [0, 0, 0, 30, 15]),
    ],
)
def test_filters_apply_in_order(settings, shares):
    expected = torch.tensor(shares, dtype=torch.float64)
    n = 20000
    assert (draws(PROBABILITIES.log()[:1], n, **settings) - n * expected / expected.sum()).abs().max() <= 1


def test_a_draw_of_any_number_takes_a_token_that_is_possible():
    logits = torch.full((3, 1009), float("-inf"))
    logits[:, [7, 500]] = torch.tensor([0.0, -30.0])
    edge = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert sample(logits, edge).tolist() == [7, 7, 500]


def test_streams_of_rows_are_those_of_their_seeds_alone():
    seeds = row_seeds(11, 5)
    assert seeds[0] == 11 and len({seed % 2**32 for seed in row_seeds(11, 10007)}) == 10007
    streams = UniformStreams(seeds)
    together = torch.stack([streams.next() for _ in range(4)])
    for row, seed in enumerate(seeds):
        alone = UniformStreams([seed])
        assert torch.equal(together[:, row], torch.cat([alone.next() for _ in range(4)]))
    assert len(together.unique()) == 20 and together.min() >= 0 and together.max() < 1


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1}, {"temperature": math.inf}, {"temperature": math.nan}, {"top_k": 0},
        {"top_p": -0.1}, {"top_p": 1.1}, {"min_p": math.nan}, {"min_p": 2.0},
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused_by_name_and_value(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"^{name} is {value}; allowed: "):
        check_draw(**settings)
    check_draw(temperature=0.0, top_k=1, top_p=0.0, min_p=1.0)
