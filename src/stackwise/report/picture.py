"""A picture of a finished run: ``python -m stackwise.report.picture RUN OUT.svg``.

Above, the training loss over the FLOPs spent, a band a phase, and the validation loss at each phase's end; below, the
Rack of each phase as a column of its Stacks. It is made of ``metrics.jsonl``, ``summary.json`` and ``config.yaml``.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stackwise.config.base import StackWiseConfig
from stackwise.errors import RunError, UserError
from stackwise.files import reason, write_atomic
from stackwise.growth.curricula import build_phases
from stackwise.growth.phases import Phase
from stackwise.runs.initial import initial_stacks
from stackwise.store.rundir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEW, TRAINED, FROZEN = "#e08a1e", "#4a86c5", "#c9ced6"
INK, FAINT, LINE, DOT = "#24292f", "#8c959f", "#1f5fa8", "#c2361f"
BANDS = ("#f3f6fa", "#e6ecf3")
MOST_POINTS = 400
"""Points of a curve; a longer one is averaged down to this many."""

FONT = "DejaVu Sans"
"""Comes with matplotlib, which measures with it; Verdana, where a viewer lacks it, is as wide."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small files, and words that can be searched
    "svg.hashsalt": "stackwise",  # the same run gives the same bytes
    "font.family": FONT,
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def draw_run(run: str | Path, out: str | Path) -> None:
    """Draws the finished run in ``run`` into the file ``out``, as SVG or as what its suffix says (``.png``).

    Raises:
        UserError: there is no finished run, matplotlib is not installed, or ``out`` cannot be written.
        RunError: a file of the run is damaged.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a picture needs matplotlib; pip install 'stackwise[report]'") from None
    folder, out = RunDir.open(run), Path(out)
    summary, metrics = folder.read_summary(), folder.read_metrics()
    phases = _phases(StackWiseConfig.from_yaml(folder.config), summary, folder.path)
    if not metrics:
        raise UserError(f"{folder.metrics}: contains no step, so there is nothing to draw")
    kind = out.suffix.removeprefix(".").lower() or "svg"
    picture = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 5.0), facecolor="white", layout="constrained")
        if kind not in figure.canvas.get_supported_filetypes():
            raise UserError(f"{out}: pictures cannot be written as {out.suffix}; name a .svg or a .png")
        losses, rack = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1.0 + 0.12 * len(phases[-1].stacks)))
        edges = np.cumsum([0.0, *(record["flops"] for record in summary["phases"])])
        _draw_losses(losses, phases, summary, metrics, edges)
        _draw_rack(rack, phases, edges)
        figure.legend(loc="outside upper left", ncols=5, frameon=False, columnspacing=1.6, handlelength=1.4)
        figure.savefig(picture, format=kind, metadata={"Date": None, "Creator": None} if kind == "svg" else None)
    content = picture.getvalue()
    if kind == "svg":
        content = content.replace(f"'{FONT}'".encode(), f"'{FONT}', Verdana, sans-serif".encode())
    try:
        write_atomic(out, [content])
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {reason(error)}") from None


def _phases(config: StackWiseConfig, summary: dict[str, Any], path: Path) -> list[Phase]:
    """The run's phases, rebuilt; a budget in FLOPs is divided by what a step took."""
    cost = {record["name"]: record["flops"] / record["steps"] for record in summary["phases"]}
    phases = build_phases(config, lambda phase: cost[phase.name], initial_stacks(config))
    if [phase.name for phase in phases] != [record["name"] for record in summary["phases"]]:
        raise RunError(f"{path}: config.yaml and summary.json are not of the same run: their phases differ")
    return phases


