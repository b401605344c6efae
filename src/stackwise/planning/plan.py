"""The plan of a run: phases, memory, FLOPs and disk, before anything runs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stackwise.config.base import StackWiseConfig
from stackwise.config.schema import DataConfig
from stackwise.data.tokenizers import BUILT_IN_SPECIALS, open_pretrained
from stackwise.growth.curricula import build_phases
from stackwise.growth.phases import Phase
from stackwise.model.lexical import resolve_family
from stackwise.ops.precision import resolve_compute_dtype, resolve_device
from stackwise.planning.cost import ADAM_BYTES, PhaseCost, PhaseCoster, preparation_flops


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


def plan_phases(config: StackWiseConfig, vocab_size: int, present: tuple[int, ...] = ()) -> Planned:
    """Plans without data or weights. ``present``: ids of the Stacks that ``model.initial`` brings, left to right."""
    device = resolve_device(config.training.device)
    dtype = resolve_compute_dtype(config.training, device)
    cost = PhaseCoster(config, vocab_size, dtype)
    phases = build_phases(config, lambda phase: cost(phase).flops, present)
    return Planned(phases, [cost(phase) for phase in phases], device, dtype, vocab_size)


@dataclass(frozen=True)
class Plan:
    """What ``stackwise plan`` shows. Bytes, FLOPs and tokens of the whole run; costs are of one step."""

    phases: list[Phase]
    costs: list[PhaseCost]
    device: torch.device
    tokens_per_step: int
    disk_bytes: int
    limit: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def peak_memory_bytes(self) -> int:
        return max(cost.peak for cost in self.costs)

    @property
    def flops(self) -> float:
        return sum(self.phase_flops)

    @property
    def phase_flops(self) -> list[float]:
        """Of each phase: its steps, and what comes before them."""
        before = preparation_flops(self.phases, self.costs)
        return [first + phase.steps * cost.flops for first, phase, cost in zip(before, self.phases, self.costs)]

    @property
    def fits(self) -> bool | None:
        return None if self.limit is None else self.peak_memory_bytes <= self.limit

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
                    "flops": flops,
                    "tokens": phase.steps * self.tokens_per_step,
                }
                for phase, cost, flops in zip(self.phases, self.costs, self.phase_flops)
            ],
            "peak_memory_bytes": self.peak_memory_bytes,
            "flops": self.flops,
            "disk_bytes": self.disk_bytes,
            "fits": self.fits,
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


def available_memory(device: torch.device) -> int | None:
    """Bytes that the device has in all; ``None`` where it cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def plan_run(config: StackWiseConfig, folder: Path, limit: int | None = None, present: tuple[int, ...] = ()) -> Plan:
    """Plans the run of ``config``. ``limit``: bytes it must fit into; default what the device has."""
    config = resolve_family(config)
    vocab_size, exact = expected_vocab_size(config.data)
    notes = []
    if config.model.vocab_size is not None:
        vocab_size = config.model.vocab_size
    elif not exact:
        notes.append(
            f"the vocabulary is not known before the data is read; this plan takes {vocab_size:,} "
            "(set model.vocab_size to plan with another)"
        )
    planned = plan_phases(config, vocab_size, present)
    if planned.device.type == "cpu" and not config.tight_allocator:
        notes.append(
            "this is the memory that tensors take; the allocator keeps freed ones for reuse, and resident memory is "
            "about a third above it (training.cpu_allocator=tight holds to the plan, and is slower)"
        )
    last = planned.costs[-1]
    # A checkpoint holds the weights and the moments of what trains; one more exists while the oldest is deleted.
    checkpoint = max(4 * c.parameters + ADAM_BYTES * c.trainable_parameters for c in planned.costs)
    disk = (config.training.checkpoint.keep_last + 1) * checkpoint
    assert last.parameters >= planned.costs[0].parameters
    if limit is None:
        limit = available_memory(planned.device)
    tokens = config.training.batch_size * config.training.seq_len
    return Plan(planned.phases, planned.costs, planned.device, tokens, disk, limit, notes)
