"""What a person sees of a run: a live bar on a terminal and in a notebook, plain lines elsewhere, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
)
from rich.text import Text

from stackwise.growth.phases import Phase
from stackwise.growth.precision import parameters_of
from stackwise.model.rack import Rack
from stackwise.store.state import PhaseRecord, RunState
from stackwise.units import count


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

    def remaining(self, seconds: float | None) -> None:
        """What is left of the whole run, told before each step; ``None``: not known yet."""
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

    def remaining(self, seconds: float | None) -> None:
        pass

    def step(self, done: int, metrics: Mapping[str, Any] | None) -> None:
        pass

    def close(self) -> None:
        pass


def metrics_parts(metrics: Mapping[str, Any]) -> list[str]:
    """The few numbers that a person follows, the one that matters most first."""
    parts = [
        f"loss {metrics['loss']:.3f}",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
        f"lr {metrics['lr']:.2e}",
    ]
    if metrics.get("mfu") is not None:
        parts.append(f"MFU {100 * metrics['mfu']:.0f} %")
    return parts


def ends_in(seconds: float | None) -> str:
    """``run ends in 1:02:03``; nothing where that is not known."""
    return "" if seconds is None else f"run ends in {clock_time(seconds)}"


def clock_time(seconds: float) -> str:
    """``0:07``, ``12:34``, ``1:02:03``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class LineReporter:
    """Plain lines, at most one every ``interval`` seconds for progress."""

    def __init__(self, interval: float = 5.0) -> None:
        self._interval = interval
        self._last = 0.0
        self._total = 0
        self._left: float | None = None

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

    def remaining(self, seconds: float | None) -> None:
        self._left = seconds

    def step(self, done: int, metrics: Mapping[str, Any] | None) -> None:
        if metrics is not None and (self._due() or done == self._total):
            where = [
                f"  {done}/{self._total}",
                f"{100 * done / self._total:.0f} %",
                *filter(None, [ends_in(self._left)]),
            ]
            self._line("  ".join([*where, *metrics_parts(metrics)]))

    def close(self) -> None:
        pass


class _Left(ProgressColumn):
    """What is left of the run; of other work, what is left of it."""

    def render(self, task: Task) -> Text:
        text: str = task.fields["left"]
        if not text and task.time_remaining is not None:
            text = f"{clock_time(task.time_remaining)} left"
        return Text(text)


class LiveReporter:
    """A bar that follows the steps of a phase, and lines that stay above it.

    On a narrow terminal the bar is short and the last of the metrics are left out; no number is cut.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=max(6, min(24, console.width // 8))),
            MofNCompleteColumn(),  # shows "?" where the total is not known
            TaskProgressColumn("{task.percentage:.0f} %"),
            _Left(),
            TextColumn("{task.fields[text]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._description = ""
        self._left, self._metrics = "", list[str]()

    def _start(self, description: str, total: int | None, done: int) -> None:
        self._end()
        self._bar.start()
        self._description = description
        self._task = self._bar.add_task(description, total=total, completed=done, text="", left="")

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
        if metrics is not None:
            self._metrics = metrics_parts(metrics)
        self._bar.update(self._task, completed=done, left=self._left, text=self._fitting(done))

    def _fitting(self, done: int) -> str:
        """As many of the metrics as there is room for beside the rest of the line."""
        task = self._bar.tasks[0]
        done_of_all = f"{task.total:.0f}/{task.total:.0f}" if task.total else ""
        bar = max(6, min(24, self._console.width // 8))
        room = self._console.width - sum(
            1 + n for n in (len(self._description), bar, len(done_of_all), 5, len(self._left))
        )
        kept = ""
        for part in self._metrics:
            longer = f"{kept}  {part}" if kept else part
            if len(longer) > room:
                break
            kept = longer
        return kept

    def remaining(self, seconds: float | None) -> None:
        self._left = ends_in(seconds)

    def close(self) -> None:
        self._end()


class NotebookReporter:
    """Lines in the output of the cell, and below them one that follows the work in place, each ``interval`` seconds."""

    def __init__(self, interval: float = 0.2) -> None:
        self._interval, self._last = interval, 0.0
        self._handle: Any = None
        self._total, self._metrics, self._left = 0, "", ""

    def note(self, text: str) -> None:
        print(text, flush=True)  # a notebook shows what goes to stderr as an error

    def work(self, description: str, done: int, total: int | None) -> None:
        self._show(f"  {description}: {f'{100 * done / total:.0f} %' if total else f'{done:,}'}", done == total)

    def phase(self, text: str, total_steps: int, done: int) -> None:
        self.note(text)
        self._handle, self._total, self._metrics = None, total_steps, ""

    def step(self, done: int, metrics: Mapping[str, Any] | None) -> None:
        if metrics is not None:
            self._metrics = "  ".join(metrics_parts(metrics))
        filled = 24 * done // self._total
        bar = f"  {'█' * filled}{'░' * (24 - filled)} {done}/{self._total}"
        self._show("  ".join(filter(None, [bar, self._left, self._metrics])), done == self._total)

    def remaining(self, seconds: float | None) -> None:
        self._left = ends_in(seconds)

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


class Pace:
    """How long a run still takes, by the FLOPs that it has done a second since this was made, all else included.

    Args:
        flops: of the whole run.
    """

    def __init__(self, state: RunState, flops: float) -> None:
        self._state, self._flops = state, flops
        self._begun, self._before = time.perf_counter(), state.flops

    def left(self) -> float | None:
        """Seconds; ``None`` before anything is done."""
        done = self._state.flops - self._before
        elapsed = time.perf_counter() - self._begun
        return max(0.0, self._flops - self._state.flops) / done * elapsed if done else None


def phase_starts(index: int, n_phases: int, phase: Phase, record: PhaseRecord, rack: Rack, several: bool) -> str:
    """The line that a phase starts with, which names its objective where the run has ``several``."""
    total = sum(parameters_of(module) for module in rack.parts().values())
    how = f", from the cache at boundary {phase.enters}" if phase.cached else ""
    for new in phase.growth if len(phase.stacks) > 1 else ():
        source = f" of stack {new.source}" if new.source is not None else ""
        how += f", new stack {new.stack}: {new.init}{source}"
    if several:
        how += f", objective {record.objective}"
    return (
        f"phase {index + 1}/{n_phases}  {phase.name}: {count(len(phase.stacks), 'stack')}, "
        f"{record.trainable_parameters:,} of {total:,} parameters train, {count(phase.steps, 'step')}{how}"
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
