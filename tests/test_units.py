"""Sizes in words."""

import pytest

from stackwise.units import size


@pytest.mark.parametrize(
    ("n_bytes", "words"),
    [
        (None, "–"), (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 1024**2, "5.0 MiB"),
        (24_000_000_000, "22.4 GiB"), (1024**4, "1.0 TiB"), (3 * 1024**5, "3072.0 TiB"),
    ],
)  # fmt: skip
def test_a_size_is_said_in_units_of_1024(n_bytes: float | None, words: str) -> None:
    assert size(n_bytes) == words
