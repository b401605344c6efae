"""A linear layer whose matrix may be stored below fp32, and which may have low-rank adapters beside it.

B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.ops.storage import Full, Storage, storage_of

if TYPE_CHECKING:
    from stackwise.config.growth import PrecisionName


class LowRank(nn.Module):
    """(alpha / rank) · B A dropout(x) (LoRA, 2106.09685 §4.1). ``B`` starts at zero.

    Args:
        n_in, n_out: of the layer that it adapts.
        rank, alpha: of the factors A (rank, n_in) and B (n_out, rank), in fp32.
        dropout: of x, while training.
    """

    def __init__(self, n_in: int, n_out: int, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.A = nn.Parameter(torch.zeros(rank, n_in))
        self.B = nn.Parameter(torch.zeros(n_out, rank))

    def draw(self, generator: torch.Generator) -> None:
        """A uniform in ±1/√n_in, as its authors' code has it; B zero."""
        bound = self.A.shape[1] ** -0.5
        with torch.no_grad():
            self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
            self.B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(…, n_in) → (…, n_out)."""
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.A)
        return F.linear(inner, self.B) * (self.alpha / self.rank)

    def delta(self) -> Tensor:
        """What it adds to the layer's matrix, (n_out, n_in)."""
        return (self.B @ self.A) * (self.alpha / self.rank)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}"


class _Stored(torch.autograd.Function):
    """x Wᵀ with W decoded for the product and again for the gradient of x, so that nothing dense is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, storage: Storage, shape: torch.Size, *stored: Tensor) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.storage, ctx.shape = storage, shape
        return x @ _dense(storage, shape, stored, x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors
        return (grad @ _dense(ctx.storage, ctx.shape, stored, grad.dtype), None, None, *(None for _ in stored))


def _dense(storage: Storage, shape: torch.Size, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    return storage.decode(dict(zip(storage.names, stored)), shape, dtype)


class Linear(nn.Linear):
    """x Wᵀ + b, and Σ of its adapters.

    ``store`` changes how W is kept. In ``full`` (fp32) and ``bfloat16`` it is a parameter that can train; in the others
    it is frozen: a parameter in fp16, or codes and scales (buffers) in place of ``weight``. Gradients flow through all
    of them to the input and to the adapters. Products run in the dtype of the input (of autocast, where it is on).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.precision: PrecisionName = "full"
        self.storage: Storage = Full()
        self.adapters = nn.ModuleDict()

    @torch.no_grad()
    def store(self, precision: PrecisionName) -> None:
        """Keeps the matrix in ``precision`` from here on; adapters and bias stay as they are. ValueError if unknown."""
        storage = storage_of(precision)
        if precision == self.precision:
            return
        stored = storage.encode(self.dense())
        for name in self.storage.names:
            if name != "weight":
                delattr(self, name)
        self.precision, self.storage = precision, storage
        weight = stored.pop("weight", None)
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight, requires_grad=False))
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (n_out, n_in) without its adapters."""
        return _dense(self.storage, self.shape, tuple(t.detach() for t in self._stored()), dtype)

    def merged(self) -> Tensor:
        """The matrix (n_out, n_in) in fp32 with its adapters added."""
        with torch.no_grad():
            return self.dense() + sum(adapter.delta() for adapter in self.low_rank().values())

    def low_rank(self) -> dict[str, LowRank]:
        return {name: module for name, module in self.adapters.items() if isinstance(module, LowRank)}

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def _stored(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.storage.names)

    def forward(self, x: Tensor) -> Tensor:
        """(…, n_in) → (…, n_out)."""
        if self.precision == "full":
            out = F.linear(x, self.weight, self.bias)
        else:
            out = self._through_storage(x)
        for adapter in self.adapters.values():
            out = out + adapter(x)
        return out

    def _through_storage(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x = x.to(dtype)
        if self.weight is not None and (self.weight.requires_grad or self.weight.dtype == dtype):
            out = F.linear(x, self.weight.to(dtype))
        elif torch.is_grad_enabled() and x.requires_grad:
            out = _Stored.apply(x, self.storage, self.shape, *self._stored())
        else:
            out = x @ self.dense(dtype).T
        return out if self.bias is None else out + self.bias.to(dtype)

    def extra_repr(self) -> str:
        stored = "" if self.precision == "full" else f", stored={self.precision}"
        return super().extra_repr() + stored


def linears(module: nn.Module) -> Iterator[tuple[str, Linear]]:
    """(name, layer) of every ``Linear`` inside ``module``."""
    for name, part in module.named_modules():
        if isinstance(part, Linear):
            yield name, part