def _draw_losses(
    axes: Axes, phases: list[Phase], summary: dict[str, Any], metrics: list[dict[str, Any]], edges: NDArray[np.float64]
) -> None:
    records = summary["phases"]
    for phase in phases:
        lines = [line for line in metrics if line["phase"] == phase.name]
        if lines:
            flops, loss = np.array([[line["flops"], line["loss"]] for line in lines]).T
            axes.plot(*_thinned(flops, loss), color=LINE, alpha=0.28, linewidth=0.9)
            axes.plot(*_thinned(flops, smoothed(loss, len(metrics) / 25)), color=LINE, linewidth=1.9)
    scored = [(edge, record) for edge, record in zip(edges[1:], records) if record["validation_loss"] is not None]
    values = [record["validation_loss"] for _, record in scored]
    per_byte = all(record["bits_per_byte"] is not None for _, record in scored)
    number = "bits_per_byte" if per_byte else "validation_loss"
    axes.plot([edge for edge, _ in scored], values, "o", color=DOT, markersize=6, clip_on=False, zorder=5)
    for edge, record in scored:
        # The curve comes from the left: the number goes to the side of the dot where the curve is not.
        nearby = [x["loss"] for x in metrics if x["phase"] == record["name"] and x["flops"] > edge - 0.07 * edges[-1]]
        above = not nearby or record["validation_loss"] > float(np.mean(nearby))
        axes.annotate(
            f"{record[number]:.3f}",
            (edge, record["validation_loss"]),
            (-7, 8 if above else -8),
            textcoords="offset points",
            ha="right",
            va="bottom" if above else "top",
            color=DOT,
            fontweight="bold",
            fontsize=10,
            zorder=6,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.2},
        )
    # The first steps fall from log V and would flatten all that follows: they may leave the picture at its top.
    raw = np.array([line["loss"] for line in metrics])
    top, bottom = max([float(np.quantile(raw, 0.97)), *values]), min([float(raw.min()), *values])
    room = top - bottom or 1.0
    axes.set_ylim(bottom - 0.14 * room, top + 0.30 * room)
    axes.set_ylabel("loss, nats per token")
    axes.plot([], [], color=LINE, linewidth=1.9, label="training loss")
    axes.plot([], [], "o", color=DOT, label=f"validation, in {'bits per byte' if per_byte else 'nats per token'}")
    for k, phase in enumerate(phases):
        axes.axvspan(edges[k], edges[k + 1], color=BANDS[k % 2], linewidth=0, zorder=0)
        if edges[k + 1] - edges[k] > 0.08 * edges[-1]:
            middle = (edges[k] + edges[k + 1]) / 2
            axes.text(
                middle, 0.97, what_trains(phase), transform=axes.get_xaxis_transform(), ha="center", va="top",
                linespacing=1.35, fontsize=8.5,
            )  # fmt: skip
    axes.set_xlim(0, edges[-1])
    axes.tick_params(bottom=False, labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_rack(axes: Axes, phases: list[Phase], edges: NDArray[np.float64]) -> None:
    from matplotlib.patches import Rectangle

    gap = 0.004 * edges[-1]
    unnamed = {NEW: "new Stack", TRAINED: "training Stack", FROZEN: "frozen Stack"}  # in the legend
    for k, phase in enumerate(phases):
        for height, stack in enumerate(phase.stacks):
            colour = state_of(phase, stack)
            left, width = edges[k] + gap, edges[k + 1] - edges[k] - 2 * gap
            box = Rectangle((left, height + 0.06), max(width, gap), 0.88, facecolor=colour, linewidth=0)
            box.set_label(unnamed.pop(colour, None))
            axes.add_patch(box)
            if width > 0.03 * edges[-1]:
                ink = INK if colour == FROZEN else "white"
                axes.text(
                    left + width / 2, height + 0.48, str(stack), ha="center", va="center", color=ink, fontsize=8.5
                )
    axes.set_ylim(0, max(len(phase.stacks) for phase in phases))
    axes.set_yticks([])
    axes.set_ylabel("Stacks")
    axes.set_xlabel("FLOPs of training")
    axes.spines[["top", "right", "left"]].set_visible(False)


def state_of(phase: Phase, stack: int) -> str:
    """The colour of ``stack`` in ``phase``: new, training or frozen."""
    if any(new.stack == stack for new in phase.growth):
        return NEW
    return TRAINED if f"stack.{stack}" in phase.trains else FROZEN


def what_trains(phase: Phase) -> str:
    """The phase's name, and which of its Stacks train."""
    training = [stack for stack in phase.stacks if f"stack.{stack}" in phase.trains]
    if training == list(phase.stacks):
        return f"{phase.name}\nall trains" if len(training) > 1 else f"{phase.name}\ntrains"
    return f"{phase.name}\n{len(training)} of {len(phase.stacks)} trains"


def smoothed(values: NDArray[np.float64], span: float) -> NDArray[np.float64]:
    """The exponential moving average of ``values`` over about ``span`` of them, unbiased at the start."""
    decay = 1.0 - 1.0 / max(1.0, span)
    out, total, weight = np.empty_like(values), 0.0, 0.0
    for i, value in enumerate(values):
        total, weight = decay * total + value, decay * weight + 1.0
        out[i] = total / weight
    return out


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most ``MOST_POINTS`` points: means of neighbours."""
    size = -(-len(x) // MOST_POINTS)
    starts = np.arange(0, len(x), size)
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stackwise.report.picture", description=__doc__)
    parser.add_argument("run", help="run directory of a finished run")
    parser.add_argument("out", help="file to write, .svg")
    options = parser.parse_args()
    try:
        draw_run(options.run, options.out)
    except (UserError, RunError) as error:
        print(f"stackwise: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()
