"""Means, deviations, ties and the sentence of a comparison, by hand."""

import math

from stackwise.runs.verdict import choices, is_tie, measure_of, number, spread, ties_of, verdict

MIB = 1024**2


def row(name, bits, memory, seeds=3):
    """A recipe whose runs had these bits per byte, in so many MiB."""
    return {
        "recipe": name,
        "bits_per_byte": spread(bits),
        "peak_memory_bytes": spread([memory * MIB] * seeds),
        "flops": spread([1e12] * seeds),
        "runs": [{}] * seeds,
    }


def test_the_deviation_is_that_of_a_sample():
    assert spread([2.0, 3.0, 7.0]) == {"mean": 4.0, "deviation": math.sqrt((4 + 1 + 9) / 2)}
    assert spread([2.5]) == {"mean": 2.5, "deviation": None}
    assert spread([2.5, None]) == {"mean": None, "deviation": None}
    assert number(spread([1.0, 2.0]), 2) == "1.50 ± 0.71"
    assert number(spread([1.0]), 1) == "1.0" and number(spread([None])) == "–"


def test_a_difference_within_the_deviation_of_a_difference_is_a_tie():
    a, b = {"mean": 1.0, "deviation": 0.3}, {"mean": 1.49, "deviation": 0.4}
    assert is_tie(a, b) and is_tie(b, a)
    assert not is_tie(a, {"mean": 1.51, "deviation": 0.4})
    assert not is_tie(a, {"mean": 1.0, "deviation": None})


def test_bits_per_byte_rank_where_all_runs_have_them():
    known, unknown = ({"validation": {"loss": 2.0, "bits_per_byte": bits}} for bits in (1.3, None))
    assert measure_of([known, known]) == "bits_per_byte" and measure_of([known, unknown]) == "loss"


def test_less_memory_chooses_the_best_that_needs_clearly_less():
    best, middle = row("best", [1.0, 1.01, 1.02], 50), row("middle", [1.2, 1.21, 1.22], 30)
    worse, least = row("worse", [1.3, 1.31, 1.32], 31), row("least", [1.5, 1.51, 1.52], 10)
    near = row("near", [1.1, 1.11, 1.12], 49)  # two per cent less memory is no other budget
    chosen = choices([best, near, middle, worse, least], "bits_per_byte")
    assert [(r["recipe"], ties) for r, ties in chosen] == [("best", []), ("middle", []), ("least", [])]


def test_of_recipes_that_tie_the_one_that_needs_clearly_less_memory_is_chosen():
    best, same = row("best", [1.00, 1.02, 1.04], 50), row("same", [1.01, 1.03, 1.05], 48)
    frugal, other = row("frugal", [1.02, 1.04, 1.06], 20), row("other", [1.9, 1.91, 1.92], 21)
    rows = [best, same, frugal, other]
    assert [(r["recipe"], ties) for r, ties in choices(rows, "bits_per_byte")] == [("frugal", ["best", "same"])]
    # Without the frugal one, two per cent of memory decide nothing, and the mean does.
    assert [(r["recipe"], ties) for r, ties in choices([best, same], "bits_per_byte")] == [("best", ["same"])]
    assert ties_of(best, rows, "bits_per_byte") == ["same", "frugal"]


def test_the_sentence_says_what_to_use_from_which_memory_on_and_what_ties():
    rows = [row("grown", [1.87, 1.89, 1.91], 58), row("late", [1.88, 1.90, 1.92], 57), row("frozen", [2.0] * 3, 32)]
    assert verdict(rows, "bits_per_byte") == (
        "For 1e+12 FLOPs of training use grown (1.8900 ± 0.0200 bits per byte) from 58.0 MiB of memory on; frozen "
        "(2.0000 ± 0.0000) from 32.0 MiB on; late ties with grown: they differ by no more than the deviation over 3 "
        "seeds."
    )


def test_one_seed_calls_nothing_a_tie_and_says_so():
    rows = [row("grown", [1.87], 58, seeds=1), row("late", [1.8701], 30, seeds=1)]
    assert ties_of(rows[0], rows, "bits_per_byte") == []
    assert verdict(rows, "bits_per_byte").endswith(
        "late (1.8701) from 30.0 MiB on; with one seed nobody knows which differences are chance (--seeds 3 shows it)."
    )


def test_where_memory_was_not_measured_the_best_mean_is_chosen():
    rows = [{**row(name, bits, 1), "peak_memory_bytes": spread([None])} for name, bits in (("a", [2.0]), ("b", [1.0]))]
    assert [r["recipe"] for r, _ in choices(rows, "bits_per_byte")] == ["b"]
