"""Kernels of queries and keys: random Fourier features, and kernels that are attention weights themselves.

| kernel | k(δ), δ = q − k | frequencies w of its features |
|---|---|---|
| gaussian | exp(−|δ|² / 2s²) | N(0, I / s²) |
| laplacian, l2 | exp(−|δ| / s) | z / (|g| s), z ~ N(0, I), one g ~ N(0, 1) a row: Cauchy in every direction |
| laplacian, l1 | exp(−|δ|₁ / s) | Cauchy(0, 1/s), coordinate by coordinate |
| uniform | Π sin(δᵢ/s) / (δᵢ/s) | U[−1/s, 1/s], coordinate by coordinate |

k(δ) = E cos(w·δ) (Bochner; Rahimi and Recht 2007). gaussian and l2 depend on |δ| alone, so that rotary positions act on
the difference of positions alone; l1 and uniform depend on the axes.

B batch, H query heads, G key/value heads, T queries, S keys, D head size, E size of a value.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stackwise.model.spec import KernelMeaning, KernelNorm, KernelType

CHUNK_ELEMENTS = 1 << 20
"""Distances that the laplacian computes at a time: 4 MiB in fp32."""


LAPLACIAN_TIP = 0.25
"""The smallest |g| in the frequencies that attention draws for the l2 laplacian; see ``frequencies``."""


def default_bandwidth(kernel_type: KernelType, meaning: KernelMeaning, head_dim: int) -> float:
    """The bandwidth s for queries and keys of unit variance, whose distance is about √(2D).

    As weight s² = √D, which makes the gaussian exp(q·k/√D), the softmax of dot products, for keys of equal length. As
    logit s = 2√D, and 4√D for the laplacian: narrower kernels have features of higher frequency, and train worse.
    """
    if meaning == "weight":
        return head_dim**0.25
    return (4 if kernel_type == "laplacian" else 2) * head_dim**0.5


def default_temperature(kernel_type: KernelType, bandwidth: float, head_dim: int) -> float:
    """τ for which τ k(δ) falls with distance as the logits of dot products do: by |δ|²/2√D near 0.

    gaussian: s²/√D; uniform: 3s²/√D, since k = 1 − |δ|²/6s² + …; laplacian, which has a tip there: s, a slope of 1.
    """
    if kernel_type == "laplacian":
        return bandwidth
    return (3 if kernel_type == "uniform" else 1) * bandwidth**2 / head_dim**0.5


def frequencies(
    kernel_type: KernelType,
    n: int,
    head_dim: int,
    bandwidth: float,
    norm: KernelNorm,
    generator: torch.Generator,
    tip: float = 0.0,
) -> Tensor:
    """(n, D) in fp32, drawn from the spectral density of the kernel.

    Args:
        tip: of the l2 laplacian: |g| is at least this. 0 is the laplacian itself, whose frequencies have no mean: a few
            rows in a hundred turn so fast that their gradients drown those of all others (measured in docs/log.md).
            Above 0 the tip of the kernel is rounded within |δ| < tip · s; k changes by less than P(|N(0, 1)| < tip).
    """
    if kernel_type == "uniform":
        return (2 * torch.rand(n, head_dim, generator=generator) - 1) / bandwidth
    if kernel_type == "laplacian" and norm == "l1":
        return torch.tan(math.pi * (torch.rand(n, head_dim, generator=generator) - 0.5)) / bandwidth
    z = torch.randn(n, head_dim, generator=generator)
    if kernel_type == "gaussian":
        return z / bandwidth
    if kernel_type == "laplacian":
        return z / (torch.randn(n, 1, generator=generator).abs().clamp(min=tip) * bandwidth)
    raise ValueError(f"kernel_type is {kernel_type!r}; kernels with features: gaussian, laplacian, uniform")


def phases(n: int, generator: torch.Generator) -> Tensor:
    """(n,) phases, uniform in [0, 2π), for ``cosine_features``."""
    return 2 * math.pi * torch.rand(n, generator=generator)


def _angles(x: Tensor, w: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)  # 16-bit angles lose whole turns
    with torch.autocast(x.device.type, enabled=False):
        return x.to(dtype) @ w.to(dtype).T


def fourier_features(x: Tensor, w: Tensor) -> Tensor:
    """φ(x) = [cos Wx, sin Wx] / √n: φ(q)·φ(k) is the mean of cos(w·(q − k)), and 1 where q = k.

    Args:
        x: (…, D); w: (n, D) from ``frequencies``.

    Returns: (…, 2n).
    """
    angle = _angles(x, w)
    return (torch.cat((angle.cos(), angle.sin()), dim=-1) * len(w) ** -0.5).to(x.dtype)


def cosine_features(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """φ(x) = √(2/n) cos(Wx + b): as ``fourier_features`` in the mean over phases b (n,), with n features; (…, n)."""
    return ((_angles(x, w) + b).cos() * (2 / len(w)) ** 0.5).to(x.dtype)


def kernel(q: Tensor, k: Tensor, kernel_type: KernelType, bandwidth: float, norm: KernelNorm = "l2") -> Tensor:
    """The kernel itself over the last dimension: (…, D) and (…, D), which broadcast, → (…)."""
    delta = (q - k) / bandwidth
    if kernel_type == "gaussian":
        return (-0.5 * delta.square().sum(-1)).exp()
    if kernel_type == "laplacian":
        return (-torch.linalg.vector_norm(delta, ord=2 if norm == "l2" else 1, dim=-1)).exp()
    if kernel_type == "uniform":
        return torch.sinc(delta / math.pi).prod(-1)
    raise ValueError(f"kernel_type is {kernel_type!r}; allowed: gaussian, laplacian, uniform")


def gaussian_weight_columns(q: Tensor, k: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """q' (…, D + 2) and k' (…, D + 2) for which softmax(q'·k' / s²) are the weights k(q, k) / Σ k of the gaussian.

    −|q − k|²/2 = q·k − |k|²/2 − |q|²/2, and the last term is the same for all keys of a query. The square of a key is
    split into two columns, of which the second holds what the first one's format rounds away.
    """
    half = -0.5 * k.to(torch.promote_types(k.dtype, torch.float32)).square().sum(-1, keepdim=True)
    high = half.to(k.dtype)
    low = (half - high).to(k.dtype)
    one = torch.ones_like(q[..., :1])
    return torch.cat((q, one, one), dim=-1), torch.cat((k, high, low), dim=-1)


class _LaplacianWeights(torch.autograd.Function):
    """Σ_s softmax_s(−|q − k_s| / s) v_s, some queries at a time; the backward pass computes their weights again."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, bandwidth: float, limits: tuple[int, int] | None
    ) -> Tensor:
        # q: (N, R, T, D), the R heads of a group; k, v: (N, S, ·); bias: (N, S), −∞ where a key is padding.
        rows = _rows(q.shape[0] * q.shape[1], k.shape[1])
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        log_z = q.new_empty(q.shape[:-1])
        for start in range(0, q.shape[2], rows):
            part = q[:, :, start : start + rows]
            scores = _scores(part, k, bias, bandwidth, limits, start)[0]
            log_z[:, :, start : start + rows] = scores.logsumexp(-1)
            weights = scores.softmax(-1)
            out[:, :, start : start + rows] = torch.matmul(weights, v[:, None])
        ctx.save_for_backward(q, k, v, bias, out, log_z)
        ctx.bandwidth, ctx.limits, ctx.rows = bandwidth, limits, rows
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, log_z = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start in range(0, q.shape[2], ctx.rows):
            rows = slice(start, start + ctx.rows)
            part, g = q[:, :, rows], grad[:, :, rows]
            scores, distance = _scores(part, k, bias, ctx.bandwidth, ctx.limits, start)
            weights = (scores - log_z[:, :, rows, None]).exp()
            grad_v += torch.matmul(weights.flatten(1, 2).mT, g.flatten(1, 2))
            # d loss / d score, then · d score / d distance = −1/s and d distance / d q = (q − k) / distance (0 at 0).
            slope = weights.mul_(torch.matmul(g, v[:, None].mT) - (g * out[:, :, rows]).sum(-1, keepdim=True))
            slope = torch.where(distance > 0, slope / distance * (-1 / ctx.bandwidth), 0.0)
            grad_q[:, :, rows] = part * slope.sum(-1, keepdim=True) - torch.matmul(slope, k[:, None])
            grad_k += k * slope.sum((1, 2))[..., None] - torch.matmul(slope.flatten(1, 2).mT, part.flatten(1, 2))
        return grad_q, grad_k, grad_v, None, None, None


