"""``stackwise resume``: continues a stopped run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stackwise.cli.train import Json, Overrides, Step, TrustPaths


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory")],
    overrides: Overrides = None,
    step: Step = None,
    trust_paths: TrustPaths = False,
    as_json: Json = False,
) -> None:
    """Continue RUN exactly where it stopped, or with other settings from there on.

    What can change: the learning rate and the optimizer's other numbers, training.schedule, the budget, evaluation,
    early stopping, checkpoints, logging, device, compile, micro-batches and offloading. RUN/changes.json says what
    changed after which step. Phases that are over stay as they are; the others share what is left of the budget, and a
    run that is complete goes on in its last phase. --step goes back, to the settings that held then.
    """
    from stackwise.cli.results import show_summary
    from stackwise.runs.run import resume_run
    from stackwise.training.progress import console_reporter

    show_summary(resume_run(run, console_reporter(), step, overrides or (), trust_paths=trust_paths), run, as_json)
