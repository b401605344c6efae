"""What runs of several recipes with several seeds say: means, deviations, ties, and which recipe to use when."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from stackwise.units import size

CLOSE = 0.05
"""Share of a peak memory within which another one is no other budget."""

MEASURES = {"bits_per_byte": "bits per byte", "loss": "nats per token"}

Spread = dict[str, float | None]
"""``mean`` and ``deviation``; None where there is none."""


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and sample deviation (n - 1), which one value does not have; neither where a value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None, "deviation": None}
    return {"mean": statistics.fmean(known), "deviation": statistics.stdev(known) if len(known) > 1 else None}


def measure_of(runs: Sequence[dict[str, Any]]) -> str:
    """What recipes are ranked by: bits per byte, or the loss where some run has none."""
    return "bits_per_byte" if all(run["validation"]["bits_per_byte"] is not None for run in runs) else "loss"


def is_tie(a: Spread, b: Spread) -> bool:
    """Whether two means differ by no more than the deviation of such a difference: the root of the summed squares.

    Never where a deviation is not known.
    """
    if a["mean"] is None or b["mean"] is None or a["deviation"] is None or b["deviation"] is None:
        return False
    return abs(a["mean"] - b["mean"]) <= math.hypot(a["deviation"], b["deviation"])


def ties_of(row: dict[str, Any], rows: Sequence[dict[str, Any]], measure: str) -> list[str]:
    """The other recipes that tie with ``row``, in the order of ``rows``."""
    return [other["recipe"] for other in rows if other is not row and is_tie(row[measure], other[measure])]


def choices(rows: Sequence[dict[str, Any]], measure: str) -> list[tuple[dict[str, Any], list[str]]]:
    """Which recipe to use with ever less memory, each with the recipes in the same memory that it ties with.

    With all memory it is the best mean; where others tie with it in clearly less memory, the best of those that need
    least. Then the same among the recipes that need clearly less than the one chosen.
    """
    chosen, left = [], list(rows)
    while left:
        best = min(left, key=lambda row: row[measure]["mean"])
        tied = [row for row in left if row is best or is_tie(row[measure], best[measure])]
        least = min(_memory(row) for row in tied)
        pick = min((row for row in tied if _memory(row) * (1 - CLOSE) <= least), key=lambda row: row[measure]["mean"])
        chosen.append((pick, ties_of(pick, left, measure)))
        left = [row for row in left if _memory(row) < _memory(pick) * (1 - CLOSE)]
    return chosen


def number(spread: Spread, digits: int = 4, scale: float = 1.0) -> str:
    """``1.8855 ± 0.0041``; without ``±`` where the deviation is not known, ``–`` where nothing is."""
    if spread["mean"] is None:
        return "–"
    text = f"{spread['mean'] / scale:.{digits}f}"
    return text if spread["deviation"] is None else f"{text} ± {spread['deviation'] / scale:.{digits}f}"


def verdict(rows: Sequence[dict[str, Any]], measure: str) -> str:
    """One sentence: which recipe to use under which memory, and what the seeds cannot tell apart."""
    parts, ties = [], []
    for i, (row, tied) in enumerate(choices(rows, measure)):
        unit = "" if i else f" {MEASURES[measure]}"
        memory = row["peak_memory_bytes"]["mean"]
        where = "" if memory is None else f" from {size(memory)} of memory on" if not i else f" from {size(memory)} on"
        parts.append(f"{row['recipe']} ({number(row[measure])}{unit}){where}")
        if tied:
            ties.append(f"{_listed(tied)} {'ties' if len(tied) == 1 else 'tie'} with {row['recipe']}")
    flops, seeds = rows[0]["flops"]["mean"], len(rows[0]["runs"])
    sentence = f"For {flops:.3g} FLOPs of training use {'; '.join(parts)}"
    if seeds == 1:
        return f"{sentence}; with one seed nobody knows which differences are chance (--seeds 3 shows it)."
    if ties:
        sentence += f"; {', '.join(ties)}: they differ by no more than the deviation over {seeds} seeds"
    return sentence + "."


def _memory(row: dict[str, Any]) -> float:
    """Bytes; where they were not measured, memory decides nothing."""
    memory = row["peak_memory_bytes"]["mean"]
    return 0.0 if memory is None else memory


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
