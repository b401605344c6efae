"""What a phase costs, found by dry-running its training step.

The real model, loss and backward pass run on fake tensors, which have shapes and no data: a counter adds up the FLOPs
of the matrix products and attentions, and a ledger follows every storage from its allocation to its release. What is
planned is therefore what runs, for every model that runs. The FLOPs are those that ``torch``'s counter counts: two a
multiply-add, attention over all T² pairs.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from stackwise.config.base import StackWiseConfig
from stackwise.growth.phases import Phase
from stackwise.growth.rack_builder import set_trainable
from stackwise.model.architecture import Rack, Stacks, create_rack_from_config, create_stack_from_config
from stackwise.ops.losses import linear_cross_entropy
from stackwise.ops.precision import autocast, resolve_device

ADAM_BYTES = 8
"""Two fp32 moments a trained parameter."""


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
) -> int:
    return sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)


# torch's registry has the attention kernels of accelerators only; the dry run takes the CPU's.
_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class Ledger(TorchDispatchMode):
    """FLOPs of the operations that run, and bytes of the tensor storages that they made and that still live.

    ``FlopCounterMode`` itself keeps checkpointed activations alive through its module hooks, so its formulas are used
    without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.live = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def ignore(self, tensor: Tensor) -> None:
        """Leaves a storage that existed before out of the account."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = storage

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        formula = _CPU_ATTENTION.get(packet) or flop_registry.get(packet)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
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

    def _release(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


RUNTIME_BYTES = 16 * 2**20
"""Resident memory that training on a CPU takes beside tensors: thread buffers of the matrix library and pages of code
that is first used then. Measured at 13 to 17 MiB (docs/log.md)."""


@dataclass(frozen=True)
class PhaseCost:
    """Cost of one optimizer step of a phase; memory in bytes, peak included.

    ``activations`` is what the forward pass keeps for the backward pass of one micro-batch; ``logits`` what the loss
    adds on top while it runs. The parts need not peak together, so ``peak`` is at most their sum.
    """

    trainable_parameters: int
    parameters: int
    flops: float
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    peak: int

    def memory(self) -> dict[str, int]:
        return {k: getattr(self, k) for k in ("weights", "gradients", "optimizer", "activations", "logits", "peak")}


def measure_step(
    rack: Rack,
    micro_batches: int,
    batch_size: int,
    seq_len: int,
    compute_dtype: torch.dtype | None = None,
    runtime: int = 0,
) -> PhaseCost:
    """Costs a step of ``rack``, whose tensors are fake and whose trainable parameters require gradients.

    Args:
        micro_batches: forward and backward passes in a step.
        batch_size: sequences in one of them; ``seq_len`` tokens each.
        compute_dtype: of autocast, or ``None``.
        runtime: bytes beside tensors, added to the peak.
    """
    parameters = [p for _, _, p in rack.part_parameters()]
    trained = [p for p in parameters if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in parameters)
    gradients = sum(p.numel() * p.element_size() for p in trained)
    optimizer = ADAM_BYTES * sum(p.numel() for p in trained)
    inputs = torch.zeros(batch_size, seq_len, dtype=torch.int64)
    constants = [t for _, _, t in rack.part_tensors() if not isinstance(t, nn.Parameter)]
    weights += sum(t.numel() * t.element_size() for t in constants)
    ledger = Ledger()
    for tensor in (*parameters, *constants, inputs):
        ledger.ignore(tensor)
    with ledger:
        with autocast(torch.device("cpu"), compute_dtype):
            hidden = rack.hidden(inputs)
            activations = ledger.live
            forward_peak, ledger.peak = ledger.peak, ledger.live
            loss = linear_cross_entropy(hidden.flatten(0, 1), rack.head_weight, inputs.flatten(), bias=rack.head_bias)
            logits = ledger.peak - activations
            del hidden
        loss.backward()
        del loss
    for parameter in parameters:
        parameter.grad = None
    held = gradients if micro_batches > 1 else 0  # earlier micro-batches' gradients wait while the next one runs
    moving = max(forward_peak, ledger.peak)
    return PhaseCost(
        trainable_parameters=sum(p.numel() for p in trained),
        parameters=sum(p.numel() for p in parameters),
        flops=float(ledger.flops * micro_batches),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        peak=weights + optimizer + moving + held + runtime,
    )


def phase_coster(
    config: StackWiseConfig,
    vocab_size: int,
    compute_dtype: torch.dtype | None,
    rack: Rack | None = None,
) -> Callable[[Phase], PhaseCost]:
    """A function that costs one step of a phase of the run that ``config`` describes; equal phases are costed once.

    Args:
        rack: its parts stand for those of the same name, where given (a Rack that was not made from ``config``); it is
            only looked at. Stacks that it lacks are those of ``config``.
    """
    training = config.training
    micro = training.micro_batch_size or training.batch_size
    runtime = RUNTIME_BYTES if resolve_device(training.device).type == "cpu" else 0
    known: dict[tuple[tuple[int, ...], tuple[str, ...]], PhaseCost] = {}

    def cost(phase: Phase) -> PhaseCost:
        key = (phase.stacks, phase.trains)
        if key not in known:
            with FakeTensorMode():
                model = (
                    create_rack_from_config(config, 0, vocab_size, load_family=False)
                    if rack is None
                    else _fake_copy(rack)
                )
                there = {stack.stack_id: stack for stack in model.stacks}
                model.stacks = Stacks(
                    there[k] if k in there else create_stack_from_config(k, config) for k in phase.stacks
                )
                model.checkpoint_activations(training.activation_checkpointing)
                set_trainable(model, phase.trains)
                known[key] = measure_step(
                    model, training.batch_size // micro, micro, training.seq_len, compute_dtype, runtime
                )
        return known[key]

    return cost


def _fake_copy(rack: Rack) -> Rack:
    """Within a fake mode, a copy with fake parameters; the real ones are not copied."""
    fakes: dict[int, Tensor] = {id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in rack.parameters()}
    fakes |= {id(b): torch.empty(b.shape, dtype=b.dtype) for b in rack.buffers()}
    return copy.deepcopy(rack, fakes)
