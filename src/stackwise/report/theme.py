"""Colours of pictures and pages, light and dark, as CSS classes: an SVG file carries them, and so does a page."""

from __future__ import annotations

SERIES = (
    ("#2563a8", "#78b2f2"),
    ("#c66a05", "#f0a24a"),
    ("#1f8059", "#5cc798"),
    ("#b8303c", "#f28585"),
    ("#7049ae", "#b99df0"),
    ("#7a5f2e", "#cdb07a"),
    ("#ad3d88", "#ec90cb"),
    ("#33788a", "#79c3d6"),
)
"""(light, dark) of one line after another; after the last one they begin anew, dashed."""

COLOURS = {
    "paper": ("#ffffff", "#14171c"),
    "panel": ("#f6f8fa", "#1c2027"),
    "ink": ("#1f242b", "#e4e8ee"),
    "faint": ("#626b77", "#98a2b0"),
    "grid": ("#e3e7ec", "#2c323b"),
    "band": ("#f0f3f7", "#1d222a"),
    "new": ("#dd8417", "#c97612"),
    "trained": ("#4480c2", "#3f78b8"),
    "adapted": ("#8a68c4", "#7e5dba"),
    "frozen": ("#c7cdd6", "#454d58"),
    **{f"s{i}": pair for i, pair in enumerate(SERIES)},
}

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', Verdana, sans-serif"


def picture_css() -> str:
    """Classes of what is drawn: ``f-NAME`` fills, ``l-NAME`` strokes, ``t`` is text, and ``t-…`` its kinds."""
    light = "".join(f".f-{name}{{fill:{a}}}.l-{name}{{stroke:{a}}}" for name, (a, _) in COLOURS.items())
    dark = "".join(f".f-{name}{{fill:{b}}}.l-{name}{{stroke:{b}}}" for name, (_, b) in COLOURS.items())
    ink, faint, paper = COLOURS["ink"], COLOURS["faint"], COLOURS["paper"]
    return (
        f".t{{font:11px {FONT};fill:{ink[0]}}}.t-faint{{fill:{faint[0]}}}"
        f".t-strong{{font-weight:600;paint-order:stroke;stroke:{paper[0]};stroke-width:3px;stroke-linejoin:round}}"
        ".t-onfill{fill:#fff}.t-title{font-size:12.5px;font-weight:600}"
        f".line{{fill:none;stroke-linejoin:round;stroke-linecap:round}}{light}"
        f"@media screen and (prefers-color-scheme:dark){{.t{{fill:{ink[1]}}}.t-faint{{fill:{faint[1]}}}"
        f".t-strong{{stroke:{paper[1]}}}.t-onfill{{fill:#fff}}{dark}}}"
    )


def variables() -> str:
    """The colours as CSS variables of a page, ``--NAME``."""
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in COLOURS.items()) for i in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def series(index: int) -> str:
    """The colour of the ``index``-th line."""
    return f"s{index % len(SERIES)}"


def is_dashed(index: int) -> bool:
    """Whether the ``index``-th line is dashed: its colour was another's already."""
    return index // len(SERIES) % 2 == 1
