"""The plan of a run: phases, memory, FLOPs, disk and time, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from stackwise.config.base import StackWiseConfig
from stackwise.config.data import DataConfig
from stackwise.config.run import CheckpointConfig
from stackwise.data.tokenizers import BUILT_IN_SPECIALS, open_pretrained
from stackwise.growth.curricula import build_phases
from stackwise.growth.phases import Phase
from stackwise.model.architecture import Rack
from stackwise.model.lexical import resolve_family
from stackwise.planning.cost import PhaseCoster, preparation_flops
from stackwise.planning.devices import Machine, this_machine
from stackwise.planning.dry_step import PhaseCost
from stackwise.planning.flops import Flops
from stackwise.planning.validation import ValidationCost, validation_costs


@dataclass(frozen=True)
class Planned:
    """The phases of a run and what a step of each costs."""

    phases: list[Phase]
    costs: list[PhaseCost]
    device: torch.device
    compute_dtype: torch.dtype | None
    vocab_size: int

    @property
    def preparation_flops(self) -> list[float]:
        """FLOPs before the first step of each phase."""
        return preparation_flops(self.phases, self.costs)

    @property
    def flops(self) -> float:
        return sum(self.phase_flops)

    @property
    def phase_flops(self) -> list[float]:
        """Of each phase: its steps, and what comes before them."""
        return [kinds.total for kinds in self.phase_kinds]

    @property
    def phase_kinds(self) -> list[Flops]:
        """``phase_flops`` by kind; what comes before the steps fills the cache."""
        before = preparation_flops(self.phases, self.costs)
        return [
            Flops(cache=first) + cost.kinds * phase.steps for first, phase, cost in zip(before, self.phases, self.costs)
        ]


def plan_phases(
    config: StackWiseConfig,
    vocab_size: int,
    present: tuple[int, ...] = (),
    machine: Machine | None = None,
    rack: Rack | None = None,
    given: Sequence[int] = (),
) -> Planned:
    """Plans without data or weights.

    Args:
        present: ids of the Stacks that are there before the first phase, left to right.
        machine: what it will run on; default the device here that ``config`` means.
        rack: the Rack that the run starts from, where that was not made from ``config``; it is only looked at.
        given: the steps of the first phases, where they do not follow from the budget.
    """
    return _planned(config, vocab_size, present, machine or this_machine(config.training), rack, given)[1]


def _planned(
    config: StackWiseConfig,
    vocab_size: int,
    present: tuple[int, ...],
    machine: Machine,
    rack: Rack | None = None,
    given: Sequence[int] = (),
) -> tuple[PhaseCoster, Planned]:
    cost = PhaseCoster(config, vocab_size, machine.compute_dtype, rack, device=machine.device.type)
    phases = build_phases(config, lambda phase: cost(phase).flops, present, cost.preparation, given)
    costs = [cost(phase) for phase in phases]
    return cost, Planned(phases, costs, machine.device, machine.compute_dtype, vocab_size)


@dataclass(frozen=True)
class Plan(Planned):
    """What ``stackwise plan`` shows. Bytes, FLOPs and tokens are those of the whole run, costs those of one step.

    Attributes:
        validations: what scoring the validation text takes, of each phase.
        limit: bytes of the device; ``None``: not known. The other limits are the machine's.
        seconds_limit: that the run may take; ``None``: any.
    """

    validations: list[ValidationCost]
    tokens_per_step: int
    disk_bytes: int
    limit: int | None
    machine: Machine
    notes: list[str] = field(default_factory=list)
    seconds_limit: float | None = None

    @property
    def peak_memory_bytes(self) -> int:
        """Of the device, while steps run and while the Rack is scored."""
        return max(*(cost.peak for cost in self.costs), *(found.peak for found in self.validations))

    @property
    def host_memory_bytes(self) -> int:
        return max(cost.host for cost in self.costs)

    @property
    def phase_seconds(self) -> list[float | None]:
        """Of each phase's FLOPs at the rate that the machine is taken to reach; ``None`` where that is not known."""
        return [self._seconds(flops) for flops in self.phase_flops]

    @property
    def validation_flops(self) -> float:
        return sum(found.flops for found in self.validations)

    @property
    def validation_seconds(self) -> float | None:
        return self._seconds(self.validation_flops)

    @property
    def seconds(self) -> float | None:
        """Of training and validation."""
        return self._seconds(self.flops + self.validation_flops)

    def _seconds(self, flops: float) -> float | None:
        rate = self.machine.reached_flops
        return None if rate is None else flops / rate

    @property
    def needs(self) -> list[tuple[str, int, int | None]]:
        """(what, bytes needed, bytes there are or ``None``) of the device, its host and the disk."""
        return [
            ("device memory", self.peak_memory_bytes, self.limit),
            ("host memory", self.host_memory_bytes, self.machine.host_memory),
            ("disk", self.disk_bytes, self.machine.disk),
        ]

    @property
    def missing(self) -> list[str]:
        """What there is not enough of: of ``needs``, and ``time``."""
        short = [what for what, needed, there in self.needs if there is not None and needed > there]
        late = None not in (self.seconds, self.seconds_limit) and self.seconds > self.seconds_limit  # type: ignore[operator]
        return [*short, "time"] if late else short

    @property
    def fits(self) -> bool | None:
        """``None`` where nothing is too small, but the device does not say how much it has."""
        if self.missing:
            return False
        return None if self.limit is None else True

    def totals(self) -> dict[str, Any]:
        return {
            "peak_memory_bytes": self.peak_memory_bytes,
            "host_memory_bytes": self.host_memory_bytes,
            "flops": self.flops,
            "disk_bytes": self.disk_bytes,
            "validation": {
                "peak_memory_bytes": max(found.peak for found in self.validations),
                "flops": self.validation_flops,
                "seconds": self.validation_seconds,
            },
            "seconds": self.seconds,
            "fits": self.fits,
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "phases": [
                {
                    "name": phase.name,
                    "stack": phase.stack,
                    "stacks": list(phase.stacks),
                    "trains": list(phase.trains),
                    "steps": phase.steps,
                    "trainable_parameters": cost.trainable_parameters,
                    "memory_bytes": cost.memory(),
                    "host_memory_bytes": cost.host,
                    "cache_bytes": cost.cache_bytes,
                    "flops": kinds.total,
                    "flops_by_kind": kinds.to_dict(),
                    "seconds": seconds,
                    "tokens": phase.steps * self.tokens_per_step,
                    "validation": {
                        "times": scored.times,
                        "tokens": scored.tokens,
                        "memory_bytes": scored.peak,
                        "flops": scored.flops,
                        "seconds": self._seconds(scored.flops),
                    },
                }
                for phase, cost, kinds, seconds, scored in zip(
                    self.phases, self.costs, self.phase_kinds, self.phase_seconds, self.validations
                )
            ],
            **self.totals(),
            "machine": self._machine_dict(self.machine),
        }

    def _machine_dict(self, machine: Machine) -> dict[str, Any]:
        return {
            "name": machine.name,
            "compute_dtype": str(machine.compute_dtype or torch.float32).removeprefix("torch."),
            "memory_bytes": self.limit,
            "host_memory_bytes": machine.host_memory,
            "disk_bytes": machine.disk,
            "flops_per_second": machine.flops_per_second,
            "rate": machine.rate,
            "reached_flops_per_second": machine.reached_flops,
        }


