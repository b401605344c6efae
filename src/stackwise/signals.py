"""SIGINT (Ctrl-C) and SIGTERM: work ends at its next safe point, and a second signal ends the process at once.

Python raises ``KeyboardInterrupt`` between any two bytecodes: also in a callback of torch, whose C++ then aborts the
process, and in a finalizer, which swallows it. So a handler here only notes the signal, and work asks for it where it
can stop: ``stop_if_asked`` after a phase is planned, a piece of text read, a batch written. A command that is not
``stoppable`` leaves nothing in part; there ``leave_on_signal`` ends the process from within the handler.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from stackwise.errors import INTERRUPTED, STOPPED, StoppedBySignal

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AFTER_STEP = "stopping after this step"
PARENT_PIPE = "STACKWISE_PARENT_PIPE"
"""Environment variable: the descriptor of a pipe that closes when the process that started this one ends."""


class Stopped(KeyboardInterrupt):
    """A noted signal, at a safe point from which nothing goes on."""


class StopRequest:
    """What a signal asked for; true once ``name`` (``SIGINT``, ``SIGTERM``) is set.

    Args:
        prospect: what the next command makes of work that is stopped now; None where it starts from nothing.
    """

    def __init__(self, prospect: str | None = None) -> None:
        self.name: str | None = None
        self.prospect = prospect

    def __bool__(self) -> bool:
        return self.name is not None


_current: StopRequest | None = None


@contextlib.contextmanager
def stoppable(prospect: str | None = None, answer: str | None = AFTER_STEP) -> Iterator[StopRequest]:
    """Within the block a first signal is noted, with a line, and ends nothing; a second one goes to the handler from
    before.

    A block within a block shares the outer request. In the main thread only; elsewhere the request stays empty.

    Args:
        prospect: as of ``StopRequest``.
        answer: what the line says; ``None``: there is none, since the work is short.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest(prospect)
        return
    if _current is not None:
        yield _current
        return
    request = _current = StopRequest(prospect)

    def note(number: int, frame: FrameType | None) -> None:
        handler = previous[signal.Signals(number)]
        if request.name is None:
            request.name = signal.Signals(number).name
            again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
            if answer is not None:
                _say(f"{answer}; {again} ends at once", "\r\x1b[2K")  # over the line of a progress bar
        elif callable(handler):
            handler(number, frame)
        else:
            signal.signal(number, handler)
            os.kill(os.getpid(), number)

    previous = {which: signal.getsignal(which) for which in SIGNALS}
    try:
        for which in SIGNALS:
            signal.signal(which, note)
        yield request
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)
        _current = None


def stop_if_asked() -> None:
    """A safe point: raises ``StoppedBySignal`` (``Stopped`` without a prospect) once a signal is noted."""
    if _current:
        if _current.prospect is None:
            raise Stopped
        raise StoppedBySignal(f"stopped by {_current.name}; {_current.prospect}")


def _say(line: str, on_terminal: str) -> None:
    """Writes a line to stderr from within a handler; ``on_terminal`` comes before it where that is a terminal."""
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, f"{on_terminal if os.isatty(2) else ''}stackwise: {line}\n".encode())


@contextlib.contextmanager
def leave_on_signal() -> Iterator[None]:
    """For a process of our own: a signal that nothing notes ends it at once, with one line. Later ones are ignored.

    Nothing is unwound, so that no instant is a wrong one; what is being written is left as ``kill -9`` leaves it.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        prospect = None if _current is None else _current.prospect
        line = f"stopped at once; {prospect}" if prospect else "interrupted"
        _say(line, "\r\x1b[?25h\n")  # the cursor that a progress bar has hidden
        os._exit(STOPPED if prospect else INTERRUPTED)

    for which in SIGNALS:
        signal.signal(which, leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:  # the command has ended: its exit code stands
        for which in SIGNALS:
            signal.signal(which, signal.SIG_IGN)


def end_with_parent() -> None:
    """Ends this process at once when the one that started it is gone, if that gave it a ``PARENT_PIPE``."""
    descriptor = os.environ.pop(PARENT_PIPE, None)
    if descriptor is None:
        return

    def watch() -> None:
        os.read(int(descriptor), 1)
        os._exit(STOPPED)

    threading.Thread(target=watch, name="parent", daemon=True).start()
