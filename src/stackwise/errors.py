"""Errors that end a command with one line instead of a traceback."""


class UserError(ValueError):
    """The user's input is wrong; the message is one line. Commands exit with code 2."""


class ConfigError(UserError):
    """A config key, value or combination is wrong."""


class RunError(RuntimeError):
    """Something failed while running; the message is one line. Commands exit with code 1."""


class StoppedBySignal(RuntimeError):
    """A signal stopped the run after a resumable checkpoint was saved. Commands exit with code 3."""


STOPPED = 3
"""The exit code of ``StoppedBySignal``."""

INTERRUPTED = 130
"""The exit code of a command that a signal ended before there was anything to go on from."""
