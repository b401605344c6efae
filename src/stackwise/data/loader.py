"""The source of a run whose batches a trainer is given in Python: no text that a command could read."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from stackwise.config.data import SourceConfig
from stackwise.errors import UserError


def no_text(config: SourceConfig, memo: Path) -> NoReturn:
    """Always raises ``UserError``."""
    raise UserError(
        f"data.source: {config.source!r}: there is no text to read, for the batches come from a data loader in Python; "
        "give that to ProgressiveTrainer or ArchitectureTrainer there (with resume=True to continue a run)"
    )
