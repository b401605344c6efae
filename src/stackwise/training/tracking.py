"""Metrics for dashboards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackwise.errors import UserError


class Tracker:
    """Writes numeric metrics as TensorBoard events into ``folder/tensorboard``; with ``None`` it writes nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._writer = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "training.logging.tensorboard: tensorboard is not installed; pip install 'stackwise[track]'"
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, metrics: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        for key, value in metrics.items():
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(key, value, metrics["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
