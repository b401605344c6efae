"""What a caller of training is told while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Seen = Callable[[dict[str, Any]], None]


def _nothing(seen: dict[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Callbacks:
    """Two functions of the caller's. An error that one raises ends the run, which can be resumed.

    Attributes:
        on_step: called after each step, before its checkpoint, with ``step``, ``phase``, ``stack``, ``tokens``,
            ``loss``, ``lr``, ``grad_norm`` and, where it was measured, ``validation_loss``. A process that was killed
            takes the steps after its last checkpoint again: they are told again.
        on_phase: called after each phase with what ``summary.json`` says of it.
    """

    on_step: Seen = _nothing
    on_phase: Seen = _nothing

    def step(self, seen: Mapping[str, Any]) -> None:
        """Tells ``on_step`` what it is told of a step, of all that is known."""
        told = ("step", "phase", "stack", "tokens", "loss", "lr", "grad_norm", "validation_loss")
        self.on_step({key: seen[key] for key in told if key in seen})

    @classmethod
    def of(cls, on_step: Seen | None, on_phase: Seen | None) -> Callbacks:
        """``None`` is a function that does nothing."""
        return cls(on_step or _nothing, on_phase or _nothing)


NO_CALLBACKS = Callbacks()
