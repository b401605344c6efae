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

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.flop_counter import register_flop_formula

from stackwise.ops.attention import attend

if TYPE_CHECKING:
    from stackwise.config.attention import KernelMeaning

TILE = 1 << 18
"""Distances that the laplacian computes at a time: 1 MiB in fp32."""

TILE_QUERIES = 128
"""Queries of one head in a tile: enough for the matrix product, few enough to leave out what causality hides."""

LAPLACIAN_TIP = 0.25
"""The smallest |g| in the frequencies that attention draws for the l2 laplacian; see ``frequencies``."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of δ = q − k, with bandwidth s.

    Attributes:
        value: δ / s (…, D) → k (…).
        draw: (n, D, s, generator, tip) → (n, D) frequencies in fp32, from the spectral density.
        width: the default s as logit, in √D. Narrower kernels have features of higher frequency, and train worse.
        temperature: (s, D) → τ for which τ k(δ) falls with distance as the logits of dot products do.
        weigh: attention whose weights are k / Σ k, exactly: (q, k, v, s, ``causal``, ``key_mask``, ``window``,
            ``dropout``, ``seen``); ``None``: there is none, since k is not computed exactly or may be negative.
        drops: whether these weights can be dropped at random.
    """

    value: Callable[[Tensor], Tensor]
    draw: Callable[[int, int, float, torch.Generator, float], Tensor]
    width: float
    temperature: Callable[[float, int], float]
    weigh: Callable[..., Tensor] | None = None
    drops: bool = True

    def default_bandwidth(self, meaning: KernelMeaning, head_dim: int) -> float:
        """The bandwidth s for queries and keys of unit variance, whose distance is about √(2D).

        As weight s² = √D, which makes the gaussian exp(q·k/√D), the softmax of dot products, for keys of equal length.
        """
        return head_dim**0.25 if meaning == "weight" else self.width * head_dim**0.5

    def __call__(self, q: Tensor, k: Tensor, bandwidth: float) -> Tensor:
        """k over the last dimension: (…, D) and (…, D), which broadcast, → (…)."""
        return self.value((q - k) / bandwidth)

    def frequencies(
        self, n: int, head_dim: int, bandwidth: float, generator: torch.Generator, tip: float = 0.0
    ) -> Tensor:
        """(n, D) in fp32.

        Args:
            tip: of the l2 laplacian: |g| is at least this. 0 is the laplacian itself, whose frequencies have no mean: a
                few rows in a hundred turn so fast that their gradients drown those of all others (measured in
                docs/log.md). Above 0 the tip of the kernel is rounded within |δ| < tip · s; k changes by less than
                P(|N(0, 1)| < tip).
        """
        return self.draw(n, head_dim, bandwidth, generator, tip)


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


