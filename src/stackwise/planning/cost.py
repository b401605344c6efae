"""What a phase costs, found by dry-running its training step.

The real model, loss and backward pass run on fake tensors (``planning.dry_step``). What is planned is therefore what
runs, for every model that runs. What the step alone does not show is added here: Stacks before the one where gradients
begin, offloaded Stacks, the activation cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stackwise.config.base import StackWiseConfig
from stackwise.config.growth import PrecisionName
from stackwise.growth.phases import Adapter, Phase
from stackwise.growth.precision import PrecisionManager, parameters_of
from stackwise.growth.preparation import set_trainable
from stackwise.kinds import OBJECTIVES
from stackwise.model.architecture import Rack, Stack, rack_spec_from_config, stack_spec_from_config
from stackwise.model.block import Block
from stackwise.model.linear import LowRank, linears
from stackwise.model.reading import Reading
from stackwise.model.spec import BlockSpec
from stackwise.objectives.base import CrossEntropyObjective
from stackwise.ops.attention import planned_for
from stackwise.ops.boundary import BoundaryLayout, boundary_format
from stackwise.ops.losses import chunk_rows
from stackwise.ops.precision import autocast, resolve_device
from stackwise.planning.dry_step import Ledger, PhaseCost, bytes_of, extended, measure_segments
from stackwise.planning.flops import Flops
from stackwise.signals import stop_if_asked, stoppable

READ_AHEAD = 3
"""Batches of a cached boundary that are in memory on a CPU beside the one in use: two read ahead and one on its way."""


RUNTIME_BYTES = 12 * 2**20
"""Resident memory that training on a CPU takes beside tensors: thread buffers of the matrix library and pages of code
that is first used then. Measured at 7 to 12 MiB, 22 with a vocabulary of 32,000 (docs/log.md)."""

COMPILER_BYTES = 75 * 2**20
"""Resident memory that ``training.compile`` takes on a CPU beside tensors: the compiler's modules and its graphs.
Measured at 69 to 100 MiB (docs/log.md)."""


@dataclass(frozen=True)
class _Kind:
    """A Stack as far as its cost goes. ``trains``: the names within the Stack, an empty one for all of it."""

    blocks: tuple[BlockSpec, ...]
    precision: PrecisionName
    trains: tuple[str, ...]
    adapters: tuple[Adapter, ...]
    offloaded: bool

    @property
    def needs_gradients(self) -> bool:
        return bool(self.trains) or any(a.trains for a in self.adapters)


@dataclass(frozen=True)
class _StackFacts:
    """Of a Stack that runs without gradients: bytes (those of its adapters too, or not), parameters, FLOPs of one
    micro-batch by kind, and what it holds then.
    """

    bytes: int
    own_bytes: int
    parameters: int
    flops: Flops
    transient: int


class PhaseCoster:
    """Costs one step of a phase of the run that ``config`` describes; what is equal is measured once.

    The Stacks before the first one that needs gradients are measured one by one, since their costs add up, and the rest
    as a Rack that the hidden state enters.

    Args:
        vocab_size, compute_dtype: of the run.
        rack: the Rack that the run starts from, where that was not made from ``config``; it is only looked at.
        device: ``cpu`` or another kind; default the one that ``config`` means.
    """

    def __init__(
        self,
        config: StackWiseConfig,
        vocab_size: int,
        compute_dtype: torch.dtype | None,
        rack: Rack | None = None,
        device: str | None = None,
    ) -> None:
        self.config, self.compute_dtype = config, compute_dtype
        self.device = device or resolve_device(config.training.device).type
        training = config.training
        self._micro = training.micro_batch_size or training.batch_size
        self._spec = rack_spec_from_config(config, (), vocab_size) if rack is None else rack.spec
        self._known: dict[Any, PhaseCost] = {}
        self._facts: dict[_Kind, _StackFacts] = {}
        self._steps: dict[Any, tuple[PhaseCost, list[int]]] = {}
        self._scored: dict[Any, tuple[float, int]] = {}
        self._head: tuple[float, int] | None = None
        self._mode = FakeTensorMode()

    def __call__(self, phase: Phase) -> PhaseCost:
        kinds, others = self._kinds(phase)
        key = (kinds, others, phase.cached, phase.enters, phase.noise, phase.objective)
        if key not in self._known:
            with stoppable(answer=None), self._mode, planned_for(self.device):
                self._known[key] = self._measure(kinds, others, phase)
                stop_if_asked()
        return self._with_cache(self._known[key], phase)

    def scoring(self, phase: Phase) -> tuple[float, int]:
        """Scoring a micro-batch by all Stacks of ``phase``: its FLOPs, and the bytes that it takes beside weights and
        optimizer.
        """
        kinds, _ = self._kinds(phase)
        key = (kinds, phase.stacks, phase.objective)
        if key not in self._scored:
            with stoppable(answer=None), self._mode, planned_for(self.device):
                self._scored[key] = self._score(kinds, phase)
                stop_if_asked()
        return self._scored[key]

    def _score(self, kinds: tuple[_Kind, ...], phase: Phase) -> tuple[float, int]:
        training = self.config.training
        objective = OBJECTIVES[phase.objective].load().planned(self.config, self._spec.vocab_size)
        if objective is None:
            facts = [self._stack_facts(kind) for kind in kinds]
            sizes = [found.own_bytes for found in facts]
            flops, held = self._head_scoring()
            flops += sum((found.flops.total for found in facts), self._embedding_flops().total)
            held = max(held, *(found.transient for found in facts))
        else:  # it runs the Stacks in its own way
            rack = Rack(replace(self._spec, stacks=(), stack_ids=()))
            rack.stacks.extend(self._stack(k, kind) for k, kind in zip(phase.stacks, kinds))
            sizes = [sum(bytes_of(t) for t in stack.own_tensors().values()) for stack in rack.stacks]
            tokens = torch.zeros(self._micro, training.seq_len, dtype=torch.int64)
            able = objective.of(rack)
            flops, held = self._ran(rack, (tokens,), lambda: able.terms(rack, able.typical(tokens)))
        # A second and a third offloaded Stack are on their way while one is in use.
        streamed = sum(sorted(n for n, kind in zip(sizes, kinds) if kind.offloaded)[-2:])
        hidden = self._micro * training.seq_len * self._spec.d_model * 4
        return flops, held + hidden + streamed + self._runtime

    def _head_scoring(self) -> tuple[float, int]:
        """FLOPs and bytes of the final norm and the head over one micro-batch, of whose chunks two are run."""
        if self._head is None:
            rows = self._micro * self.config.training.seq_len
            some = min(rows, 2 * chunk_rows(rows, self._spec.vocab_size))
            rack = Rack(replace(self._spec, stacks=(), stack_ids=()))
            x, targets = torch.zeros(1, some, rack.d_model), torch.zeros(1, some, dtype=torch.int64)
            flops, held = self._ran(
                rack, (x, targets), lambda: rack.cross_entropy_terms(rack(Reading(boundary=x)), targets)
            )
            self._head = flops * rows / some, held
        return self._head

    def _ran(self, rack: Rack, there: Sequence[Tensor], run: Callable[[], object]) -> tuple[float, int]:
        """FLOPs of ``run`` without gradients, and the most bytes that it holds beside ``rack`` and ``there``."""
        rack.requires_grad_(False).eval()
        ledger = Ledger()
        for tensor in (*rack.state_dict().values(), *there):
            ledger.ignore(tensor)
        with ledger, torch.no_grad(), autocast(torch.device("cpu"), self.compute_dtype):
            run()
        return ledger.flops.total, ledger.peak

    @property
    def _runtime(self) -> int:
        return RUNTIME_BYTES + COMPILER_BYTES * self.config.training.compile if self.device == "cpu" else 0

    def _with_cache(self, cost: PhaseCost, phase: Phase) -> PhaseCost:
        """``cost`` with the room that the activation cache of the phase's examples takes, on disk or in memory."""
        if not phase.cached or phase.examples is None:
            return cost
        training = self.config.training
        layout = BoundaryLayout(
            training.batch_size, training.seq_len, self._spec.d_model, *phase.examples, training.cache.dtype
        )
        if not training.cache.in_memory:
            return replace(cost, cache_bytes=layout.peak_bytes)
        if self.device == "cpu":
            return replace(cost, peak=cost.peak + layout.peak_bytes)
        return replace(cost, host=cost.host + layout.peak_bytes)

    def preparation(self, phases: Sequence[Phase]) -> float:
        """FLOPs of all ``phases`` before their first steps."""
        return sum(preparation_flops(phases, [self(phase) for phase in phases]))

    def _kinds(self, phase: Phase) -> tuple[tuple[_Kind, ...], tuple[str, ...]]:
        """The kinds of the Stacks, left to right, and the other parts that train; ids do not matter."""
        within: dict[str, list[str]] = {}
        for name in phase.trains:
            part, _, rest = name.partition("/")
            within.setdefault(part, []).append(rest)
        offloaded = self._offloaded(phase)
        kinds = tuple(
            _Kind(
                self._blocks(k, phase),
                phase.precision_of(k),
                tuple(sorted(within.pop(f"stack.{k}", ()))),
                tuple(replace(a, stack=0) for a in phase.adapters if a.stack == k),
                k in offloaded,
            )
            for k in phase.stacks
        )
        return kinds, tuple(sorted(within))

    def _blocks(self, stack: int, phase: Phase) -> tuple[BlockSpec, ...]:
        if stack in self._spec.stack_ids:
            blocks = self._spec.stacks[self._spec.stack_ids.index(stack)]
        else:
            blocks = stack_spec_from_config(stack, self.config)
        if phase.attention is None:
            return blocks
        return tuple(replace(b, attention=replace(b.attention, attention_mode=phase.attention)) for b in blocks)

    def _offloaded(self, phase: Phase) -> set[int]:
        offload = self.config.training.offload
        return set() if offload == "host" and self.device == "cpu" else phase.offloaded(offload)

    def _measure(self, kinds: tuple[_Kind, ...], others: tuple[str, ...], phase: Phase) -> PhaseCost:
        training = self.config.training
        loss_of = self._loss_of(phase)
        if loss_of is not None:
            return self._run_step(kinds, others, False, loss_of)[0]
        first = next((i for i, kind in enumerate(kinds) if kind.needs_gradients), len(kinds))
        if "embedding" in others:
            first = 0
        before = [self._stack_facts(kind) for kind in kinds[:first]]
        cost, _ = self._step_of(kinds[first:], others, first > 0)
        sizes = [self._stack_facts(kind).own_bytes for kind in kinds[first:] if kind.offloaded]
        rest_offloaded, largest_offloaded = sum(sizes), max(sizes, default=0)
        waiting = sum(facts.own_bytes for kind, facts in zip(kinds, before) if kind.offloaded)
        streamed = sorted(facts.own_bytes for kind, facts in zip(kinds, before) if kind.offloaded)
        elsewhere = self._embedding_bytes() if phase.cached and self.device != "cpu" else 0
        micro_batches = training.batch_size // self._micro
        resident = cost.weights + sum(facts.bytes for facts in before) - waiting - rest_offloaded - elsewhere
        peak = cost.peak - cost.weights + resident + largest_offloaded  # a second Stack is on its way
        batch = micro_batches * self._micro * training.seq_len * self._spec.d_model * 4
        cached = phase.cached
        below = [facts.flops * micro_batches for facts in before]
        rolls: tuple[float, ...] = ()
        if before:
            below[0] += self._embedding_flops() * micro_batches
        if phase.enters:
            encode, decode = self._coding_flops()
            rolls = tuple(
                flops.total + encode.total + decode.total * (k > 0) for k, flops in enumerate(below[: phase.enters])
            )
            below = [decode] if cached else [*below, (encode + decode) * phase.enters]
        if cached:
            peak += READ_AHEAD * batch * (self.device == "cpu")
            rolling = max(facts.bytes + facts.transient for facts in before)
            peak = max(peak, resident + cost.optimizer + rolling)
        elif before:
            # Where the Stacks before are in use, the rest holds nothing but its weights and moments.
            transient = max(facts.transient for facts in before) + sum(streamed[-2:])
            peak = max(peak, resident + cost.optimizer + cost.gradients * (micro_batches > 1) + transient)
            peak -= batch - batch // micro_batches  # one micro-batch at a time passes the Stacks before
        host = 0
        if self.device != "cpu":
            moving = max((largest_offloaded, *streamed))
            host = elsewhere + (waiting + rest_offloaded if training.offload == "host" else 2 * moving)
            host += READ_AHEAD * batch * cached
        return replace(
            cost,
            parameters=cost.parameters + sum(facts.parameters for facts in before),
            kinds=sum(below, cost.kinds),
            weights=resident,
            peak=peak,
            waiting=waiting + rest_offloaded + elsewhere,
            roll_flops=rolls if cached else (),
            host=host,
        )

    def _step_of(self, kinds: tuple[_Kind, ...], others: tuple[str, ...], entered: bool) -> tuple[PhaseCost, list[int]]:
        """A step of a Rack of these Stacks, as ``measure_segments`` gives it; of a row of equal ones, four are run."""
        key = (kinds, others, entered)
        if key not in self._steps:
            start, length = _longest_row(kinds)
            if length > 4 and self._row_can_grow:
                three, four = (
                    self._step_of(kinds[: start + n] + kinds[start + length :], others, entered) for n in (3, 4)
                )
                self._steps[key] = extended(three, four, start, length)
            else:
                self._steps[key] = self._run_step(kinds, others, entered)
        return self._steps[key]

    @property
    def _row_can_grow(self) -> bool:
        """Whether every Stack's output requires gradients, so that every segment is seen."""
        return not self._spec.freeze_embeddings

    def _loss_of(self, phase: Phase) -> Callable[[Rack, Tensor], Tensor] | None:
        """The loss of a micro-batch, where it is not that of all Stacks in a row over the tokens."""
        objective = OBJECTIVES[phase.objective].load().planned(self.config, self._spec.vocab_size)
        return None if objective is None else partial(_dry_loss, objective.during(phase.noise))

    def _run_step(
        self,
        kinds: tuple[_Kind, ...],
        others: tuple[str, ...],
        entered: bool,
        loss_of: Callable[[Rack, Tensor], Tensor] | None = None,
    ) -> tuple[PhaseCost, list[int]]:
        training = self.config.training
        rack = Rack(replace(self._spec, stacks=(), stack_ids=()))
        rack.stacks.extend(self._stack(i, kind) for i, kind in enumerate(kinds))
        rack.checkpoint_activations(training.activation_checkpointing)
        trains = [f"stack.{i}/{name}".rstrip("/") for i, kind in enumerate(kinds) for name in kind.trains]
        adapters = tuple(replace(a, stack=i) for i, kind in enumerate(kinds) for a in kind.adapters)
        set_trainable(rack, (*others, *trains), adapters)
        for stack, kind in zip(rack.stacks, kinds):
            if kind.offloaded:
                stack.fetch = partial(_copies, stack.own_tensors())
        return measure_segments(
            rack, training.batch_size // self._micro, self._micro, training.seq_len, self.compute_dtype,
            self._runtime, training.optimizer, entered, loss_of,
        )  # fmt: skip

    def _embedding_flops(self) -> Flops:
        """Of one micro-batch of tokens, without gradients."""
        rack = Rack(replace(self._spec, stacks=(), stack_ids=()))
        tokens = torch.zeros(self._micro, self.config.training.seq_len, dtype=torch.int64)
        with Ledger() as ledger, torch.no_grad(), autocast(torch.device("cpu"), self.compute_dtype):
            rack(Reading(tokens, stop=0, finished=False))
        return ledger.flops

    def _coding_flops(self) -> tuple[Flops, Flops]:
        """Of encoding a batch at a boundary, and of decoding it."""
        training = self.config.training
        form = boundary_format(training.cache.dtype)
        x = torch.zeros(training.batch_size, training.seq_len, self._spec.d_model)
        with Ledger("cache") as encoding:
            parts = form.encode(x)
        with Ledger("cache") as decoding:
            form.decode(parts)
        return encoding.flops, decoding.flops

    def _embedding_bytes(self) -> int:
        """Of a table that may wait elsewhere: 0 where the head needs it."""
        rack = Rack(replace(self._spec, stacks=(), stack_ids=()))
        return 0 if rack.tied else sum(bytes_of(t) for t in rack.embedding.state_dict().values())

    def _stack(self, stack_id: int, kind: _Kind) -> Stack:
        stack = Stack(stack_id, [Block(spec) for spec in kind.blocks])
        PrecisionManager().store(stack, kind.precision)
        for adapter in kind.adapters:
            for _, layer in linears(stack):
                layer.adapters[adapter.kind] = LowRank(
                    layer.in_features, layer.out_features, adapter.rank, adapter.alpha, adapter.dropout
                )
        return stack

    def _stack_facts(self, kind: _Kind) -> _StackFacts:
        key = replace(kind, trains=(), offloaded=False)
        if key not in self._facts:
            rack = Rack(replace(self._spec, stacks=(), stack_ids=()))
            stack = self._stack(0, kind)
            rack.stacks.append(stack)
            rack.requires_grad_(False).eval()
            x = torch.zeros(self._micro, self.config.training.seq_len, rack.d_model)
            ledger = Ledger()
            for tensor in (*stack.state_dict().values(), x):
                ledger.ignore(tensor)
            with ledger, autocast(torch.device("cpu"), self.compute_dtype):
                rack(Reading(boundary=x, stop=1, finished=False))
            stored = sum(bytes_of(t) for t in stack.state_dict().values())
            own = sum(bytes_of(t) for t in stack.own_tensors().values())
            self._facts[key] = _StackFacts(stored, own, parameters_of(stack), ledger.flops, ledger.peak + bytes_of(x))
        return self._facts[key]


