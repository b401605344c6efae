"""Normalisation of the hidden state."""

from torch import nn

from stackwise.model.spec import NormKind


def create_norm(kind: NormKind, width: int, eps: float, bias: bool = False) -> nn.Module:
    """RMSNorm (1910.07467), which has no bias, or LayerNorm (1607.06450), over the last dimension."""
    if kind == "rmsnorm":
        return nn.RMSNorm(width, eps=eps)
    if kind == "layernorm":
        return nn.LayerNorm(width, eps=eps, bias=bias)
    raise ValueError(f"norm is {kind!r}; allowed: rmsnorm, layernorm")
