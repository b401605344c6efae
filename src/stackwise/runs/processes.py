"""Commands of this package, several at a time, each in a process of its own that ends when this one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO

import torch

from stackwise.signals import PARENT_PIPE, SIGNALS, StopRequest


@dataclass(frozen=True)
class Command:
    """One command: ``stackwise`` with these arguments.

    Attributes:
        name: what people call it.
        arguments: of ``stackwise``.
        given: what it reads as ``/dev/stdin``.
    """

    name: str
    arguments: tuple[str, ...]
    given: str = ""


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    said: IO[bytes] | None

    def last_line(self) -> str:
        if self.said is None:
            return ""
        self.said.seek(0)
        lines = self.said.read().decode("utf-8", "replace").splitlines()
        return lines[-1] if lines else ""


def threads_each(jobs: int) -> int:
    """Threads of one of ``jobs`` processes that share the threads this one would use."""
    return max(1, torch.get_num_threads() // jobs)


def run_commands(
    commands: Sequence[Command], jobs: int, stop: StopRequest, done: Callable[[Command, float], None]
) -> dict[str, int]:
    """Runs the commands, ``jobs`` at a time; the exit code of each that was begun, by its name.

    A process each, in a process group of its own, so that Ctrl-C reaches it once, through us. It ends when we do,
    however we end: it reads a pipe whose other end only we hold. After one that fails no other begins, and those in
    progress get SIGTERM, as they get the signal that ``stop`` notes.

    Args:
        jobs: with more than one, each takes its share of the processors (unless OMP_NUM_THREADS is set), and what it
            writes to stderr is kept back; of one that does not end well, the last line is shown.
        done: called with each that has ended well, and its seconds.
    """
    codes: dict[str, int] = {}
    waiting, running = list(commands), dict[Command, tuple[_Running, float]]()
    signalled = False
    environment = {**os.environ}
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(threads_each(jobs)))
    with ExitStack() as stack:
        read, write = os.pipe()
        stack.callback(os.close, read)
        stack.callback(os.close, write)
        environment[PARENT_PIPE] = str(read)
        while running or (waiting and not stop and not any(codes.values())):
            while waiting and len(running) < jobs and not stop and not any(codes.values()):
                command = waiting.pop(0)
                said = stack.enter_context(tempfile.TemporaryFile()) if jobs > 1 else None
                running[command] = _Running(_start(command, read, environment, said), said), time.monotonic()
            if (stop or any(codes.values())) and not signalled:
                signalled = True
                for other, _ in running.values():
                    other.process.send_signal(signal.Signals[stop.name] if stop.name else signal.SIGTERM)
            for command, (other, since) in list(running.items()):
                if (code := other.process.poll()) is None:
                    continue
                del running[command]
                codes[command.name] = code
                if code == 0:
                    done(command, time.monotonic() - since)
                elif line := other.last_line():
                    print(f"{command.name}: {line}", file=sys.stderr, flush=True)
            time.sleep(0.02)
    return codes


def _start(
    command: Command, pipe: int, environment: Mapping[str, str], said: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    # Signals wait until the process has its handlers: it inherits the mask, and lifts it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with tempfile.TemporaryFile() as given:
            given.write(command.given.encode())
            given.seek(0)
            return subprocess.Popen(
                [sys.executable, "-m", "stackwise", *command.arguments],
                stdin=given,
                stdout=None if said is None else said,
                stderr=said,
                pass_fds=[pipe],
                env=environment,
                process_group=0,
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
