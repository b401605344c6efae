"""A run as a list of phases. Frozen data: no tensor is needed to build, print, cost or test it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from stackwise.config.attention import AttentionMode
from stackwise.config.growth import PrecisionName
from stackwise.config.objectives import ObjectiveName
from stackwise.objectives.depth import Interval

OptimizerState = Literal["keep", "reset", "copy"]
Init = Literal["random", "identity", "copy"]
AdapterKind = Literal["stack", "progressive"]


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
class Adapter:
    """Low-rank adapters (LoRA, 2106.09685) on every linear layer of one Stack: W x + (alpha / rank) B A x.

    A Stack has at most one of each kind: ``stack`` from when it is made, ``progressive`` from when it first is trunk.
    """

    stack: int
    kind: AdapterKind
    rank: int
    alpha: float
    dropout: float = 0.0
    trains: bool = True


@dataclass(frozen=True)
class Phase:
    """A stretch of training in which what trains, what is frozen and the budget stay the same.

    Attributes:
        name: unique in the run.
        stacks: ids of the Rack's Stacks, left to right.
        trains: the parts with full gradients: ``embedding``, ``stack.<id>``, ``norm``, ``head``, or a single Block,
            ``stack.<id>/blocks.<index>``; everything else is frozen.
        growth: the Stacks that are new, if any.
        steps: optimizer steps.
        schedule: of the learning rate.
        objective: what is learned.
        optimizer_state: what happens to the moments at the start.
        precision: how the linear layers of Stacks are stored, (id, precision); Stacks that are not named are ``full``.
        adapters: all that are there in this phase, trained or not.
        cached: the hidden state at boundary ``enters`` is read from the activation cache; the Stacks before it, and
            the embedding, stay off the device.
        enters: the boundary: how many Stacks the input has passed when it enters. 0 unless ``cached``, or unless the
            boundary is recomputed as the cache would hold it.
        examples: the batches of the phase: (first, count) of the run's stream, taken again from the first when they are
            through; ``None``: they go on where the phase before ended. Phases that share a cache name the same ones.
        noise: of depth as time: the noise levels that the Stacks denoise, and whether their loss is taken; of mlm: one
            interval, the masking rates.
        attention: the direction of attention, in a run whose objectives differ in it; ``None``: each Block has the one
            that the Rack was made with.
    """

    name: str
    stacks: tuple[int, ...]
    trains: tuple[str, ...]
    steps: int
    schedule: Schedule
    objective: ObjectiveName
    growth: tuple[Growth, ...] = ()
    optimizer_state: OptimizerState = "keep"
    precision: tuple[tuple[int, PrecisionName], ...] = ()
    adapters: tuple[Adapter, ...] = ()
    cached: bool = False
    enters: int = 0
    examples: tuple[int, int] | None = None
    noise: tuple[Interval, ...] = ()
    attention: AttentionMode | None = None

    def precision_of(self, stack: int) -> PrecisionName:
        return dict(self.precision).get(stack, "full")

    @property
    def trained_stacks(self) -> set[int]:
        """Ids of the Stacks of which anything but adapters trains."""
        parts = (name.partition("/")[0] for name in self.trains)
        return {int(part.removeprefix("stack.")) for part in parts if part.startswith("stack.")}

    def offloaded(self, offload: Literal["none", "host", "disk"]) -> set[int]:
        """Ids of offloaded Stacks: those that never run, and with ``offload`` all frozen ones."""
        unused = set(self.stacks[: self.enters]) if self.cached else set()
        return unused if offload == "none" else unused | (set(self.stacks) - self.trained_stacks)

    @property
    def stack(self) -> int | None:
        """The Stack this phase is about; ``None`` when it is about all of them."""
        if len(self.growth) == 1:
            return self.growth[0].stack
        return self.stacks[0] if len(self.stacks) == 1 else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
