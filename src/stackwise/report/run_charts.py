"""The pictures of a run, and of several runs in the same axes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stackwise.growth.phases import Phase
from stackwise.report.chart import Axis, Chart, smoothed, thinned
from stackwise.report.facts import Facts
from stackwise.report.theme import is_dashed, series
from stackwise.units import size, size_unit

UNITS = {"flops": "FLOPs", "tokens": "tokens"}
STATES = {
    "new": "new Stack, trains",
    "trained": "trains",
    "adapted": "frozen, its adapters train",
    "frozen": "frozen",
}
"""Of a Stack in a phase; the names are colours of the theme."""

MOST_NAMED = 8
"""Phases whose names and validations there is room to write."""

MOST_DOTS = 60
"""Validations that are drawn as dots."""

LEAST_STACKS = 4
"""For which there is room in the picture of a Rack, so that a single one is no wall."""


def state_of(phase: Phase, stack: int) -> str:
    """One of ``STATES``."""
    if any(new.stack == stack for new in phase.growth):
        return "new"
    if stack in phase.trained_stacks:
        return "trained"
    return "adapted" if any(adapter.stack == stack and adapter.trains for adapter in phase.adapters) else "frozen"


def what_trains(phase: Phase) -> str:
    """How many of the Stacks of ``phase`` train."""
    count, all_of = len(phase.trained_stacks & set(phase.stacks)), len(phase.stacks)
    if count == all_of:
        return "all trains" if all_of > 1 else "trains"
    return f"{count} of {all_of} trains"


def losses(facts: Facts, unit: str) -> Chart:
    """Training loss, phase by phase, and the validation loss where there is one, over FLOPs or tokens."""
    x, loss = facts.column(unit), facts.column("loss")
    points = _validations(facts, unit)
    y_axis = _loss_axis([loss], [value for _, value, _ in points])
    edges = facts.edges(unit)
    end = max([float(x[-1]), *edges])  # of a run in progress, metrics are ahead of the last checkpoint's records
    chart = Chart(f"Loss over {UNITS[unit]}", Axis(0.0, end, UNITS[unit]), y_axis)
    for k in range(1, len(edges), 2):
        chart.bar((edges[k], edges[k + 1] if k + 1 < len(edges) else end), (y_axis.low, y_axis.high), "band")
    phases = np.array([line.phase for line in facts.lines])
    for name in dict.fromkeys(phases.tolist()):
        chosen = phases == name
        chart.line(*thinned(x[chosen], loss[chosen]), "s0", thick=0.9, opacity=0.35)
        chart.line(*thinned(x[chosen], smoothed(loss[chosen], len(loss) / 25)), "s0")
    _draw_validations(chart, points, "s3")
    unit_of_dots = _name_phases(chart, facts, unit, end) if len(facts.records) <= MOST_NAMED else ""
    chart.keys = [("s0", "training"), *([("s3", f"validation{unit_of_dots}")] if points else [])]
    return chart


def _name_phases(chart: Chart, facts: Facts, unit: str, end: float) -> str:
    """Writes the names of phases above them where there is room, and beside each end its validation.

    Returns:
        What to add to "validation": the unit of those numbers.
    """
    per_byte = all(record["bits_per_byte"] is not None for record in facts.records)
    edges = facts.edges(unit)
    at = [(getattr(line, unit), line.loss, line.phase) for line in facts.lines]
    for record, left, right in zip(facts.records, edges, edges[1:]):
        width = (right - left) / end * chart.inner_width
        if width > 6.4 * len(record["name"]):
            chart.words((left + right) / 2, chart.y.high, record["name"], dy=11, kind="t-faint")
        value = record["validation_loss"]
        if value is None or width < 34:
            continue
        # The curve comes from the left: the number goes to the side of the dot where the curve is not.
        near = [y for x, y, name in at if name == record["name"] and x > right - 0.1 * end]
        dy = -7.0 if not near or value > float(np.mean(near)) else 15.0
        shown = f"{record['bits_per_byte' if per_byte else 'validation_loss']:.3f}"
        chart.words(right, value, shown, anchor="end", kind="t-strong", fill="s3", dx=-5, dy=dy)
    return ", in bits per byte" if per_byte else ", in nats per token"


def _validations(facts: Facts, unit: str) -> list[tuple[float, float, str]]:
    """(where, loss, what to say of it) of every validation; one at a phase's end is in both files."""
    logged = {getattr(line, unit): line.validation_loss for line in facts.lines if line.validation_loss is not None}
    return [(float(at), value, f"validation {value:.4f}") for at, value in logged.items()]


def _draw_validations(chart: Chart, points: Sequence[tuple[float, float, str]], colour: str, radius: float = 4) -> None:
    """Dots, or a line where they are many."""
    if len(points) > MOST_DOTS:
        at, values = np.array([[x, y] for x, y, _ in points]).T
        chart.line(*thinned(at, values), colour, thick=1.4)
        return
    for x, y, tip in points:
        chart.dot(x, y, colour, tip, radius)


def _loss_axis(curves: Sequence[NDArray[np.float64]], values: Sequence[float]) -> Axis:
    """The first steps fall from log V and would flatten all that follows: they may leave the picture at its top."""
    top = max([*(float(np.quantile(curve, 0.95)) for curve in curves), *values])
    bottom = min([*(float(curve.min()) for curve in curves), *values])
    room = (top - bottom) or 1.0
    return Axis(bottom - 0.1 * room, top + 0.18 * room, "nats per token")