def gaussian_weight_columns(q: Tensor, k: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """q' (…, D + 2) and k' (…, D + 2) for which softmax(q'·k' / s²) are the weights k(q, k) / Σ k of the gaussian.

    −|q − k|²/2 = q·k − |k|²/2 − |q|²/2, and the last term is the same for all keys of a query. The square of a key is
    split into two columns, of which the second holds what the first one's format rounds away.
    """
    half = q.new_full((*q.shape[:-1], 2), -0.5)
    return torch.cat((q, half), dim=-1), torch.cat((k, _split_square(k)), dim=-1)


def gaussian_weight_attention(q: Tensor, k: Tensor, v: Tensor, bandwidth: float, **sight: Any) -> Tensor:
    """Σ k(q, k) v / Σ k(q, k) for the gaussian, exactly; ``sight``: as in ``ops.attention.attend``."""
    return attend(*gaussian_weight_columns(q, k, bandwidth), v, scale=bandwidth**-2, **sight)


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
    """Σ k(q, k) v / Σ k(q, k) for the l2 laplacian, exactly, in memory that grows with T.

    Long sequences on a CUDA device go through FlexAttention, in the format of q, k and v; all others tile by tile, in
    fp32 or better. Distances below 4 √(ε (|q|² + 1)), ε that of the format computed in, are rounding error and count
    as 0, where the gradient, which has no limit there, is 0.

    Args:
        q: (B, H, T, D); k: (B, G, S, D); v: (B, G, S, E).
        bandwidth: s.
        causal, key_mask, window: as in ``ops.attention.attend``.

    Returns: (B, H, T, E) in q's dtype, differentiable once. A query that sees padded keys only gets a finite,
    meaningless row.
    """
    T, S = q.shape[2], k.shape[2]
    before = after = T + S  # how far before a query, and after it, its keys may lie: anywhere
    if window is not None:
        before = after = window - 1 if causal else window // 2
    if causal and T > 1:
        after = 0
    if q.is_cuda and q.dtype != torch.float64 and T >= FLEX_BLOCK:
        return _laplacian_flex(q, k, v, bandwidth, before, after, key_mask)
    dtype = torch.promote_types(q.dtype, torch.float32)
    far = torch.zeros(k.shape[0], S, dtype=dtype, device=q.device)
    if key_mask is not None:
        far = far.masked_fill(~key_mask, 1e30)  # squared: exp(−1e15 / s) is exactly 0
    q, k, v, out_dtype = q.to(dtype), k.to(dtype), v.to(dtype), q.dtype
    return _laplacian(q, k, v, far, bandwidth, before, after).to(out_dtype)


# Operations of their own: a compiler would unroll the loop over tiles, and a dry run on fake tensors go through it. The
# module's name in theirs keeps copies of this module apart.
_NAMESPACE = __name__.replace(".", "_")


@torch.library.custom_op(f"{_NAMESPACE}::laplacian", mutates_args=())
def _laplacian(q: Tensor, k: Tensor, v: Tensor, far: Tensor, bandwidth: float, before: int, after: int) -> Tensor:
    """Σ_s softmax_s(−|q − k_s| / s) v_s, tile by tile; ``far`` (B, S) is added to the squared distances."""
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    grouped, k, v, far = _by_group(q, k, v, far)
    view = out.view(*grouped.shape[:-1], -1)
    with torch.autocast(q.device.type, enabled=False):
        for n, parts in _tiles(grouped, k, before, after):
            keys = _key_columns(k[n], far[n])
            for t, s in parts:
                weights, _ = _weights(_query_columns(grouped[n, :, t]), keys[:, s], t, s, bandwidth, before, after)
                view[n, :, t] = torch.bmm(weights.flatten(1, 2), v[n, s]).view_as(view[n, :, t])
    return out


@torch.library.custom_op(f"{_NAMESPACE}::laplacian_backward", mutates_args=())
def _laplacian_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: Tensor,
    out: Tensor,
    bandwidth: float,
    before: int,
    after: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; the weights are computed again."""
    results = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    q, k, v, far = _by_group(q, k, v, far)
    grad, out, grad_q = (x.reshape(*q.shape[:-1], -1) for x in (grad, out, results[0]))
    grad_k, grad_v = results[1].view_as(k), results[2].view_as(v)
    D = q.shape[-1]
    with torch.autocast(q.device.type, enabled=False):
        for n, parts in _tiles(q, k, before, after):
            keys = _key_columns(k[n], far[n])
            for t, s in parts:
                queries = _query_columns(q[n, :, t])
                weights, distance = _weights(queries, keys[:, s], t, s, bandwidth, before, after)
                g = grad[n, :, t]
                mean = (g * out[n, :, t]).sum(-1, keepdim=True)
                g = g.flatten(1, 2)
                grad_v[n, s] += torch.bmm(weights.flatten(1, 2).mT, g)
                # d loss / d score · d score / d distance = −1/s, and d distance / d q = (q − k) / distance, 0 at 0.
                slope = torch.bmm(g, v[n, s].mT).view_as(weights).sub_(mean).mul_(weights)
                slope = slope.div_(distance).masked_fill_(distance == 0, 0.0).mul_(-1 / bandwidth).flatten(1, 2)
                # Σ_s slope (q − k) and its transpose; the columns of ones give the sums of slope.
                sums = torch.bmm(slope, keys[:, s]).view(*weights.shape[:3], D + 2)
                grad_q[n, :, t] = q[n, :, t] * sums[..., D + 1 :] - sums[..., :D]
                sums = torch.bmm(slope.mT, queries.flatten(1, 2))
                grad_k[n, s] += k[n, s] * sums[..., D : D + 1] + sums[..., :D] / 2
    return results


@_laplacian.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, far: Tensor, bandwidth: float, before: int, after: int) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@_laplacian_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4], output)
    ctx.options = inputs[4:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_laplacian_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


_laplacian.register_autograd(_differentiate, setup_context=_save)


# Two a multiply-add, over all T · S pairs whether they are seen or not, as the counter does for other attention; in a
# window, over those within its reach.
def _pairs(q: Any, k: Any, before: int, after: int) -> int:
    B, H, T, _ = q
    return B * H * T * min(k[2], before + after + 1)


@register_flop_formula(getattr(torch.ops, _NAMESPACE).laplacian)
def _(q: Any, k: Any, v: Any, far: Any, bandwidth: float, before: int, after: int, **options: Any) -> int:
    return 2 * _pairs(q, k, before, after) * (q[3] + 2 + v[3])


@register_flop_formula(getattr(torch.ops, _NAMESPACE).laplacian_backward)
def _(
    grad: Any, q: Any, k: Any, v: Any, far: Any, out: Any, bandwidth: float, before: int, after: int, **options: Any
) -> int:
    return 2 * _pairs(q, k, before, after) * (3 * (q[3] + 2) + 2 * v[3])


def _by_group(q: Tensor, k: Tensor, v: Tensor, far: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N, R, T, D), (N, S, D), (N, S, E), (N, S): N = B · G, and the R = H / G query heads of each."""
    B, H, T, D = q.shape
    G = k.shape[1]
    return q.reshape(B * G, H // G, T, D), k.flatten(0, 1), v.flatten(0, 1), far.repeat_interleave(G, dim=0)


def _tiles(q: Tensor, k: Tensor, before: int, after: int) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
    """Slices of N; for each, slices of the queries, and of all keys that these see."""
    N, R, T, _ = q.shape
    S = k.shape[1]
    rows = max(1, min(T, TILE_QUERIES, TILE // (R * S)))
    step = max(1, TILE // (R * S * rows))
    ends = [(start, min(T, start + rows)) for start in range(0, T, rows)]
    parts = [(slice(t, end), slice(max(0, t - before), min(S, end + after))) for t, end in ends]
    for n in range(0, N, step):
        yield slice(n, n + step), parts


def _query_columns(q: Tensor) -> Tensor:
    """[−2q, 1, |q|²], whose product with ``_key_columns`` is |q − k|² + far."""
    square = q.square().sum(-1, keepdim=True)
    return torch.cat((-2 * q, torch.ones_like(square), square), dim=-1)


def _key_columns(k: Tensor, far: Tensor) -> Tensor:
    """[k, |k|² + far, 1]."""
    square = k.square().sum(-1, keepdim=True)
    return torch.cat((k, square + far[..., None], torch.ones_like(square)), dim=-1)


def _weights(
    queries: Tensor, keys: Tensor, t: slice, s: slice, bandwidth: float, before: int, after: int
) -> tuple[Tensor, Tensor]:
    """The weights of queries t and keys s, given by their columns, and their distances: (n, R, queries, keys)."""
    rounding = 16 * torch.finfo(queries.dtype).eps * (queries[..., -1:] + 1)
    square = torch.bmm(queries.flatten(1, 2), keys.mT).view(*queries.shape[:3], -1)
    distance = square.mul_(square > rounding).sqrt_()
    scores = distance * (-1 / bandwidth)
    at = torch.arange(t.start, t.stop, device=square.device)[:, None]
    place = torch.arange(s.start, s.stop, device=square.device)
    late = max(0, t.start + after + 1 - s.start)  # from here on, keys that the first query does not see
    early = max(0, t.stop - 1 - before - s.start)  # up to here, keys that the last query does not see
    scores[..., late:].masked_fill_(place[late:] > at + after, -torch.inf)
    scores[..., :early].masked_fill_(place[:early] < at - before, -torch.inf)
    return scores.softmax(-1), distance


FLEX_BLOCK = 128
"""Queries, and keys, in a block that FlexAttention computes or skips."""


def _laplacian_flex(
    q: Tensor, k: Tensor, v: Tensor, bandwidth: float, before: int, after: int, key_mask: Tensor | None
) -> Tensor:
    """As ``laplacian_weight_attention``, through FlexAttention (2412.05496), which differentiates on CUDA only.

    The squared distance is a product of more columns, as in ``_query_columns``, with each square in two of them, as
    in ``gaussian_weight_columns``.
    """
    q_square, k_square = _split_square(q), _split_square(k)
    one = torch.ones_like(q_square), torch.ones_like(k_square)
    width = -(q.shape[-1] + 4) % 16
    q = torch.cat((-2 * q, q_square, one[0], q.new_zeros(*q.shape[:-1], width)), dim=-1)
    k = torch.cat((k, one[1], k_square, k.new_zeros(*k.shape[:-1], width)), dim=-1)
    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    return attend(
        q,
        k,
        v,
        score_mod=_minus_root,
        block_mask=_block_mask(q.shape[2], k.shape[2], before, after, key_mask, q.device),
        scale=bandwidth**-2,
        enable_gqa=q.shape[1] != k.shape[1],
    )


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _split_square(x: Tensor) -> Tensor:
    """|x|² in two columns (…, 2) of x's format; the second holds what the first one's rounding lost."""
    square = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1, keepdim=True)
    high = square.to(x.dtype)
    return torch.cat((high, (square - high).to(x.dtype)), dim=-1)


def _minus_root(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """−√score, whose gradient is 0 where the squared distance (in bandwidths) is rounding error."""
    return -score.clamp(min=1e-5).sqrt()


def _block_mask(
    T: int, S: int, before: int, after: int, key_mask: Tensor | None, device: torch.device
) -> BlockMask | None:
    """Which blocks hold keys that their queries see, from the blocks' positions: no T×S mask is made."""
    if before >= T and after >= S and key_mask is None:
        return None
    rows = torch.arange(0, T, FLEX_BLOCK, device=device)[:, None]
    columns = torch.arange(0, S, FLEX_BLOCK, device=device)
    last = FLEX_BLOCK - 1
    near = (columns <= rows + last + after) & (columns + last >= rows - before)

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        inside = (s <= t + after) & (s >= t - before)
        return inside if key_mask is None else inside & key_mask[b, s]

    return BlockMask.from_kv_blocks(
        near.sum(-1, dtype=torch.int32)[None, None],
        near.int().argsort(dim=-1, descending=True, stable=True).int()[None, None],
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=sees,
        seq_lengths=(T, S),
    )


def _gaussian_frequencies(n: int, head_dim: int, s: float, generator: torch.Generator, tip: float) -> Tensor:
    return torch.randn(n, head_dim, generator=generator) / s


def _laplacian_frequencies(n: int, head_dim: int, s: float, generator: torch.Generator, tip: float) -> Tensor:
    z = torch.randn(n, head_dim, generator=generator)
    g = torch.randn(n, 1, generator=generator).abs()
    return z / (g.clamp(min=max(tip, 1e-6)) * s)  # 0 would be an infinite frequency


def _l1_laplacian_frequencies(n: int, head_dim: int, s: float, generator: torch.Generator, tip: float) -> Tensor:
    return torch.tan(math.pi * (torch.rand(n, head_dim, generator=generator) - 0.5)) / s


def _uniform_frequencies(n: int, head_dim: int, s: float, generator: torch.Generator, tip: float) -> Tensor:
    return (2 * torch.rand(n, head_dim, generator=generator) - 1) / s


def _laplacian_weighs(
    q: Tensor, k: Tensor, v: Tensor, bandwidth: float, *, seen: Tensor | None, dropout: float, **sight: Any
) -> Tensor:
    if seen is not None:
        raise ValueError("the laplacian as weight cannot be told which keys each query sees (seen)")
    assert not dropout, "attention refuses dropout of the laplacian's weights when it is made"
    return laplacian_weight_attention(q, k, v, bandwidth, **sight)


KERNELS: dict[str, Kernel | None] = {
    "linear": None,  # the dot product, which is no kernel
    "gaussian": Kernel(
        lambda d: (-0.5 * d.square().sum(-1)).exp(),
        _gaussian_frequencies,
        width=2,
        temperature=lambda s, head_dim: s**2 / head_dim**0.5,
        weigh=gaussian_weight_attention,
    ),
    "laplacian": Kernel(
        lambda d: (-torch.linalg.vector_norm(d, ord=2, dim=-1)).exp(),
        _laplacian_frequencies,
        width=4,
        temperature=lambda s, head_dim: s,  # k has a tip there, and τ k a slope of 1
        weigh=_laplacian_weighs,
        drops=False,
    ),
    "laplacian_l1": Kernel(
        lambda d: (-torch.linalg.vector_norm(d, ord=1, dim=-1)).exp(),
        _l1_laplacian_frequencies,
        width=4,
        temperature=lambda s, head_dim: s,
    ),
    "uniform": Kernel(
        lambda d: torch.sinc(d / math.pi).prod(-1),
        _uniform_frequencies,
        width=2,
        temperature=lambda s, head_dim: 3 * s**2 / head_dim**0.5,  # k = 1 − |δ|²/6s² + …
    ),
}
"""The kernels that ``AttentionSpec.kernel`` names."""
