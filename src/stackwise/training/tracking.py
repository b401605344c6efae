"""Metrics for dashboards: one class for each, which imports what it writes to when a run uses it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from stackwise.errors import UserError
from stackwise.files import write_text_atomic
from stackwise.kinds import TRACKERS

PROJECT = "stackwise"
"""Under which runs appear, unless WANDB_PROJECT or TRACKIO_PROJECT names another."""


class Tracker(Protocol):
    """Made of the run's folder and its settings as dotted keys."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None: ...

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_trackers(names: tuple[str, ...], folder: Path, settings: Mapping[str, Any]) -> list[Tracker]:
    """Those of ``training.logging.trackers``. UserError where one is not installed or cannot begin."""
    found: list[Tracker] = []
    for name in names:
        kind = TRACKERS[name]
        try:
            found.append(kind.load()(folder, settings))
        except ImportError as error:
            raise UserError(
                f"training.logging.trackers: {name} cannot be imported ({error}); pip install 'stackwise[{kind.extra}]'"
            ) from None
    return found


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What of a line of metrics is a number, but the step."""
    return {
        key: value
        for key, value in metrics.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


class TensorBoard:
    """Events in ``RUN/tensorboard``."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases, whose own files lie in ``RUN/wandb``; with WANDB_MODE=offline nothing leaves the machine.

    A run that goes on goes on there too: ``RUN/wandb/id`` holds the name it is known by. Steps that a killed run takes
    again are logged once, the first time.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        home, environment = folder / "wandb", wandb.Settings()
        home.mkdir(exist_ok=True)
        named = home / "id"
        if not named.is_file():
            write_text_atomic(named, secrets.token_hex(8))
        try:
            self._run = wandb.init(
                project=environment.project or PROJECT,
                name=environment.run_name or folder.resolve().name,
                id=named.read_text(),
                dir=str(folder),
                config=dict(settings),
                resume="allow",
                settings=wandb.Settings(console="off"),
            )
        except (wandb.errors.UsageError, wandb.errors.CommError) as error:
            raise UserError(
                f"training.logging.trackers: wandb cannot begin: {error}; WANDB_MODE=offline needs no account"
            ) from None

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Trackio's local store (TRACKIO_DIR); ``trackio show`` serves it."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=PROJECT, name=folder.resolve().name, config=dict(settings), resume="allow")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._trackio.log(dict(numbers), step=step)

    def close(self) -> None:
        self._trackio.finish()
