"""HTML whose every text is escaped, and the page that a report is: one file, with no address of anything else in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from stackwise.report.chart import Chart
from stackwise.report.theme import FONT, picture_css, variables


class Html(str):
    """Markup that this package made: it goes into a page as it is. Any other text is escaped."""


def element(name: str, *children: str | None, **attributes: str | bool | None) -> Html:
    """``<name …>children</name>``; text that is not ``Html`` is escaped, None is nothing.

    Attributes: ``class_`` is written ``class``, ``_`` becomes ``-``; True has no value, False and None leave it out.
    """
    shown = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{shown}>{joined(children)}</{name}>")


def joined(children: Iterable[str | None]) -> Html:
    """Markup as it is, text escaped, one after another."""
    return Html("".join(c if isinstance(c, Html) else escape(c) for c in children if c is not None))


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", words: int = 1, long: int | None = None
) -> Html:
    """A table that scrolls in itself where the page is narrow.

    Args:
        words: so many columns are left-aligned, from the first on.
        long: the column that holds texts, which wrap.
    """

    def line(cells: Sequence[str], name: str) -> Html:
        kinds = ["long" if i == long else "words" if i < words else None for i in range(len(cells))]
        return element("tr", *(element(name, cell, class_=kind) for cell, kind in zip(cells, kinds)))

    head, body = element("thead", line(header, "th")), element("tbody", *(line(row, "td") for row in rows))
    title = element("caption", caption) if caption else None
    return element("div", element("table", title, head, body), class_="scroll", tabindex="0")


def figures(charts: Iterable[Chart | None]) -> Html:
    """Pictures beside each other, as many as there is room for, each with what its colours mean."""
    drawn = (
        element("figure", Html(chart.svg()), element("figcaption", legend(chart.keys)) if chart.keys else None)
        for chart in charts
        if chart is not None
    )
    return element("div", *drawn, class_="figures")


def legend(pairs: Iterable[tuple[str, str]]) -> Html:
    """What colours mean: (colour, text)."""
    marks = (element("li", element("i", style=f"background:var(--{colour})"), text) for colour, text in pairs)
    return element("ul", *marks, class_="legend")


def section(title: str, *children: str | None, note: str = "") -> Html:
    """A part of the page under a heading; nothing where it has no content."""
    content = [child for child in children if child]
    if not content:
        return Html("")
    return element("section", element("h3", title), element("p", note, class_="note") if note else None, *content)


def page(title: str, *content: str) -> str:
    """The whole file."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src 'unsafe-inline'\"><title>{escape(title)}</title><style>{variables()}{_CSS}{picture_css()}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{joined(content)}</main></body></html>\n'


_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 FONT}
main{max-width:1640px;margin:0 auto;padding:20px clamp(14px,2.2vw,36px) 48px}
h1{font-size:1.55rem;line-height:1.25;margin:.2em 0 .1em;overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:2.2em 0 .2em;padding-top:.7em;border-top:2px solid var(--grid);overflow-wrap:anywhere}
h3{font-size:1.02rem;margin:2em 0 .5em}
p{margin:.4em 0;max-width:78ch;overflow-wrap:anywhere}
.note,.quiet{color:var(--faint);font-size:.88rem}
.lead{font-size:1.06rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:10px;margin:16px 0 6px}
.tile{background:var(--panel);border-radius:8px;padding:9px 12px;min-width:0}
.tile b{display:block;font-size:1.18rem;font-weight:650;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tile span{color:var(--faint);font-size:.8rem}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,350px),1fr));gap:18px 26px}
figure{margin:0;min-width:0;max-width:560px}
figure svg{display:block;width:100%;height:auto}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--faint);padding-bottom:.3em}
th,td{padding:4px 14px 4px 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
th{color:var(--faint);font-weight:500}
.words,.long{text-align:left}
td.long{min-width:22ch;max-width:70ch;white-space:normal;overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;margin:2px 0 4px;font-size:.82rem;padding:0;list-style:none}
figcaption{color:var(--faint)}
.legend i{display:inline-block;width:.85em;height:.85em;border-radius:2px;margin-right:.45em;vertical-align:-.08em}
pre,.text{font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace}
pre{background:var(--panel);border-radius:8px;padding:12px 14px;margin:.5em 0;white-space:pre-wrap;
 overflow-wrap:anywhere;max-height:26rem;overflow:auto;max-width:110ch}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:4px 24px}
.gap{color:var(--faint)}
.frames{display:grid;grid-template-columns:auto 1fr;gap:3px 14px;margin:.6em 0}
.frames>span{color:var(--faint);text-align:right;font-variant-numeric:tabular-nums}
.frames>div{white-space:pre-wrap;overflow-wrap:anywhere;min-width:0}
.player{display:none;max-width:720px}
.player input{width:100%;accent-color:var(--s0)}
.right{background:color-mix(in srgb,var(--s2) 24%,transparent)}
.wrong{background:color-mix(in srgb,var(--s3) 22%,transparent)}
@media (max-width:480px){body{font-size:14px}h1{font-size:1.3rem}th,td{padding-right:10px}}
@media print{
 body{font-size:10.5pt}main{padding:0;max-width:none}
 .figures{grid-template-columns:repeat(2,1fr)}figure,.tile,tr{break-inside:avoid}h2,h3{break-after:avoid}
 pre{max-height:none;overflow:visible}.scroll{overflow:visible}table{font-size:7.5pt}th,td{padding-right:7px}
 .player{display:none!important}.tile,pre{border:1px solid var(--grid)}
}
""".replace("FONT", FONT)