def _rows(heads: int, n_keys: int) -> int:
    """Queries of each head at a time."""
    return max(1, CHUNK_ELEMENTS // (heads * n_keys))


def _scores(
    q: Tensor, k: Tensor, bias: Tensor, bandwidth: float, limits: tuple[int, int] | None, start: int
) -> tuple[Tensor, Tensor]:
    """−|q − k| / s + bias, and |q − k|, (N, R, rows, S). ``limits``: how far before and after a query its keys lie."""
    square = q.square().sum(-1, keepdim=True) + k.square().sum(-1)[:, None, None] - 2 * torch.matmul(q, k[:, None].mT)
    # The square of a distance of 0 comes out as rounding error of |q|² + |k|².
    tiny = 4 * torch.finfo(q.dtype).eps
    square = torch.where(square > tiny * (q.square().sum(-1, keepdim=True) + 1), square, 0.0)
    distance = square.sqrt()
    scores = distance * (-1 / bandwidth) + bias[:, None, None]
    if limits is not None:
        t = torch.arange(start, start + q.shape[2], device=q.device)[:, None]
        ahead = torch.arange(k.shape[1], device=q.device) - t
        scores = scores.masked_fill((ahead < -limits[0]) | (ahead > limits[1]), -1e30)
    return scores, distance


def laplacian_weight_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bandwidth: float,
    *,
    causal: bool,
    key_mask: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Σ k(q, k) v / Σ k(q, k) for the L2 laplacian, exactly, in memory that grows with T.

    Args:
        q: (B, H, T, D); k: (B, G, S, D); v: (B, G, S, E).
        bandwidth: s.
        causal, key_mask, window: as in ``ops.attention.attend``.

    Returns: (B, H, T, E). Computed in fp32 or better. Differentiable once.
    """
    B, H, T, _ = q.shape
    G, S = k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    causal = causal and T > 1
    limits = None
    if causal or window is not None:
        reach = S if window is None else (window - 1 if causal else window // 2)
        limits = (reach, 0 if causal else reach)
    bias = torch.zeros(B, S, dtype=dtype, device=q.device)
    if key_mask is not None:
        bias = bias.masked_fill(~key_mask, -1e15)
    with torch.autocast(q.device.type, enabled=False):
        out = _LaplacianWeights.apply(
            q.to(dtype).reshape(B * G, H // G, T, -1),
            k.to(dtype).flatten(0, 1),
            v.to(dtype).flatten(0, 1),
            bias.repeat_interleave(G, dim=0),
            bandwidth,
            limits,
        )
    return out.view(B, H, T, -1).to(q.dtype)
