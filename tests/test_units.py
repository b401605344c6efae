"""Quantities in words, and words as quantities."""

import pytest

from stackwise.errors import UserError
from stackwise.units import count, duration, is_decimal, parse_bytes, parse_seconds, size


@pytest.mark.parametrize(
    ("n_bytes", "words"),
    [
        (None, "–"), (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 1024**2, "5.0 MiB"),
        (24_000_000_000, "22.4 GiB"), (1024**4, "1.0 TiB"), (3 * 1024**5, "3072.0 TiB"),
    ],
)  # fmt: skip
def test_a_size_is_said_in_units_of_1024(n_bytes: float | None, words: str) -> None:
    assert size(n_bytes) == words


@pytest.mark.parametrize(
    ("n_bytes", "words"),
    [(999, "999 B"), (1500, "1.5 kB"), (24_000_000_000, "24.0 GB"), (3 * 10**15, "3000.0 TB")],
)
def test_a_size_is_said_in_units_of_1000_where_they_were_typed(n_bytes: float, words: str) -> None:
    assert size(n_bytes, decimal=True) == words


@pytest.mark.parametrize(
    ("text", "n_bytes", "decimal"),
    [
        ("24GiB", 24 * 1024**3, False), ("16GB", 16 * 10**9, True), ("800M", 800 * 10**6, True), ("7B", 7, False),
        (" 1.5 gib ", 1536 * 1024**2, False), (".5 TB", 5 * 10**11, True), ("3Ki", 3072, False),
    ],
)  # fmt: skip
def test_sizes_are_read_as_they_are_typed(text: str, n_bytes: int, decimal: bool) -> None:
    assert (parse_bytes(text), is_decimal(text)) == (n_bytes, decimal)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90), ("30min", 1800), ("8h", 28800), ("2 days", 172800), ("1h30m", 5400), ("1.5 hours", 5400),
        ("1 minute 5 seconds", 65),
    ],
)  # fmt: skip
def test_times_are_read_as_they_are_typed(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "8 parsecs", "3h!", "-3h", "0s", "1e3s"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--time: "):
        parse_seconds(text)


@pytest.mark.parametrize("text", ["", "GB", "1XB", "-3GB", "3 G i B", "1e3MB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--memory: .* is not a size"):
        parse_bytes(text)


def test_one_is_singular() -> None:
    assert [count(1, "step"), count(3000, "step"), count(0, "phase"), count(2, "corpus", "corpora")] == [
        "1 step", "3,000 steps", "0 phases", "2 corpora",
    ]  # fmt: skip


def test_durations_have_three_digits_at_most() -> None:
    assert [duration(s) for s in (None, 0.4567, 93.4, 750.0, 11520.0, 216000.0)] == [
        "–", "0.457 s", "93.4 s", "12.5 min", "3.2 h", "2.5 days",
    ]  # fmt: skip
