"""One picture of a run: its losses over FLOPs, phase by phase, and the Rack as it grew, on the same axis."""

from __future__ import annotations

import base64
from pathlib import Path

from stackwise.report import run_charts
from stackwise.report.chart import side_by_side
from stackwise.report.facts import read_facts
from stackwise.report.html import element


class Picture:
    """An SVG picture: shown where it is the last value of a notebook's cell, and written by ``save``."""

    def __init__(self, svg: str, words: str) -> None:
        self.svg, self._words = svg, words

    def save(self, path: str | Path) -> None:
        """Writes it as an SVG file."""
        Path(path).write_text(self.svg, encoding="utf-8")

    def __repr__(self) -> str:
        return f"<{self._words}>"

    def _repr_html_(self) -> str:
        # As an image, so that its styles are its own.
        content = base64.b64encode(self.svg.encode()).decode()
        return element("img", src=f"data:image/svg+xml;base64,{content}", alt=self._words, style="max-width:100%")


def draw(path: str | Path) -> Picture:
    """The picture of the run in ``path``, complete or not.

    Raises:
        UserError: there is no run, or it has not trained a step. RunError: a file of it is damaged.
    """
    facts = read_facts(path, Path(path).name)
    charts = [run_charts.losses(facts, "flops"), run_charts.rack_as_it_grew(facts)]
    drawn = side_by_side([chart for chart in charts if chart is not None], f"Training of {facts.name}")
    return Picture(drawn, f"losses of {path} and the Rack as it grew")