def rack_as_it_grew(facts: Facts) -> Chart | None:
    """Each phase a column, as wide as its share of the FLOPs, of the Stacks it has, the input below."""
    if facts.planned is None:
        return None
    phases, spent = facts.planned.phases, [record["flops"] for record in facts.records]
    planned = [before + cost.flops * phase.steps for before, cost, phase in zip(
        facts.planned.preparation_flops, facts.planned.costs, facts.planned.phases
    )]  # fmt: skip
    if facts.summary is not None:
        phases = phases[: len(spent)]
    edges = np.cumsum([0.0, *spent, *planned[len(spent) : len(phases)]])
    most = max(len(phase.stacks) for phase in phases)
    y_axis = Axis(0.0, max(most, LEAST_STACKS))
    chart = Chart("The Rack as it grew", Axis(0.0, float(edges[-1]), "FLOPs"), y_axis, left=14.0, levels=False)
    for k, phase in enumerate(phases):
        left, right = float(edges[k]), float(edges[k + 1])
        width = (right - left) / float(edges[-1]) * chart.inner_width
        for place, stack in enumerate(phase.stacks):
            state, stored = state_of(phase, stack), phase.precision_of(stack)
            unused = phase.cached and place < phase.enters
            facts_of_it = [STATES[state], *([stored] if stored != "full" else []), *(["read from the cache"] * unused)]
            tip = f"{phase.name}: Stack {stack}, {', '.join(facts_of_it)}"
            chart.bar((left, right), (place + 0.06, place + 0.94), state, tip, gap=0.8)
            words = f"{stack} {stored}" if stored != "full" else str(stack)
            if width > 6.5 * len(words) + 4 and chart.inner_height / y_axis.high > 11:
                ink = "ink" if state == "frozen" else ""
                kind = "" if ink else "t-onfill"
                chart.words((left + right) / 2, place + 0.5, words, dy=4, kind=kind, fill=ink)
    there = {state_of(phase, stack) for phase in phases for stack in phase.stacks}
    chart.keys = [(state, words) for state, words in STATES.items() if state in there]
    return chart


def memory(facts: Facts) -> Chart | None:
    """The measured peak of each phase as a bar, the planned one as a line across it."""
    measured = [record["peak_memory_bytes"] for record in facts.records]
    planned = [] if facts.planned is None else [cost.peak for cost in facts.planned.costs][: len(facts.records)]
    known = [value for value in (*measured, *planned) if value is not None]
    if not known:
        return None
    unit, scale = size_unit(max(known))
    y = Axis.around(known, unit, scale=scale, zero=True, room=0.1)
    chart = Chart("Peak memory by phase", Axis(0.0, len(measured), "phase"), y, numbers=False)
    for k, (record, value) in enumerate(zip(facts.records, measured)):
        if value is not None:
            chart.bar((k + 0.18, k + 0.82), (0.0, value), "s0", f"{record['name']}: measured {size(value)}")
    for k, value in enumerate(planned):
        chart.line((k + 0.08, k + 0.92), (value, value), "s1", thick=3.0)
    if len(measured) <= 12:
        for k in range(len(measured)):
            chart.words(k + 0.5, 0.0, str(k + 1), dy=16, kind="t-faint")
    chart.keys = [("s0", "measured"), *([("s1", "planned")] if planned else [])]
    return chart


def over_steps(facts: Facts) -> list[Chart]:
    """Learning rate, tokens a second and gradient norm over the steps."""
    steps = facts.column("step")
    found = []
    for name, title, label in (
        ("lr", "Learning rate", ""),
        ("tokens_per_second", "Throughput", "tokens per second"),
        ("grad_norm", "Gradient norm", "before clipping"),
    ):
        values = facts.column(name)
        there = np.isfinite(values)
        if not there.any():
            continue
        x, y = thinned(steps[there], values[there])
        top = Axis.around(np.quantile(y, [0.0, 0.99]), label, zero=True, room=0.12)
        chart = Chart(title, Axis(0.0, float(steps[-1]), "step"), top, height=200)
        chart.line(x, y, "s0", thick=1.5)
        found.append(chart)
    return found


def noise_levels(points: Sequence[tuple[float, float]]) -> Chart | None:
    """c(r): the mean cross-entropy of a masked token where the share r is masked."""
    if len(points) < 2:
        return None
    x, y = zip(*sorted(points))
    chart = Chart(
        "Cross-entropy by noise level, c(r)", Axis(0.0, 1.0, "share of the tokens that is masked, r"),
        Axis.around(y, "nats per masked token", room=0.1),
    )  # fmt: skip
    chart.line(x, y, "s0")
    for a, b in points:
        chart.dot(a, b, "s0", f"{a:.0%} masked: {b:.4f}", radius=3)
    return chart


def together(several: Sequence[Facts], unit: str) -> Chart:
    """The smoothed training losses of several runs, and their validations."""
    curves = [(facts.column(unit), smoothed(facts.column("loss"), len(facts.lines) / 25)) for facts in several]
    found = [_validations(facts, unit) for facts in several]
    y_axis = _loss_axis([y for _, y in curves], [value for points in found for _, value, _ in points])
    chart = Chart(
        f"Training loss over {UNITS[unit]}", Axis(0.0, max(float(x[-1]) for x, _ in curves), UNITS[unit]), y_axis
    )
    for i, ((x, y), points) in enumerate(zip(curves, found)):
        chart.line(*thinned(x, y), series(i), dashed=is_dashed(i))
        _draw_validations(chart, points, series(i), radius=3)
    chart.keys = [(series(i), facts.name) for i, facts in enumerate(several)]
    return chart
