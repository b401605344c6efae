import math
from itertools import pairwise

import pytest

from stackwise.ops.noise import check_levels, divided, thresholds


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_levels_fall_from_one_to_exactly_zero(kind, k):
    levels = thresholds(kind, k)
    assert check_levels(levels, k) == levels and len(levels) == k + 1


def test_levels_have_their_closed_forms():
    assert thresholds("linear", 4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert thresholds("cosine", 3) == pytest.approx((1.0, math.sqrt(3) / 2, 0.5, 0.0))
    assert thresholds("exponential", 4) == (1.0, 0.5, 0.25, 0.125, 0.0)


def area(curve, low, high, n=20_000):
    """Under straight lines between the points of ``curve``, which is level outside."""

    def value(r):
        for (a, x), (b, y) in pairwise(curve):
            if a <= r <= b:
                return x + (y - x) * (r - a) / (b - a)
        return curve[0][1] if r < curve[0][0] else curve[-1][1]

    return sum(value(low + (high - low) * (i + 0.5) / n) for i in range(n)) * (high - low) / n


@pytest.mark.parametrize("curve", [[(0.1, 1.0), (0.5, 1.5), (0.9, 3.0)], [(0.0, 2.0), (1.0, 0.5)], [(0.3, 1.7)]])
def test_equal_difficulty_has_equal_areas_under_the_curve(curve):
    levels = thresholds("equal_difficulty", 5, difficulty=curve)
    areas = [area(curve, low, high, 2000) for high, low in pairwise(levels)]
    assert areas == pytest.approx([sum(areas) / 5] * 5, rel=1e-3)
    if len({c for _, c in curve}) == 1:
        assert levels == pytest.approx(thresholds("linear", 5))


@pytest.mark.parametrize(
    "levels, message",
    [
        ((1.0, 0.5, 0.15), "stop above 0"),
        ((0.9, 0.4, 0.0), "must fall, from 1 on"),
        ((1.0, 0.4, 0.4, 0.0), "must fall"),
        ((1.0, 0.0), "2 intervals need 3"),
    ],
)
def test_a_list_that_is_no_way_from_one_to_zero_is_refused(levels, message):
    with pytest.raises(ValueError, match=message):
        thresholds("list", len(levels) - 1 if "need" not in message else 2, levels=levels)


@pytest.mark.parametrize(
    "difficulty", [None, [(0.2, 1.0), (0.2, 2.0)], [(0.2, 0.0)], [(-0.1, 1.0)]]
)  # fmt: skip
def test_a_difficulty_that_is_no_curve_is_refused(difficulty):
    with pytest.raises(ValueError, match="difficulty needs"):
        thresholds("equal_difficulty", 2, difficulty=difficulty)


def test_intervals_are_cut_into_equal_steps():
    assert divided((1.0, 0.4, 0.0), 2) == pytest.approx((1.0, 0.7, 0.4, 0.2, 0.0))
    assert divided((1.0, 0.0), 1) == (1.0, 0.0)
