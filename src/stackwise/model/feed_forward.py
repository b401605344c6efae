"""The feed-forward of a Block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stackwise.model.linear import Linear
from stackwise.model.spec import FeedForwardKind


def gelu_tanh(x: Tensor) -> Tensor:
    """GPT-2's approximation of GELU (1606.08415 §2)."""
    return F.gelu(x, approximate="tanh")


class _Gated(torch.autograd.Function):
    """activation(gate) · up, keeping its two arguments and not the activated gate."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _activated(gate, activation).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gate, up = ctx.saved_tensors
        backward = torch.ops.aten.silu_backward if ctx.activation == "silu" else torch.ops.aten.gelu_backward
        grad_gate = backward(grad * up, gate) if ctx.needs_input_grad[0] else None
        grad_up = _activated(gate, ctx.activation).mul_(grad) if ctx.needs_input_grad[1] else None
        return grad_gate, grad_up, None


def _activated(x: Tensor, activation: str) -> Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x)


class GatedFFN(nn.Module):
    """down(activation(gate(x)) · up(x)) (GLU variants, 2002.05202 §2).

    Args:
        d_model: width of input and output.
        d_ff: width between.
        freeze_up_proj: the up-projection has no gradients and keeps its initial values; ``gate`` and ``down`` train.
        bias: of all three projections.
        activation: of the gate, ``silu`` or ``gelu``.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        freeze_up_proj: bool = False,
        bias: bool = False,
        activation: Literal["silu", "gelu"] = "silu",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = Linear(d_model, d_ff, bias=bias)
        self.up_proj = Linear(d_model, d_ff, bias=bias)
        self.down_proj = Linear(d_ff, d_model, bias=bias)
        self.never_trained = _frozen(self.up_proj) if freeze_up_proj else ()

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_model) → (…, d_model)."""
        hidden: Tensor = _Gated.apply(self.gate_proj(x), self.up_proj(x), self.activation)
        return self.down_proj(hidden)


class SwiGLUFFN(GatedFFN):
    """down(silu(gate(x)) · up(x)); see ``GatedFFN``."""

    def __init__(self, d_model: int, d_ff: int, freeze_up_proj: bool = False, bias: bool = False) -> None:
        super().__init__(d_model, d_ff, freeze_up_proj, bias, "silu")


class GeGLUFFN(GatedFFN):
    """down(gelu(gate(x)) · up(x)); see ``GatedFFN``."""

    def __init__(self, d_model: int, d_ff: int, freeze_up_proj: bool = False, bias: bool = False) -> None:
        super().__init__(d_model, d_ff, freeze_up_proj, bias, "gelu")


class PlainFFN(nn.Module):
    """down(activation(up(x))) (1706.03762 §3.3); arguments as ``GatedFFN``."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        freeze_up_proj: bool = False,
        bias: bool = False,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.up_proj = Linear(d_model, d_ff, bias=bias)
        self.down_proj = Linear(d_ff, d_model, bias=bias)
        self.never_trained = _frozen(self.up_proj) if freeze_up_proj else ()

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_model) → (…, d_model)."""
        return self.down_proj(self.activation(self.up_proj(x)))


def _frozen(up_proj: nn.Module) -> tuple[str, ...]:
    """Takes the gradients from ``up_proj``; the names of its parameters, which no phase may give them back."""
    up_proj.requires_grad_(False)
    return tuple(f"up_proj.{name}" for name, _ in up_proj.named_parameters())


def create_feed_forward(
    kind: FeedForwardKind, d_model: int, d_ff: int, freeze_up_proj: bool = False, bias: bool = False
) -> nn.Module:
    """The feed-forward called ``kind``: swiglu, geglu, gelu or gelu_tanh."""
    match kind:
        case "swiglu":
            return SwiGLUFFN(d_model, d_ff, freeze_up_proj, bias)
        case "geglu":
            return GeGLUFFN(d_model, d_ff, freeze_up_proj, bias)
        case "gelu":
            return PlainFFN(d_model, d_ff, freeze_up_proj, bias, F.gelu)
        case "gelu_tanh":
            return PlainFFN(d_model, d_ff, freeze_up_proj, bias, gelu_tanh)
    raise ValueError(f"ffn is {kind!r}; allowed: swiglu, geglu, gelu, gelu_tanh")
