"""``stackwise resume``: continues a stopped run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stackwise.cli.train import Json, Step, TrustPaths


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory")],
    step: Step = None,
    trust_paths: TrustPaths = False,
    as_json: Json = False,
) -> None:
    """Continue RUN exactly where it stopped."""
    from stackwise.cli.results import show_summary
    from stackwise.runs.run import resume_run
    from stackwise.training.progress import console_reporter

    show_summary(resume_run(run, console_reporter(), step, trust_paths=trust_paths), run, as_json)
