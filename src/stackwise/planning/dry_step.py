"""A training step on fake tensors, which have shapes and no data: its FLOPs and the bytes that live while it runs.

A counter adds up the FLOPs of the matrix products and attentions, and a ledger follows every storage from its
allocation to its release. ``planning.flops`` says what counts as a FLOP.
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
from torch.utils._pytree import tree_iter

from stackwise.config.optimization import OptimizerConfig
from stackwise.growth.precision import parameters_of
from stackwise.model.architecture import Rack
from stackwise.model.reading import Reading
from stackwise.ops.coding import CODING
from stackwise.ops.precision import autocast
from stackwise.ops.repeats import Counting
from stackwise.optim.kinds import Optimizer, optimizer_of
from stackwise.planning.flops import Flops, flops_of, multiplications_of


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
    trained = {f"{part}/{name}": p for part, name, p in rack.part_parameters() if p.requires_grad}
    kind = optimizer_of(optimizer or OptimizerConfig())
    state = sum(kind.state_bytes(name, p) for name, p in trained.items())
    updates = {name: kind.step_bytes(name, p) for name, p in trained.items()}
    gradients = sum(bytes_of(p) for p in trained.values())
    inputs = torch.zeros(batch_size, seq_len, dtype=torch.int64)
    boundary = torch.zeros(batch_size, seq_len, rack.d_model) if entered else None
    stored = [t for _, _, t in rack.part_tensors()]
    ledger = Ledger()
    for tensor in (*stored, inputs, *(() if boundary is None else (boundary,))):
        ledger.ignore(tensor)
    if kind.settings.in_backward:
        for name, parameter in trained.items():
            parameter.register_post_accumulate_grad_hook(partial(_update, updates[name], micro_batches == 1))
    largest = 0 if kind.settings.in_backward else max(updates.values(), default=0)
    with ledger:
        activations, logits = _run(rack, ledger, inputs, boundary, compute_dtype, loss_of, largest)
    update = _update_flops(trained, kind)
    held = gradients if micro_batches > 1 else 0  # earlier micro-batches' gradients wait while the next one runs
    entering = 0 if boundary is None else micro_batches * bytes_of(boundary)
    weights = sum(bytes_of(t) for t in stored)
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


def _run(
    rack: Rack,
    ledger: Ledger,
    inputs: Tensor,
    boundary: Tensor | None,
    compute_dtype: torch.dtype | None,
    loss_of: Callable[[Rack, Tensor], Tensor] | None,
    update_bytes: int,
) -> tuple[int, int]:
    """One micro-batch forward and backward, then what the largest update takes; bytes of activations, and of logits."""
    hooks = [stack.register_forward_hook(partial(_marking, ledger)) for stack in rack.stacks]
    below = [module for module in (rack.embedding, rack.embedding.time, *rack.stacks) if module is not None]
    hooks += [module.register_forward_pre_hook(partial(_entering, ledger)) for module in below]
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
    torch.empty(update_bytes, dtype=torch.uint8)  # counted, and gone
    ledger.mark()
    for hook in hooks:
        hook.remove()
    return activations, logits


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
    """Of one update, run on these fake tensors, whose gradients are then gone; elementwise products do not count."""
    for parameter in trained.values():
        parameter.grad = None
    multiplied = {name: p for name, p in trained.items() if kind.multiplies(name, p)}
    if not multiplied:
        return Flops()
    for parameter in multiplied.values():
        parameter.grad = torch.empty_like(parameter)  # an update in the backward pass has dropped it
    optimizers = kind.make(multiplied, seed=0)
    with Ledger("optimizer") as ledger:
        for optimizer in optimizers:
            optimizer.step()
    for parameter in multiplied.values():
        parameter.grad = None
    return ledger.flops


def extended(
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


def _update(takes: int, drops: bool, parameter: Tensor) -> None:
    """An update inside the backward pass: what it takes is counted, and the gradient dropped."""
    torch.empty(takes, dtype=torch.uint8)
    if drops:
        parameter.grad = None


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