def expected_vocab_size(data: DataConfig) -> tuple[int, bool]:
    """The tokenizer's vocabulary without reading the corpus, and whether that is certain."""
    tokenizer = data.tokenizer
    match tokenizer.kind:
        case "bytes":
            return 256 + len(BUILT_IN_SPECIALS), True
        case "bpe":
            return tokenizer.vocab_size, True
        case "pretrained":
            assert tokenizer.path is not None
            return open_pretrained(tokenizer.path).vocab_size, True
        case "characters":
            return USUAL_CHARACTERS, False


USUAL_CHARACTERS = 100
"""Distinct characters of an English text, about."""


def stored_bytes(costs: Iterable[PhaseCost], checkpoint: CheckpointConfig, keep_best: bool) -> int:
    """The most that checkpoints and activation cache take on disk at once.

    A checkpoint holds the tensors as they are stored and the moments; what is frozen is one object that all share.
    One checkpoint more than ``keep_last`` exists while the oldest is deleted, and some may be of the phase before.
    Those of phase ends hold what trained then, and each may have a best one of its own; so may the oldest of the rest.
    """
    most, before, kept = 0, 0, 0
    for cost in costs:
        moving = cost.gradients + cost.optimizer  # gradients are as large as what trains
        frozen = cost.weights + cost.waiting - cost.gradients
        others = (checkpoint.keep_last + 1 + keep_best) * max(moving, before)
        kept += (1 + keep_best) * moving if checkpoint.keep_phase_ends else 0
        most = max(most, frozen + others + kept + cost.cache_bytes)
        before = moving
    return most


def plan_run(
    config: StackWiseConfig,
    folder: Path,
    limit: int | None = None,
    present: tuple[int, ...] = (),
    machine: Machine | None = None,
    vocab_size: int | None = None,
    seconds_limit: float | None = None,
    given: Sequence[int] = (),
) -> Plan:
    """Plans the run of ``config``, which may have time and memory limits.

    Args:
        folder: on the disk that the run would be written to.
        limit: bytes it must fit into; default what tensors can have of the device's.
        present: ids of the Stacks that ``model.initial`` brings, left to right.
        machine: what it will run on; default the one here, whose speed is not known.
        vocab_size: of the run; default what can be told of it before the data is read.
        seconds_limit: that it may take.
        given: as for ``plan_phases``.
    """
    machine = machine or this_machine(config.training, folder)
    embedding = config.model.tokenizer_embedding
    if (
        embedding.embedding_dim is None or config.model.vocab_size is None
    ):  # a run has them, and needs its family no more
        config = resolve_family(config)
    exact, notes = True, []
    vocab_size = config.model.vocab_size or vocab_size
    if vocab_size is None:
        vocab_size, exact = expected_vocab_size(config.data)
    if not exact:
        notes.append(
            f"the vocabulary is not known before the data is read; this plan takes {vocab_size:,} "
            "(set model.vocab_size to plan with another)"
        )
    coster, planned = _planned(config, vocab_size, present, machine, None, given)
    if planned.device.type == "cpu" and not config.tight_allocator:
        notes.append(
            "this is the memory that tensors take; the allocator keeps freed ones for reuse, and resident memory is "
            "about a third above it (training.cpu_allocator=tight holds to the plan, and is slower)"
        )
    if config.training.evaluation.max_tokens is None:
        notes.append(
            "validation reads all of its text, of which this plan counts one window, since how much there is is not "
            "known before the data is read (training.evaluation.max_tokens caps it)"
        )
    return Plan(
        **{f.name: getattr(planned, f.name) for f in fields(planned)},
        validations=validation_costs(config.training, planned.phases, planned.costs, coster.scoring),
        tokens_per_step=config.training.batch_size * config.training.seq_len,
        disk_bytes=stored_bytes(planned.costs, config.training.checkpoint, config.training.keep_best),
        limit=machine.usable_memory if limit is None else limit,
        machine=machine,
        notes=notes,
        seconds_limit=seconds_limit,
    )
