"""The run directory: what it holds and who may train in it.

``config.yaml`` (resolved), ``changes.json`` (where settings were changed in mid-run), ``tokenizer/``,
``metrics.jsonl`` (one object a logged step), ``checkpoints/``, ``cache/`` and, once the run is complete,
``summary.json``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from stackwise.errors import RunError, UserError
from stackwise.files import (
    append,
    is_leftover,
    locked,
    reason,
    remove_leftovers,
    sync_directory,
    write_atomic,
    write_text_atomic,
)
from stackwise.reading import parse_json, read_object


def finite_json(value: Any, what: str, **options: Any) -> str:
    """``value`` as JSON, floats exact. RunError that names ``what`` and the key when a number is not finite."""
    for key, number in _numbers(value):
        if not math.isfinite(number):
            raise RunError(f"{what}: {key} is {number}; JSON holds finite numbers only")
    return json.dumps(value, allow_nan=False, **options)


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every float in a JSON value with its dotted key."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict):
        for name, child in value.items():
            yield from _numbers(child, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield from _numbers(child, f"{key}[{index}]")


_FOLDERS = ("checkpoints", "checkpoints/objects", "cache", "tokenizer", "tensorboard", "wandb")
"""In which a run writes."""

_FILES = r"\.origin|config\.yaml|changes\.json|metrics\.jsonl|summary\.json|tokenizer"
"""What a killed process may have left half written in the run directory itself."""


class RunDir:
    """The files of one run. ``create`` starts one, ``open`` finds one; the constructor checks nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.changes = self.path / "changes.json"
        self.tokenizer = self.path / "tokenizer"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.cache = self.path / "cache"
        self.summary = self.path / "summary.json"
        self.origin = self.path / ".origin"

    @classmethod
    def create(cls, path: str | Path, config_yaml: str) -> Self:
        """Makes a run that nobody holds; as ``creating``."""
        with cls.creating(path, config_yaml) as run:
            return run

    @classmethod
    @contextlib.contextmanager
    def creating(cls, path: str | Path, config_yaml: str, origin: str | None = None) -> Iterator[Self]:
        """Makes the folder and, last, its ``config.yaml``: a folder that holds one is a run that can be resumed.

        The run is held for this process alone from before its config is there to the end of the block. ``origin`` says
        who began it.

        UserError when ``path`` holds a run or anything else, is not a folder, or cannot be written.
        """
        run = cls(path)
        run.refuse_if_taken()
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{run.path}: cannot make this folder: {reason(error)}") from None
        with run.lock():
            run.refuse_if_taken()
            if origin is not None:
                write_text_atomic(run.origin, origin)
            write_text_atomic(run.config, config_yaml)
            yield run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The run in ``path``; UserError that says what is missing when there is none."""
        run = cls(path)
        if not run.path.exists():
            raise UserError(f"{run.path}: no such run")
        if not run.path.is_dir():
            raise UserError(f"{run.path} is not a run: it is a file, not a folder")
        if not run.config.is_file():
            raise UserError(f"{run.path} is not a run: it has no config.yaml")
        run._refuse_endless()
        return run

    def _refuse_endless(self) -> None:
        """UserError for a pipe, a socket or a device in the run, also behind a link: reading it might never end."""
        for folder, _, names in os.walk(self.path):
            for path in (Path(folder, name) for name in names):
                with contextlib.suppress(OSError):  # whoever reads it says what is wrong
                    if not stat.S_ISREG(path.stat().st_mode):
                        raise UserError(f"{path} is not a regular file; a run holds files and folders only")

    def discard(self) -> None:
        """Removes a run that has not begun: its config and its tokenizer, and the folder if nothing else is in it.

        The caller holds the run: what another process has begun in the folder meanwhile is not removed with it.
        """
        shutil.rmtree(self.tokenizer, ignore_errors=True)
        for path in (self.config, self.metrics, self.origin, self.path / ".lock"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is in it: that stays
            self.path.rmdir()

    def refuse_if_taken(self) -> None:
        """UserError when ``path`` holds a run or anything else, or is not a folder."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; choose another --out")
        if self.config.exists():
            raise UserError(
                f"{self.path} holds a run; stackwise resume {self.path} continues it, or choose another --out"
            )
        if not self.path.is_dir():
            return
        try:
            names = sorted(p.name for p in self.path.iterdir())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        # A creation that was killed leaves these; they are ours.
        foreign = [name for name in names if name not in (".lock", self.origin.name) and not is_leftover(name)]
        if foreign:
            raise UserError(f"{self.path} is not empty and not a run (it holds {foreign[0]!r}); choose another --out")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process alone; the kernel lets go when the process ends, however it ends.

        UserError when another process holds it, or when a link lies where the run writes: nothing is written outside.
        """
        with contextlib.ExitStack() as stack:
            path = self.path / ".lock"
            try:
                descriptor = stack.enter_context(locked(path))
                self._refuse_links()
                remove_leftovers(self.path, _FILES)
            except BlockingIOError as error:
                holder = error.filename or "unknown"
                raise UserError(f"{self.path} is being trained by another process (pid {holder})") from None
            except OSError as error:
                raise UserError(f"{path}: cannot be opened for writing: {reason(error)}") from None
            # The pid is only for the message: a full disk must not stop a resume, nor a second name's file be changed.
            with contextlib.suppress(OSError):
                if os.fstat(descriptor).st_nlink == 1:
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield

    def _refuse_links(self) -> None:
        """UserError when a folder in which the run writes lies elsewhere."""
        boundaries = list(self.cache.iterdir()) if self.cache.is_dir() else []
        for folder in (*(self.path / name for name in _FOLDERS), *boundaries):
            if folder.is_symlink():
                raise UserError(
                    f"{folder} is a symbolic link; a run writes in its own folder only: put the folder itself there"
                )

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Adds one line to ``metrics.jsonl`` and flushes it. ``metrics`` has an integer ``step`` and finite numbers."""
        if not isinstance(metrics.get("step"), int):
            raise ValueError(f"metrics need an integer step, not {metrics.get('step')!r}")
        line = finite_json(metrics, f"{self.metrics}, step {metrics['step']}") + "\n"
        try:
            append(self.metrics, line.encode())
        except OSError as error:
            raise RunError(f"{self.metrics}: cannot be written: {reason(error)}") from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every complete line; a torn end (the run is being written, or was killed) is left out."""
        return [record for _, record in self._metric_lines()]

    def truncate_metrics(self, step: int) -> None:
        """Keeps the complete lines of steps up to ``step`` and drops a torn end; for a resume from ``step``."""
        try:
            if not os.path.lexists(self.metrics):
                return
            write_atomic(self.metrics, (line for line, record in self._metric_lines() if record["step"] <= step))
            sync_directory(self.path)
        except OSError as error:
            raise RunError(f"{self.metrics}: cannot be written: {reason(error)}") from error

    def _metric_lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Complete lines with their objects. RunError when a damaged line is followed by a good one."""
        damaged: int | None = None
        try:
            file = open(self.metrics, "rb")  # noqa: SIM115 (a missing file is no lines, any other error is raised)
        except FileNotFoundError:
            return
        with file:
            for number, line in enumerate(file, start=1):
                record = _metric(line)
                if record is None:
                    damaged = damaged or number
                elif damaged:
                    raise RunError(f"{self.metrics}: line {damaged} is damaged; delete that line")
                else:
                    yield line, record

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes ``summary.json``, which marks the run complete. Numbers must be finite."""
        write_text_atomic(self.summary, finite_json(summary, str(self.summary), indent=2) + "\n")

    def remove_summary(self) -> None:
        """The run is no longer complete. RunError when the summary cannot be deleted."""
        try:
            self.summary.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"{self.summary}: cannot be deleted: {reason(error)}") from error

    def steps_of_summary(self) -> int | None:
        """The steps of the run that ``summary.json`` describes, None when it has none that can be read."""
        if not self.is_complete():
            return None
        try:
            return sum(int(phase["steps"]) for phase in self.read_summary()["phases"])
        except (RunError, KeyError, TypeError, ValueError):
            return None

    def read_summary(self) -> dict[str, Any]:
        """What ``write_summary`` was given. UserError while the run has none, RunError when it is damaged."""
        try:
            return read_object(self.summary)
        except FileNotFoundError:
            raise UserError(
                f"{self.path} has no summary.json: its training has not finished; "
                f"stackwise resume {self.path} continues it"
            ) from None
        except (OSError, ValueError) as error:
            raise RunError(f"{self.summary}: cannot be read: {error}") from error

    def is_complete(self) -> bool:
        """Whether the run has trained to its end."""
        return self.summary.is_file()


def _metric(line: bytes) -> dict[str, Any] | None:
    """The object of a whole line of ``metrics.jsonl``, None when the line is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
