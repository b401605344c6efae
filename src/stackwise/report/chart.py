"""Charts as SVG, by hand: two axes, lines, dots, bars and words, in classes of ``theme`` that a page or a file colours.

A chart is made about as wide as it is shown on a narrow screen (``WIDTH`` units), so that its words, 11 units high, can
be read there; wide screens show several beside each other. A library that draws would put fixed colours into the
picture, and in a page that is light or dark they have to follow the reader's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stackwise.report.theme import picture_css

WIDTH, HEIGHT = 400.0, 250.0
MOST_POINTS = 300
"""Points of a line; a longer one is averaged down to this many."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 28.0, 38.0

Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True)
class Axis:
    """Numbers from ``low`` to ``high`` on a line.

    ``log``: even ratios are even distances. ``scale``: what numbers are divided by where they are written.
    """

    low: float
    high: float
    label: str = ""
    log: bool = False
    scale: float = 1.0

    @classmethod
    def around(
        cls, values: ArrayLike, label: str = "", *, log: bool = False, scale: float = 1.0, zero: bool = False,
        room: float = 0.06,
    ) -> Axis:  # fmt: skip
        """An axis on which ``values`` have some ``room`` (a share of their span); ``zero``: it begins there."""
        found = np.asarray(values, dtype=float).ravel()
        low, high = (float(found.min()), float(found.max())) if found.size else (0.0, 1.0)
        if log:
            ratio = max((high / low) ** room, 1.02)
            return cls(low / ratio, high * ratio, label, True, scale)
        span = (high - (0.0 if zero else low)) or abs(high) or 1.0
        return cls(0.0 if zero else low - room * span, high + room * span, label, False, scale)

    def share(self, value: float) -> float:
        """Where ``value`` lies, from 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[float]:
        """Round numbers within the axis, about ``most`` of them."""
        if self.log:
            first, last = math.floor(math.log10(self.low / self.scale)), math.ceil(math.log10(self.high / self.scale))
            for parts in ((1,), (1, 3), (1, 2, 5)):
                found = [m * 10.0**k * self.scale for k in range(first, last + 1) for m in parts]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) >= 3:
                    return found[:: -(-len(found) // most)]
        rough = (self.high - self.low) / self.scale / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / self.scale / step - 1e-9)
        count = math.floor(self.high / self.scale / step + 1e-9) - first
        return [(first + k) * step * self.scale for k in range(count + 1)]


def short(value: float) -> str:
    """A number for a tick: 0.002, 1.5, 20k, 300G; a few digits, no zeros at the end."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-")
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power * (10 if letter == "k" else 1):
            return f"{value / 10**power:.4g}{letter}"
    return f"{value:.4g}"


Column = NDArray[np.float64]


