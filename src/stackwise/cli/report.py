"""``stackwise report``: what became of a run, as one HTML file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run directories, or folders of `compare`")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="F", help="File to write; F.svg: a picture of one run (default: report.html in it)"
        ),
    ] = None,
) -> None:
    """Write what became of one or several runs as one HTML file that needs nothing else.

    It shows losses, the Rack as it grew, memory planned and measured, rate, throughput, samples and settings; several
    runs share axes. A folder that `stackwise compare` filled is shown as its table, sentence and pictures.
    """
    from stackwise.report.document import write_report

    path = write_report(runs, out or runs[0] / "report.html")
    print(path)
    print(f"{path.stat().st_size:,} bytes; a browser opens it", file=sys.stderr)