def _dry_loss(objective: CrossEntropyObjective, rack: Rack, inputs: Tensor) -> Tensor:
    """The loss of an example of the right shapes: rows shared among the Stacks as a step shares them on average."""
    return objective.loss(rack, objective.typical(inputs), 1.0)


def _longest_row(kinds: Sequence[_Kind]) -> tuple[int, int]:
    """(start, length) of the longest row of equal Stacks, the leftmost of several; (0, 0) of none."""
    best, start = (0, 0), 0
    for i in range(1, len(kinds) + 1):
        if i == len(kinds) or kinds[i] != kinds[start]:
            if i - start > best[1]:
                best = start, i - start
            start = i
    return best


def preparation_flops(phases: Sequence[Phase], costs: Sequence[PhaseCost]) -> list[float]:
    """FLOPs that come before the steps of each phase: what fills its cache, from the boundary that is there."""
    flops, there = [], 0
    for phase, cost in zip(phases, costs):
        if not phase.cached:
            flops.append(0.0)
            there = 0
            continue
        assert phase.examples is not None
        start = there if there <= phase.enters else 0
        flops.append(sum(cost.roll_flops[start:]) * phase.examples[1])
        there = phase.enters
    return flops


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What fetching an offloaded Stack brings: tensors of their own."""
    return {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
