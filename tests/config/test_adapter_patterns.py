"""Ranks and alphas of stack adapters against their closed forms."""

import math

import pytest

from stackwise.config.growth import QLoRAConfig


def adapters(n: int, **settings: object) -> list[tuple[int, float]]:
    qlora = QLoRAConfig.model_validate({"enabled": True, "rank": 7, "alpha": 11.0, **settings})
    return [qlora.stack_adapter(k, n) for k in range(n)]


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_simplified_gives_every_stack_the_same(n: int) -> None:
    assert adapters(n) == [(7, 11.0)] * n


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 13, 80])
def test_increasing_is_the_share_of_the_stacks_up_to_this_one(n: int) -> None:
    found = adapters(n, strategy="progressive", rank_pattern="increasing", alpha_pattern="increasing")
    assert [rank for rank, _ in found] == [-(-7 * (k + 1) // n) for k in range(n)]  # rounded up, exactly
    assert [alpha for _, alpha in found] == pytest.approx([11.0 * (k + 1) / n for k in range(n)])
    assert found[-1] == (7, 11.0)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 13, 80])
def test_decreasing_is_increasing_read_from_the_right(n: int) -> None:
    patterns = {"strategy": "progressive", "rank_pattern": "decreasing", "alpha_pattern": "decreasing"}
    found = adapters(n, **patterns)
    assert [rank for rank, _ in found] == [math.ceil((7 * (n - k)) / n - 1e-12) for k in range(n)]
    assert found[0] == (7, 11.0)
    rising = {"strategy": "progressive", "rank_pattern": "increasing", "alpha_pattern": "increasing"}
    assert found == adapters(n, **rising)[::-1]


def test_rank_and_alpha_follow_patterns_of_their_own() -> None:
    assert adapters(3, strategy="progressive", rank_pattern="decreasing") == [(7, 11.0), (5, 11.0), (3, 11.0)]


def test_variable_lists_a_number_for_each_stack() -> None:
    assert adapters(3, strategy="variable", rank_pattern=(5, 2, 3)) == [(5, 11.0), (2, 11.0), (3, 11.0)]
    assert adapters(2, strategy="variable", rank_pattern=(5, 2), alpha_pattern=(1.5, 0.5)) == [(5, 1.5), (2, 0.5)]


@pytest.mark.parametrize(
    "settings, varies",
    [
        ({}, False),
        ({"strategy": "progressive", "rank_pattern": "increasing"}, True),
        ({"strategy": "variable", "rank_pattern": (1, 1)}, True),
        ({"enabled": False, "strategy": "variable", "rank_pattern": (1, 1)}, False),
    ],
)
def test_adapters_vary_where_there_are_any_and_a_pattern(settings: dict[str, object], varies: bool) -> None:
    assert QLoRAConfig.model_validate({"enabled": True, **settings}).varies is varies
