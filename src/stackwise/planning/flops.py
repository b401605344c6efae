"""FLOPs: what counts as one, and of what kind it is.

Counted are matrix products, convolutions and attention, two FLOPs a multiply-add: attention over all T² pairs, whether
a mask hides them or not. The multiplications that decode stored weights and write or read the activation cache count
one each. Other elementwise work is not counted: activations, norms, rotary positions, the softmax of the loss, and an
optimizer's elementwise update, moments that are kept in fewer bits included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


@dataclass(frozen=True)
class Flops:
    """FLOPs by kind.

    Attributes:
        forward: of the Blocks and the embedding, adapters included.
        head: forward and backward products of the head, BERT's transformation before it included.
        backward: of the Blocks and the embedding, to what enters and to the weights.
        recomputation: of forward passes that run again in the backward pass.
        dequantisation: of decoding weights that are stored as codes and scales.
        cache: of filling the activation cache, and of encoding and decoding what enters a phase.
        optimizer: matrix products of an update (Muon's Newton-Schulz iterations).
    """

    forward: float = 0.0
    head: float = 0.0
    backward: float = 0.0
    recomputation: float = 0.0
    dequantisation: float = 0.0
    cache: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.to_dict().values())

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def __add__(self, other: Flops) -> Flops:
        return Flops(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __mul__(self, times: float) -> Flops:
        return Flops(**{name: value * times for name, value in self.to_dict().items()})


def flops_of(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Of one call of a dispatched operation; see ``formula_of``."""
    formula = formula_of(operation._overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


def formula_of(packet: Any) -> Callable[..., int] | None:
    """What gives the FLOPs of an operation from its arguments and its result; ``None``: it multiplies no matrices.

    Raises:
        NotImplementedError: its name says that it multiplies matrices, and no formula is known.
    """
    formula = _MORE.get(packet) or flop_registry.get(packet)
    if formula is None and not _PRODUCTS.isdisjoint(packet.__name__.strip("_").split("_")):
        raise NotImplementedError(f"{packet} multiplies matrices, and how many FLOPs that takes is not known")
    return formula


def multiplications_of(operation: Any, out: Any) -> int:
    """Elementwise multiplications and divisions of one call."""
    return out.numel() if operation._overloadpacket in _ELEMENTWISE else 0


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> int:
    return sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)


def _rows_times_matrix(x: Tensor, matrix: Tensor, *rest: Any, out_val: Tensor, **options: Any) -> int:
    return 2 * out_val.numel() * x.shape[-1]


def _matrix_times_vector(matrix: Tensor, vector: Tensor, **options: Any) -> int:
    return 2 * matrix.numel()


def _added(product: Callable[..., int]) -> Callable[..., int]:
    """Of self + product, whose own arguments come after self."""
    return lambda base, *args, **options: product(*args, **options)


def _summed_products(first: Tensor, second: Tensor, **options: Any) -> int:
    return 2 * first.numel() * second.shape[-1]


def _outer(a: Tensor, b: Tensor, **options: Any) -> int:
    return 2 * a.numel() * b.numel()


_aten = torch.ops.aten
# What torch's registry lacks: the attention kernels of CPUs, products with vectors, and products that end in sums.
_MORE: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._scaled_dot_product_fused_attention_overrideable: _attention,
    _aten._scaled_dot_product_fused_attention_overrideable_backward: _attention_backward,
    _aten._int_mm: _summed_products,
    _aten._addmm_activation: _added(_summed_products),
    _aten.linear: _rows_times_matrix,
    _aten.mv: _matrix_times_vector,
    _aten.addmv: _added(_matrix_times_vector),
    _aten.dot: _matrix_times_vector,
    _aten.vdot: _matrix_times_vector,
    _aten.addr: _added(_outer),
    _aten.addbmm: _added(_summed_products),
}


# ``addmm_`` multiplies as ``addmm`` does, and so on; variants with ``out=`` are overloads of the same packet.
_MORE |= {
    getattr(_aten, f"{packet.__name__}_"): formula
    for packet, formula in (flop_registry | _MORE).items()
    if hasattr(_aten, f"{packet.__name__}_")
}

_PRODUCTS = frozenset(
    (
        "mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "addmv", "dot", "vdot", "addr", "matmul", "einsum",
        "tensordot", "linear", "bilinear", "trilinear", "convolution", "attention", "rnn", "lstm", "gru",
    )
)  # fmt: skip
"""Words in the names of operations that multiply matrices."""

_ELEMENTWISE = frozenset({_aten.mul, _aten.mul_, _aten.div, _aten.div_})
