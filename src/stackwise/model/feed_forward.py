"""The feed-forward of a Block."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.model.linear import Linear
from stackwise.model.spec import FeedForwardKind


def gelu_tanh(x: Tensor) -> Tensor:
    """GPT-2's approximation of GELU (1606.08415 §2)."""
    return F.gelu(x, approximate="tanh")


class GatedFFN(nn.Module):
    """down(activation(gate(x)) · up(x)) (GLU variants, 2002.05202 §2).

    Args:
        d_model: width of input and output.
        d_ff: width between.
        freeze_up_proj: the up-projection keeps its initial values; ``gate`` and ``down`` train.
        bias: of all three projections.
        activation: of the gate.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        freeze_up_proj: bool = False,
        bias: bool = False,
        activation: Callable[[Tensor], Tensor] = F.silu,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = Linear(d_model, d_ff, bias=bias)
        self.up_proj = Linear(d_model, d_ff, bias=bias)
        self.down_proj = Linear(d_ff, d_model, bias=bias)
        self.never_trained = _up_proj_names(bias) if freeze_up_proj else ()

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_model) → (…, d_model)."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class SwiGLUFFN(GatedFFN):
    """down(silu(gate(x)) · up(x)); see ``GatedFFN``."""

    def __init__(self, d_model: int, d_ff: int, freeze_up_proj: bool = False, bias: bool = False) -> None:
        super().__init__(d_model, d_ff, freeze_up_proj, bias, F.silu)


class GeGLUFFN(GatedFFN):
    """down(gelu(gate(x)) · up(x)); see ``GatedFFN``."""

    def __init__(self, d_model: int, d_ff: int, freeze_up_proj: bool = False, bias: bool = False) -> None:
        super().__init__(d_model, d_ff, freeze_up_proj, bias, F.gelu)


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
        self.never_trained = _up_proj_names(bias) if freeze_up_proj else ()

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_model) → (…, d_model)."""
        return self.down_proj(self.activation(self.up_proj(x)))


def _up_proj_names(bias: bool) -> tuple[str, ...]:
    return ("up_proj.weight", "up_proj.bias") if bias else ("up_proj.weight",)


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
