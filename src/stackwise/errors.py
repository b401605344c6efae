"""Errors that end a command with one line instead of a traceback, and what such a line says of names."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The user's input is wrong; the message is one line. Commands exit with code 2."""


class ConfigError(UserError):
    """A config key, value or combination is wrong."""


class RunError(RuntimeError):
    """Something failed while running; the message is one line. Commands exit with code 1."""


class StoppedBySignal(RuntimeError):
    """A signal stopped the run after a resumable checkpoint was saved. Commands exit with code 3."""


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that an allocation failed: Python's, or that of one of torch's devices."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's; torch is not imported
        return True
    said = ("DefaultCPUAllocator: ", "MPS backend out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


STOPPED = 3
"""The exit code of ``StoppedBySignal``."""

INTERRUPTED = 130
"""The exit code of a command that a signal ended before there was anything to go on from."""


def nearest(name: object, known: Iterable[str], likeness: float = 0.7) -> str | None:
    """The one of ``known`` that ``name`` may be a misspelling of. ``likeness``: from 0 to 1, the least that counts."""
    found = difflib.get_close_matches(str(name), list(known), 1, likeness)
    return found[0] if found else None


def allowed(name: object, known: Iterable[str]) -> str:
    """What to say after "NAME is wrong; ": ``allowed: a, b``, and ``; did you mean b?`` for a misspelt ``b``."""
    known = list(known)
    near = nearest(name, known)
    return f"allowed: {', '.join(known)}" + (f"; did you mean {near}?" if near else "")