def thinned(x: Column, y: Column) -> tuple[Column, Column]:
    """At most ``MOST_POINTS`` points: means of neighbours."""
    count = len(x)
    if not count:
        return x, y
    starts = np.arange(0, count, -(-count // MOST_POINTS))
    sizes = np.diff([*starts, count])
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def smoothed(values: NDArray[np.float64], span: float) -> NDArray[np.float64]:
    """The exponential moving average of ``values`` over about ``span`` of them, unbiased at the start."""
    decay = 1.0 - 1.0 / max(1.0, span)
    out, total, weight = np.empty_like(values), 0.0, 0.0
    for i, value in enumerate(values):
        total, weight = decay * total + value, decay * weight + 1.0
        out[i] = total / weight
    return out


class Chart:
    """A picture with two axes; what is added is drawn in the order of the calls, within the axes.

    ``keys``: what its colours mean, (colour, text), for whoever shows it.
    """

    def __init__(
        self, title: str, x: Axis, y: Axis, *, width: float = WIDTH, height: float = HEIGHT, left: float = _LEFT,
        numbers: bool = True, levels: bool = True,
    ) -> None:  # fmt: skip
        """``numbers``: along the x axis; ``levels``: along the y axis, with lines across."""
        self.title, self.x, self.y, self.width, self.height = title, x, y, width, height
        self.left, self.top = left, _TOP
        self.inner_width, self.inner_height = width - left - _RIGHT, height - _TOP - _BOTTOM
        self._numbers, self._levels = numbers, levels
        self.keys: list[tuple[str, str]] = []
        self._inside: list[str] = []
        self._over: list[str] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where the point lies, in units of the picture."""
        return (
            self.left + self.x.share(x) * self.inner_width,
            self.top + (1.0 - self.y.share(y)) * self.inner_height,
        )

    def line(
        self, x: Sequence[float] | NDArray[np.float64], y: Sequence[float] | NDArray[np.float64], colour: str, *,
        thick: float = 1.8, opacity: float = 1.0, dashed: bool = False, steps: bool = False,
    ) -> None:  # fmt: skip
        """Through the points; ``steps``: level from each to the next."""
        points = [self.at(float(a), float(b)) for a, b in zip(x, y)]
        if not points:
            return
        path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
        path += "".join(f"{f'H{a:.1f}V{b:.1f}' if steps else f'L{a:.1f} {b:.1f}'}" for a, b in points[1:])
        style = ' stroke-dasharray="5 3"' if dashed else ""
        faded = f' stroke-opacity="{opacity:g}"' if opacity < 1 else ""
        self._inside.append(f'<path class="line l-{colour}" stroke-width="{thick:g}"{style}{faded} d="{path}"/>')

    def dot(self, x: float, y: float, colour: str, tip: str = "", radius: float = 4.0) -> None:
        a, b = self.at(x, y)
        title = f"<title>{escape(tip)}</title>" if tip else ""
        self._over.append(
            f'<circle class="f-{colour} l-paper" stroke-width="1.2" cx="{a:.1f}" cy="{b:.1f}" r="{radius:g}">{title}'
            "</circle>"
        )

    def bar(self, x: tuple[float, float], y: tuple[float, float], colour: str, tip: str = "", gap: float = 0.0) -> None:
        """A box between two numbers of each axis; ``gap``: units left free at its left and right."""
        (a, b), (c, d) = self.at(x[0], y[1]), self.at(x[1], y[0])
        title = f"<title>{escape(tip)}</title>" if tip else ""
        self._inside.append(
            f'<rect class="f-{colour}" x="{a + gap:.1f}" y="{b:.1f}" width="{max(c - a - 2 * gap, 0.6):.1f}" '
            f'height="{max(d - b, 0.0):.1f}">{title}</rect>'
        )

    def whisker(self, x: tuple[float, float], y: tuple[float, float], colour: str) -> None:
        """A thin line between two points."""
        (a, b), (c, d) = self.at(x[0], y[0]), self.at(x[1], y[1])
        self._inside.append(
            f'<line class="l-{colour}" stroke-width="1.2" x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}"/>'
        )

    def words(
        self, x: float, y: float, text: str, *, anchor: Anchor = "middle", kind: str = "", dx: float = 0.0,
        dy: float = 0.0, fill: str = "",
    ) -> None:  # fmt: skip
        """``text`` at a point, moved by ``dx`` and ``dy`` units (down)."""
        a, b = self.at(x, y)
        self._over.append(_text(a + dx, b + dy, text, anchor, kind, fill))

    def names(self, points: Sequence[tuple[float, float, str, str]]) -> None:
        """A name beside each point (x, y, name, colour), where it hides neither a point nor a name; "" has none."""
        dots = [self.at(x, y) for x, y, _, _ in points]
        taken = [(a - 6.0, b - 6.0, a + 6.0, b + 6.0) for a, b in dots]
        for (a, b), (_, _, name, colour) in sorted(zip(dots, points)):
            if not name:
                continue
            width = 6.9 * len(name)
            found = None
            for away in range(0, 90, 3):
                for dx, dy, share in ((9, -6 - away, 0), (9, 15 + away, 0), (-9, -6 - away, 1), (-9, 15 + away, 1),
                                      (0, -9 - away, 0.5), (0, 17 + away, 0.5)):  # fmt: skip
                    left, base = a + dx - share * width, b + dy
                    box = (left, base - 9.5, left + width, base + 2.5)
                    if self._holds(box) and not any(_overlap(box, other) for other in taken):
                        found = box
                        break
                if found:
                    break
            if found:
                taken.append(found)
                self._over.append(_text(found[0], found[3] - 2.5, name, "start", "t-strong", colour))

    def _holds(self, box: tuple[float, float, float, float]) -> bool:
        """Whether the box (left, top, right, bottom) lies within the axes."""
        left, top, right, bottom = box
        return (
            left >= self.left and right <= self.left + self.inner_width + 6
            and top >= self.top - 4 and bottom <= self.top + self.inner_height
        )  # fmt: skip

    def svg(self, left: float | None = None) -> str:
        """The picture; with ``left``, as a part of another one, which begins there."""
        root = 'role="img" ' if left is None else f'x="{left:g}" '
        inner = f"{self.left:.1f} {self.top:.1f} {self.inner_width:.1f} {self.inner_height:.1f}"
        x, y, width, height = inner.split()
        return (
            f'<svg {root}width="{self.width:g}" height="{self.height:g}" '
            f'viewBox="0 0 {self.width:g} {self.height:g}" aria-label="{escape(self.title)}">'
            f"{_text(4, 15, self.title, 'start', 't-title')}{self._frame()}"
            f'<svg x="{x}" y="{y}" width="{width}" height="{height}" viewBox="{inner}">{"".join(self._inside)}</svg>'
            f"{''.join(self._over)}</svg>"
        )

    def _frame(self) -> str:
        """Grid, numbers and labels of the axes."""
        right, base = self.left + self.inner_width, self.top + self.inner_height
        parts = []
        for value in self.y.ticks(5) if self._levels else ():
            _, b = self.at(self.x.low, value)
            parts.append(f'<line class="l-grid" x1="{self.left:g}" y1="{b:.1f}" x2="{right:g}" y2="{b:.1f}"/>')
            parts.append(_text(self.left - 6, b + 4, short(value / self.y.scale), "end", "t-faint"))
        for value in self.x.ticks(6) if self._numbers else ():
            a, _ = self.at(value, self.y.low)
            parts.append(f'<line class="l-grid" x1="{a:.1f}" y1="{base:g}" x2="{a:.1f}" y2="{base + 4:g}"/>')
            parts.append(_text(a, base + 16, short(value / self.x.scale), "middle", "t-faint"))
        parts.append(f'<line class="l-faint" x1="{self.left:g}" y1="{base:g}" x2="{right:g}" y2="{base:g}"/>')
        parts.append(_text(self.left + self.inner_width / 2, base + 32, self.x.label, "middle", "t-faint"))
        parts.append(_text(self.width - _RIGHT, 15, self.y.label, "end", "t-faint"))
        return "".join(parts)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    """Whether two boxes (left, top, right, bottom) share a part."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _text(x: float, y: float, text: str, anchor: Anchor = "start", kind: str = "", fill: str = "") -> str:
    if not text:
        return ""
    classes = " ".join(filter(None, ("t", kind, f"f-{fill}" if fill else "")))
    return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def side_by_side(charts: Sequence[Chart], title: str) -> str:
    """One SVG file of several charts in a row, on paper of its own, with what their colours mean."""
    keys = 20.0 if any(chart.keys for chart in charts) else 0.0
    width, height = sum(chart.width for chart in charts), max(chart.height for chart in charts) + keys
    parts, x = [], 0.0
    for chart in charts:
        parts.append(chart.svg(left=x))
        at = x + chart.left
        for colour, text in chart.keys:
            parts.append(f'<rect class="f-{colour}" x="{at:.1f}" y="{height - 18:g}" width="9" height="9"/>')
            parts.append(_text(at + 14, height - 9.5, text))
            at += 32 + 6.2 * len(text)
        x += chart.width
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} '
        f'{height:g}" role="img" aria-label="{escape(title)}"><style>{picture_css()}</style>'
        f'<rect class="f-paper" width="{width:g}" height="{height:g}"/>{"".join(parts)}</svg>\n'
    )
