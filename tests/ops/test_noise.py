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


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential", "equal_difficulty"])
def test_one_interval_is_all_of_it(kind):
    difficulty = [(0.3, 1.0), (0.7, 2.0)] if kind == "equal_difficulty" else None
    assert thresholds(kind, 1, difficulty=difficulty) == (1.0, 0.0)


def test_a_list_is_taken_as_it_is():
    assert thresholds("list", 3, levels=[1.0, 0.31, 0.07, 0.0]) == (1.0, 0.31, 0.07, 0.0)


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


def test_equal_difficulty_of_a_straight_line_has_its_closed_form():
    a, b, k = 0.7, 2.9, 7
    # a r + (b − a) r²/2 = (1 − i/k) (a + b)/2
    expected = [(math.sqrt(a * a + (b - a) * (1 - i / k) * (a + b)) - a) / (b - a) for i in range(k + 1)]
    assert thresholds("equal_difficulty", k, difficulty=[(0.0, a), (1.0, b)]) == pytest.approx(expected, abs=1e-12)


def test_the_order_of_the_points_of_a_difficulty_does_not_matter():
    curve = [(0.1, 1.0), (0.5, 1.5), (0.9, 3.0)]
    assert thresholds("equal_difficulty", 3, difficulty=curve[::-1]) == thresholds(
        "equal_difficulty", 3, difficulty=curve
    )


def test_a_level_is_found_at_the_foot_of_a_curve_that_all_but_touches_zero():
    foot = 0.6942270909303152
    curve = [(0.0, 5.555462116782042), (foot, 8.211989896952855e-16), (1.0, 12.613126244052657)]
    assert thresholds("equal_difficulty", 2, difficulty=curve) == pytest.approx((1.0, foot, 0.0), abs=1e-6)


@pytest.mark.parametrize(
    "levels, message",
    [
        ((1.0, 0.5, 0.15), "stop above 0"),
        ((0.9, 0.4, 0.0), "must fall, from 1 on"),
        ((1.0, 0.4, 0.4, 0.0), "must fall"),
        ((1.0, 0.4, 0.5, 0.0), "must fall"),
        ((1.0, math.nan, 0.0), "must fall"),
        ((1.0, 0.5, -0.1), "end at 0"),
        ((1.0, 0.0), "2 intervals need 3"),
    ],
)
def test_a_list_that_is_no_way_from_one_to_zero_is_refused(levels, message):
    with pytest.raises(ValueError, match=message):
        thresholds("list", len(levels) - 1 if "need" not in message else 2, levels=levels)


@pytest.mark.parametrize(
    "difficulty",
    [
        None,
        [(0.2, 1.0), (0.2, 2.0)],
        [(0.2, 0.0)],
        [(-0.1, 1.0)],
        [(0.3, 2.0), (1.1, 1.0)],
        [(0.1, 1.0), (math.nan, 1.0)],
        [(0.1, 1.0), (0.3, math.nan)],
        [(0.1, math.inf)],
    ],
)
def test_a_difficulty_that_is_no_curve_is_refused(difficulty):
    with pytest.raises(ValueError, match="difficulty needs"):
        thresholds("equal_difficulty", 2, difficulty=difficulty)


def test_intervals_are_cut_into_equal_steps():
    assert divided((1.0, 0.4, 0.0), 2) == pytest.approx((1.0, 0.7, 0.4, 0.2, 0.0))
    assert divided((1.0, 0.0), 1) == (1.0, 0.0)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_cutting_intervals_keeps_their_ends_and_their_sum(steps):
    levels = thresholds("cosine", 5)
    fine = divided(levels, steps)
    assert fine[::steps] == levels and check_levels(fine, 5 * steps) == fine
    widths = [high - low for high, low in pairwise(fine)]
    assert math.fsum(widths) == pytest.approx(1.0, abs=1e-15)
    for i in range(5):
        assert widths[i * steps : (i + 1) * steps] == pytest.approx([(levels[i] - levels[i + 1]) / steps] * steps)


def test_no_intervals_no_steps_no_list_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="0 intervals; allowed: 1 and above"):
        thresholds("linear", 0)
    with pytest.raises(ValueError, match="steps is 0; allowed: 1 and above"):
        divided((1.0, 0.0), 0)
    with pytest.raises(ValueError, match="levels are none; 2 intervals need 3"):
        thresholds("list", 2)
    with pytest.raises(ValueError, match="levels are 'square'; allowed: linear, cosine, exponential"):
        thresholds("square", 2)
    with pytest.raises(ValueError, match="levels are none; they must fall"):
        check_levels(())
