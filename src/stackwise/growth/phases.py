"""A run as a list of phases. Frozen data: no tensor is needed to build, print, cost or test it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

OptimizerState = Literal["keep", "reset", "copy"]
Init = Literal["random", "identity", "copy"]


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step of a phase, as a share of its peak.

    ``warmup_steps`` rise linearly; from ``decay_start`` on (steps of the phase) the rate falls towards ``min_ratio``
    along ``shape`` and reaches it at ``decay_end``, which may lie beyond the phase: a cosine over the whole run is cut
    into phases so.
    """

    warmup_steps: int
    shape: Literal["linear", "cosine"]
    decay_start: int
    decay_end: int
    min_ratio: float


@dataclass(frozen=True)
class Growth:
    """A Stack that joins the Rack at the start of a phase.

    ``source`` is the Stack whose weights (and, with ``optimizer_state: copy``, moments) it starts from, or ``None``.
    """

    stack: int
    init: Init
    source: int | None = None


@dataclass(frozen=True)
class Phase:
    """A stretch of training in which what trains, what is frozen and the budget stay the same.

    Attributes:
        name: unique in the run.
        stacks: ids of the Rack's Stacks, left to right.
        trains: the parts with full gradients (``Rack.parts`` names them); everything else is frozen.
        growth: the Stacks that are new, if any.
        steps: optimizer steps.
        schedule: of the learning rate.
        optimizer_state: what happens to the moments at the start.
    """

    name: str
    stacks: tuple[int, ...]
    trains: tuple[str, ...]
    steps: int
    schedule: Schedule
    growth: tuple[Growth, ...] = ()
    optimizer_state: OptimizerState = "keep"

    @property
    def stack(self) -> int | None:
        """The Stack this phase is about; ``None`` when it is about all of them."""
        if len(self.growth) == 1:
            return self.growth[0].stack
        return self.stacks[0] if len(self.stacks) == 1 else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
