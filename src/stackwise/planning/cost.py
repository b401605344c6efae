"""What a phase costs, found by dry-running its training step.

The real model, loss and backward pass run on fake tensors, which have shapes and no data: a counter adds up the FLOPs
of the matrix products and attentions, and a ledger follows every storage from its allocation to its release. What is
planned is therefore what runs, for every model that runs. ``planning.flops`` says what counts as a FLOP.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from stackwise.config.base import StackWiseConfig
from stackwise.config.growth import PrecisionName
from stackwise.config.optimization import OptimizerConfig
from stackwise.growth.phases import Adapter, Phase
from stackwise.growth.precision import PrecisionManager, parameters_of
from stackwise.growth.rack_builder import set_trainable
from stackwise.model.architecture import Rack, Stack, rack_spec_from_config, stack_spec_from_config
from stackwise.model.block import Block
from stackwise.model.linear import LowRank, linears
from stackwise.model.reading import Reading
from stackwise.model.spec import BlockSpec
from stackwise.objectives.classification import ClassificationObjective
from stackwise.objectives.depth import levels_of
from stackwise.objectives.diffusion import DiffusionObjective
from stackwise.ops.attention import planned_for
from stackwise.ops.boundary import BoundaryLayout, boundary_format
from stackwise.ops.coding import CODING
from stackwise.ops.precision import autocast, resolve_device
from stackwise.ops.repeats import Counting
from stackwise.optim.kinds import Optimizer, optimizer_of
from stackwise.planning.flops import Flops, flops_of, multiplications_of
from stackwise.signals import stop_if_asked, stoppable

READ_AHEAD = 3
"""Batches of a cached boundary that are in memory on a CPU beside the one in use: two read ahead and one on its way."""


class Ledger(Counting):
    """FLOPs of the operations that run, and bytes of the tensor storages that they made and that still live.

    ``FlopCounterMode`` itself keeps checkpointed activations alive through its module hooks, so its formulas are used
    without it.

    Attributes:
        kind: of the products that run, as far as the caller knows it: a field of ``Flops``.
    """

    def __init__(self, kind: str = "forward") -> None:
        super().__init__()
        self.kind = kind
        self._flops: Counter[str] = Counter()
        self._regions: list[str] = []
        self.live = 0
        self.peak = 0
        self.segments: list[int] = []
        self._known: dict[int, Any] = {}

    @property
    def flops(self) -> Flops:
        return Flops(**{kind: float(count) for kind, count in self._flops.items()})

    def mark(self) -> int:
        """Ends a segment, and begins the next one: the peak of the ended one."""
        self.segments.append(self.peak)
        self.peak = self.live
        return self.segments[-1]

    def ignore(self, tensor: Tensor) -> None:
        """Leaves a storage that existed before out of the account."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = storage

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        for tensor in tree_iter(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                self._known[key] = None
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._release, key, storage.nbytes()).atexit = False
        return out

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if func is torch.ops.profiler._record_function_enter_new.default:
            self._regions.append(args[0])
        elif func is torch.ops.profiler._record_function_exit._RecordFunction:
            self._regions.pop()
        elif self._regions and self._regions[-1] == CODING:
            self._flops["cache" if self.kind == "cache" else "dequantisation"] += self.times * multiplications_of(
                func, out
            )
        else:
            # Autograd's own products run without gradients; a recomputed forward pass wants them.
            again = self.kind == "backward" and torch.is_grad_enabled()
            self._flops["recomputation" if again else self.kind] += self.times * flops_of(func, args, kwargs, out)

    def _release(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


RUNTIME_BYTES = 12 * 2**20
"""Resident memory that training on a CPU takes beside tensors: thread buffers of the matrix library and pages of code
that is first used then. Measured at 7 to 12 MiB, 22 with a vocabulary of 32,000 (docs/log.md)."""

COMPILER_BYTES = 75 * 2**20
"""Resident memory that ``training.compile`` takes on a CPU beside tensors: the compiler's modules and its graphs.
Measured at 69 to 100 MiB (docs/log.md)."""


@dataclass(frozen=True)
class PhaseCost:
    """Cost of one optimizer step of a phase; memory in bytes, peak included.

    Attributes:
        trainable_parameters, parameters: how many; a 4-bit code counts as one.
        kinds: FLOPs of one step by kind; ``flops`` is their sum.
        weights: on the device, adapters and scales included.
        gradients, optimizer: of what trains.
        activations: what the forward pass keeps for the backward pass of one micro-batch.
        logits: what the loss adds on top while it runs. The parts need not peak together, so ``peak`` is at most their
            sum.
        peak: of the device's memory while steps run.
        waiting: bytes of the Stacks that are not on the device.
        roll_flops: of one batch through each Stack before the boundary where a cached phase enters, what lies between
            the cache's boundaries included: the embedding, reading and writing.
        cache_bytes: of the activation cache on disk, while it rolls.
        host: bytes in the memory of an accelerator's host: what waits there, and batches on their way.
    """

    trainable_parameters: int
    parameters: int
    kinds: Flops
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    peak: int
    waiting: int = 0
    roll_flops: tuple[float, ...] = ()
    cache_bytes: int = 0
    host: int = 0

    @property
    def flops(self) -> float:
        return self.kinds.total

    def memory(self) -> dict[str, int]:
        names = ("weights", "gradients", "optimizer", "activations", "logits", "peak", "waiting")
        return {name: getattr(self, name) for name in names}


def measure_segments(
    rack: Rack,
    micro_batches: int,
    batch_size: int,
    seq_len: int,
    compute_dtype: torch.dtype | None,
    runtime: int,
    optimizer: OptimizerConfig | None,
    entered: bool,
    loss_of: Callable[[Rack, Tensor], Tensor] | None = None,
) -> tuple[PhaseCost, list[int]]:
    """Costs a step of ``rack``, whose tensors are fake and whose trainable parameters require gradients.

    Args:
        micro_batches: forward and backward passes in a step.
        batch_size: sequences in one of them; ``seq_len`` tokens each.
        compute_dtype: of autocast, or ``None``.
        runtime: bytes beside tensors, added to the peak.
        optimizer: whose state is counted; default AdamW.
        entered: a hidden state of the whole batch enters before the first Stack, in place of the tokens.
        loss_of: gives the loss of the Rack and one micro-batch of tokens, where it is not that of all Stacks in a row;
            its activations are then all that it leaves, and there is one segment for it.

    Returns:
        The cost, and the peak of each segment: up to the end of the forward pass of each Stack, first to last, the
        final norm, the loss, the way back to the last Stack, and the backward pass of each Stack, last to first.
    """
    parameters = {f"{part}/{name}": p for part, name, p in rack.part_parameters()}
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    settings = optimizer or OptimizerConfig()
    kind = optimizer_of(settings)
    state = sum(kind.state_bytes(name, p) for name, p in trained.items())
    updates = {name: kind.step_bytes(name, p) for name, p in trained.items()}
    gradients = sum(_bytes(p) for p in trained.values())
    inputs = torch.zeros(batch_size, seq_len, dtype=torch.int64)
    boundary = torch.zeros(batch_size, seq_len, rack.d_model) if entered else None
    stored = [t for _, _, t in rack.part_tensors()]
    ledger = Ledger()
    for tensor in (*stored, inputs, *(() if boundary is None else (boundary,))):
        ledger.ignore(tensor)
    hooks = [stack.register_forward_hook(partial(_marking, ledger)) for stack in rack.stacks]
    below = [module for module in (rack.embedding, rack.embedding.time, *rack.stacks) if module is not None]
    hooks += [module.register_forward_pre_hook(partial(_entering, ledger)) for module in below]
    inside = settings.in_backward
    if inside:
        for name, parameter in trained.items():
            parameter.register_post_accumulate_grad_hook(partial(_update, updates[name], micro_batches == 1))
    with ledger:
        with autocast(torch.device("cpu"), compute_dtype):
            if loss_of is None:
                hidden = rack(Reading(inputs) if boundary is None else Reading(boundary=boundary))
                activations = ledger.live
                ledger.mark()
                loss = rack.cross_entropy(hidden, inputs)
                logits = ledger.mark() - activations
                del hidden
            else:
                loss = loss_of(rack, inputs)
                activations = ledger.live
                logits = max(0, ledger.mark() - activations)
        ledger.kind = "head"
        loss.backward()
        del loss
        if not inside:
            torch.empty(max(updates.values(), default=0), dtype=torch.uint8)  # counted, and gone
        ledger.mark()
    for hook in hooks:
        hook.remove()
    update = _update_flops(trained, kind)
    for parameter in trained.values():
        parameter.grad = None
    held = gradients if micro_batches > 1 else 0  # earlier micro-batches' gradients wait while the next one runs
    entering = 0 if boundary is None else micro_batches * _bytes(boundary)
    weights = sum(_bytes(t) for t in stored)
    cost = PhaseCost(
        trainable_parameters=sum(p.numel() for p in trained.values()),
        parameters=sum(parameters_of(module) for module in rack.parts().values()),
        kinds=ledger.flops * micro_batches + update,
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=activations,
        logits=logits,
        peak=weights + state + max(ledger.segments) + held + entering + runtime,
    )
    return cost, ledger.segments


def _marking(ledger: Ledger, stack: torch.nn.Module, inputs: Any, output: Tensor) -> None:
    """Ends a segment after a Stack's forward pass, and another one before its backward pass."""
    ledger.mark()
    ledger.kind = "head"  # unless another Stack follows
    if output.requires_grad:
        output.register_hook(partial(_mark_backward, ledger))


def _entering(ledger: Ledger, module: torch.nn.Module, inputs: Any) -> None:
    if ledger.kind == "head":
        ledger.kind = "forward"


def _mark_backward(ledger: Ledger, gradient: Tensor) -> None:
    ledger.mark()
    ledger.kind = "backward"


def _update_flops(trained: Mapping[str, torch.nn.Parameter], kind: Optimizer) -> Flops:
    """Of one update of what has a gradient, run on these fake tensors; elementwise products do not count."""
    multiplied = {name: p for name, p in trained.items() if kind.multiplies(name, p)}
    if not multiplied:
        return Flops()
    for parameter in multiplied.values():
        parameter.grad = torch.empty_like(parameter)  # an update in the backward pass has dropped it
    optimizers = kind.make(multiplied, seed=0)
    with Ledger("optimizer") as ledger:
        for optimizer in optimizers:
            optimizer.step()
    return ledger.flops


def _extended(
    three: tuple[PhaseCost, list[int]], four: tuple[PhaseCost, list[int]], start: int, length: int
) -> tuple[PhaseCost, list[int]]:
    """The cost of a Rack that has ``length`` equal Stacks in a row where ``three`` and ``four`` have that many.

    Every figure grows by the same with each of them: bytes and FLOPs add up, and so does what lives while a certain
    Stack runs. Only their maximum, the peak, does not: it is taken over all segments anew.

    Args:
        start: of Stacks before the row.
    """
    more = length - 3

    def grown(a: int, b: int) -> int:
        return a + (b - a) * more

    def run(a: list[int], b: list[int]) -> list[int]:
        """The segments of the row: the first, the second, … and the last."""
        second, last = grown(a[1], b[1]), grown(a[2], b[3])
        between = [second + (last - second) * i // (length - 2) for i in range(1, length - 2)]
        return [grown(a[0], b[0]), second, *between, last]

    (small, few), (large, many) = three, four
    stacks = (len(few) - 3) // 2
    back = 2 * stacks - start  # where the row's backward segments begin, in `few`
    segments = [
        *(grown(a, b) for a, b in zip(few[:start], many[:start])),
        *run(few[start : start + 3], many[start : start + 4]),
        *(grown(a, b) for a, b in zip(few[start + 3 : back], many[start + 4 : back + 1])),
        *run(few[back : back + 3], many[back + 1 : back + 5]),
        *(grown(a, b) for a, b in zip(few[back + 3 :], many[back + 5 :])),
    ]
    names = (
        "trainable_parameters",
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "logits",
    )
    fields: dict[str, Any] = {name: grown(getattr(small, name), getattr(large, name)) for name in names}
    held = [cost.peak - max(found) for cost, found in (three, four)]  # beside what the segments hold
    kinds = small.kinds * (1 - more) + large.kinds * more
    return replace(large, **fields, kinds=kinds, peak=max(segments) + grown(*held)), segments


@dataclass(frozen=True)
class _Kind:
    """A Stack as far as its cost goes. ``trains``: the names within the Stack, an empty one for all of it."""

    blocks: tuple[BlockSpec, ...]
    precision: PrecisionName
    trains: tuple[str, ...]
    adapters: tuple[Adapter, ...]
    away: bool

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
        self._mode = FakeTensorMode()

    def __call__(self, phase: Phase) -> PhaseCost:
        kinds, others = self._kinds(phase)
        key = (kinds, others, phase.cached, phase.enters, phase.noise, phase.objective)
        if key not in self._known:
            with stoppable(), self._mode, planned_for(self.device):
                self._known[key] = self._measure(kinds, others, phase)
                stop_if_asked()
        return self._with_cache(self._known[key], phase)

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
        away = self._away(phase)
        kinds = tuple(
            _Kind(
                self._blocks(k, phase),
                phase.precision_of(k),
                tuple(sorted(within.pop(f"stack.{k}", ()))),
                tuple(replace(a, stack=0) for a in phase.adapters if a.stack == k),
                k in away,
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
        return tuple(replace(block, attention_mode=phase.attention) for block in blocks)

    def _away(self, phase: Phase) -> set[int]:
        offload = self.config.training.offload
        return set() if offload == "host" and self.device == "cpu" else phase.away(offload)

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
        sizes = [self._stack_facts(kind).own_bytes for kind in kinds[first:] if kind.away]
        rest_away, largest_away = sum(sizes), max(sizes, default=0)
        waiting = sum(facts.own_bytes for kind, facts in zip(kinds, before) if kind.away)
        streamed = sorted(facts.own_bytes for kind, facts in zip(kinds, before) if kind.away)
        elsewhere = self._embedding_bytes() if phase.cached and self.device != "cpu" else 0
        micro_batches = training.batch_size // self._micro
        resident = cost.weights + sum(facts.bytes for facts in before) - waiting - rest_away - elsewhere
        peak = cost.peak - cost.weights + resident + largest_away  # a second Stack is on its way
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
            moving = max((largest_away, *streamed))
            host = elsewhere + (waiting + rest_away if training.offload == "host" else 2 * moving)
            host += READ_AHEAD * batch * cached
        return replace(
            cost,
            parameters=cost.parameters + sum(facts.parameters for facts in before),
            kinds=sum(below, cost.kinds),
            weights=resident,
            peak=peak,
            waiting=waiting + rest_away + elsewhere,
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
                self._steps[key] = _extended(three, four, start, length)
            else:
                self._steps[key] = self._run_step(kinds, others, entered)
        return self._steps[key]

    @property
    def _row_can_grow(self) -> bool:
        """Whether every Stack's output requires gradients, so that every segment is seen."""
        return not self._spec.freeze_embeddings

    def _loss_of(self, phase: Phase) -> Callable[[Rack, Tensor], Tensor] | None:
        """The loss of a micro-batch, where it is not that of all Stacks in a row over the tokens."""
        training = self.config.training
        variant, block = training.depth_variant, training.diffusion.block_length
        told = training.progressive.time_interpretation == "input"
        if phase.objective == "classification":
            return partial(_dry_loss, ClassificationObjective(training.classification, "mean"))
        if phase.objective != "diffusion" or (variant is None and block is None and not told):
            return None
        levels = (1.0, 0.0) if variant is None else levels_of(self.config)
        objective = DiffusionObjective(
            training.diffusion, seed=0, mask_id=0, special_ids=frozenset(), vocab_size=self._spec.vocab_size,
            variant=variant, levels=levels, conditioned=training.diffusion.condition if told else None,
        ).during(phase.noise)  # fmt: skip
        return partial(_dry_loss, objective)

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
            if kind.away:
                stack.fetch = partial(_copies, stack.own_tensors())
        runtime = RUNTIME_BYTES + COMPILER_BYTES * training.compile if self.device == "cpu" else 0
        return measure_segments(
            rack, training.batch_size // self._micro, self._micro, training.seq_len, self.compute_dtype,
            runtime, training.optimizer, entered, loss_of,
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
        return 0 if rack.tied else sum(_bytes(t) for t in rack.embedding.state_dict().values())

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
        key = replace(kind, trains=(), away=False)
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
            stored = sum(_bytes(t) for t in stack.state_dict().values())
            own = sum(_bytes(t) for t in stack.own_tensors().values())
            self._facts[key] = _StackFacts(stored, own, parameters_of(stack), ledger.flops, ledger.peak + _bytes(x))
        return self._facts[key]


def _dry_loss(objective: DiffusionObjective | ClassificationObjective, rack: Rack, inputs: Tensor) -> Tensor:
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


def _update(takes: int, drops: bool, parameter: Tensor) -> None:
    """An update inside the backward pass: what it takes is counted, and the gradient dropped."""
    torch.empty(takes, dtype=torch.uint8)
    if drops:
        parameter.grad = None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a fetch of a Stack that is away brings: tensors of their own."""
    return {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
