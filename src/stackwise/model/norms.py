"""Normalisation of the hidden state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stackwise.model.spec import NormKind


class RMSNorm(nn.RMSNorm):
    """x / rms(x) · weight over the last dimension (1910.07467 §3), computed in fp32.

    Keeps its input and 1 / rms(x) for the backward pass, as torch's own kernel on an accelerator does; torch's
    composite for a CPU keeps the quotient too.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) → (…, width)."""
        if x.device.type == "cuda":
            return super().forward(x)
        assert self.eps is not None
        y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, rstd, weight)
        return (wide * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, rstd, weight = ctx.saved_tensors
        grad = grad.to(rstd.dtype)
        share = x * rstd
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * share).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        grad = grad * weight
        along = (grad * share).mean(-1, keepdim=True)
        return grad.sub_(share.mul_(along)).mul_(rstd).to(x.dtype), grad_weight, None


def create_norm(kind: NormKind, width: int, eps: float, bias: bool = False) -> nn.Module:
    """RMSNorm, which has no bias, or LayerNorm (1607.06450), over the last dimension."""
    if kind == "rmsnorm":
        return RMSNorm(width, eps=eps)
    if kind == "layernorm":
        return nn.LayerNorm(width, eps=eps, bias=bias)
    raise ValueError(f"norm is {kind!r}; allowed: rmsnorm, layernorm")
