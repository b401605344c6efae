"""What a person sees of a run: a live bar on a terminal and in a notebook, plain lines elsewhere, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from stackwise.growth.phases import Phase
from stackwise.growth.precision import parameters_of
from stackwise.model.rack import Rack
from stackwise.store.state import PhaseRecord, RunState


class Reporter(Protocol):
    """Receives what happens in a run."""

    def note(self, text: str) -> None:
        """A line worth keeping."""
        ...

    def work(self, description: str, done: int, total: int | None) -> None:
        """Progress of something that is not training, in any unit; ``done == total`` ends it."""
        ...

    def phase(self, text: str, total_steps: int, done: int) -> None:
        """A phase starts (or goes on, after ``done`` steps)."""
        ...

    def step(self, done: int, metrics: Mapping[str, Any] | None) -> None:
        """A step of the phase is done; ``metrics`` when they were logged."""
        ...

    def close(self) -> None: ...


class SilentReporter:
    """Says nothing; for use as a library."""

    def note(self, text: str) -> None:
        pass

    def work(self, description: str, done: int, total: int | None) -> None:
        pass

    def phase(self, text: str, total_steps: int, done: int) -> None:
        pass

    def step(self, done: int, metrics: Mapping[str, Any] | None) -> None:
        pass

    def close(self) -> None:
        pass


def metrics_line(metrics: Mapping[str, Any]) -> str:
    """The few numbers that a person follows."""
    parts = [
        f"step {metrics['step']}",
        f"loss {metrics['loss']:.3f}",
        f"lr {metrics['lr']:.2e}",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
    ]
    if metrics.get("mfu") is not None:
        parts.append(f"MFU {100 * metrics['mfu']:.0f} %")
    return "  ".join(parts)


class LineReporter:
    """Plain lines, at most one every ``interval`` seconds for progress."""

    def __init__(self, interval: float = 5.0) -> None:
        self._interval = interval
        self._last = 0.0
        self._total = 0

    def _line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._interval:
            return False
        self._last = now
        return True

    def note(self, text: str) -> None:
        self._line(text)

    def work(self, description: str, done: int, total: int | None) -> None:
        if self._due():
            share = f"{100 * done / total:.0f} %" if total else f"{done:,}"
            self._line(f"  {description}: {share}")

    def phase(self, text: str, total_steps: int, done: int) -> None:
        self._total = total_steps
        self._line(text)

    def step(self, done: int, metrics: Mapping[str, Any] | None) -> None:
        if metrics is not None and (self._due() or done == self._total):
            self._line(f"  {done}/{self._total}  {metrics_line(metrics)}")

    def close(self) -> None:
        pass


class LiveReporter:
    """A bar that follows the steps, and lines that stay above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),  # shows "?" where the total is not known
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._description = ""

    def _start(self, description: str, total: int | None, done: int) -> None:
        self._end()
        self._bar.start()
        self._description = description
        self._task = self._bar.add_task(description, total=total, completed=done, text="")

    def _end(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task, self._description = None, ""
        self._bar.stop()

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def work(self, description: str, done: int, total: int | None) -> None:
        if description != self._description:
            self._start(description, total, done)
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total)
        if total is not None and done >= total:
            self._end()

    def phase(self, text: str, total_steps: int, done: int) -> None:
        self.note(text)
        self._start("  training", total_steps, done)

    def step(self, done: int, metrics: Mapping[str, Any] | None) -> None:
        if self._task is None:
            return
        self._bar.update(self._task, completed=done)
        if metrics is not None:
            self._bar.update(self._task, text=metrics_line(metrics))

    def close(self) -> None:
        self._end()

    def __enter__(self) -> Self:
        return self


class NotebookReporter:
    """Lines in the output of the cell, and below them one that follows the work in place, each ``interval`` seconds."""

    def __init__(self, interval: float = 0.2) -> None:
        self._interval, self._last = interval, 0.0
        self._handle: Any = None
        self._total, self._metrics = 0, ""

    def note(self, text: str) -> None:
        print(text, flush=True)  # a notebook shows what goes to stderr as an error

    def work(self, description: str, done: int, total: int | None) -> None:
        self._show(f"  {description}: {f'{100 * done / total:.0f} %' if total else f'{done:,}'}", done == total)

    def phase(self, text: str, total_steps: int, done: int) -> None:
        self.note(text)
        self._handle, self._total, self._metrics = None, total_steps, ""

    def step(self, done: int, metrics: Mapping[str, Any] | None) -> None:
        if metrics is not None:
            self._metrics = metrics_line(metrics)
        filled = 24 * done // self._total
        self._show(f"  {'█' * filled}{'░' * (24 - filled)} {done}/{self._total}  {self._metrics}", done == self._total)

    def _show(self, text: str, now: bool) -> None:
        from IPython.display import display

        if not now and time.monotonic() - self._last < self._interval:
            return
        self._last, shown = time.monotonic(), {"text/plain": text}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)

    def close(self) -> None:
        pass


def _in_notebook() -> bool:
    shells = sys.modules.get("ipykernel.zmqshell")
    return shells is not None and shells.ZMQInteractiveShell.initialized()


def console_reporter() -> Reporter:
    """A live bar in a notebook and where stderr is a terminal, plain lines elsewhere."""
    if _in_notebook():
        return NotebookReporter()
    console = Console(stderr=True)
    return LiveReporter(console) if console.is_terminal else LineReporter()


class Clock:
    """Wall time of a phase, and the pace of its steps. ``lap`` counts from when the clock is made."""

    def __init__(self, state: RunState) -> None:
        self._lap = time.perf_counter()
        self._state = state

    def start(self) -> None:
        """The pace counts from here."""
        self._tokens, self._flops, self._since = self._state.tokens, self._state.flops, time.perf_counter()

    def pace(self) -> tuple[float, float]:
        """Tokens and FLOPs a second since the last call."""
        tokens, flops, since = self._tokens, self._flops, self._since
        self.start()
        elapsed = self._since - since
        return (self._tokens - tokens) / elapsed, (self._flops - flops) / elapsed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count in the pace."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def lap(self) -> float:
        """Seconds since the last call."""
        before, self._lap = self._lap, time.perf_counter()
        return self._lap - before


def phase_starts(index: int, count: int, phase: Phase, record: PhaseRecord, rack: Rack, several: bool) -> str:
    """The line that a phase starts with, which names its objective where the run has ``several``."""
    total = sum(parameters_of(module) for module in rack.parts().values())
    how = f", from the cache at boundary {phase.enters}" if phase.cached else ""
    for new in phase.growth if len(phase.stacks) > 1 else ():
        source = f" of stack {new.source}" if new.source is not None else ""
        how += f", new stack {new.stack}: {new.init}{source}"
    if several:
        how += f", objective {record.objective}"
    return (
        f"phase {index + 1}/{count}  {phase.name}: {len(phase.stacks)} stacks, "
        f"{record.trainable_parameters:,} of {total:,} parameters train, {phase.steps:,} steps{how}"
    )


def phase_ends(record: PhaseRecord) -> str:
    """The line that a phase ends with."""
    text = f"  {record.name}: training loss {record.last_loss:.4f}"
    if record.validation_loss is not None:
        text += f", validation loss {record.validation_loss:.4f}"
    if record.bits_per_byte is not None:
        text += f" ({record.bits_per_byte:.4f} bits per byte)"
    if record.stopped_early is not None:
        text += f", stopped early after {record.steps:,} steps"
    return f"{text}, {record.seconds:.0f} s"
