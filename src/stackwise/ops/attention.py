"""Attention through ``scaled_dot_product_attention``, with padding, and no T×T tensor.

B batch, H query heads, G key/value heads (H a multiple of G), T queries, S keys, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PADDED = 1e4
"""How far below the others the scores of padded keys lie: exp(−1e4) is exactly 0 in every float format."""


MIN_CHUNK = 64
"""Queries that local attention takes at a time at least: thinner matrix products waste the processor."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v.

    Args:
        q: (B, H, T, D); k: (B, G, S, D); v: (B, G, S, E).
        causal: query t sees keys s ≤ t (needs T = S, or T = 1: the last token, which sees all keys).
        key_mask: (B, S) boolean, True where a key is real. Combined with ``causal``, never instead of it.
        window: causal: query t sees t − window < s ≤ t; else |s − t| ≤ window // 2 (needs T = S); default all.
        dropout: probability of dropping an attention weight.
        scale: default 1 / √D.

    Returns: (B, H, T, E). A query that sees padded keys only gets a finite, meaningless row.

    The mask travels in one more column of q and k, (q, 1)·(k, −PADDED) = q·k − PADDED at padded keys, so that the
    memory-efficient kernels, which take no mask beside causality, still serve.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    T, S = q.shape[-2], k.shape[-2]
    causal = causal and T > 1
    if window is not None and (window < S if causal else window // 2 < S - 1):
        return _attend_locally(q, k, v, causal, key_mask, window, dropout, scale)
    return _fused(q, k, v, causal=causal, key_mask=key_mask, band=None, dropout=dropout, scale=scale)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None,
    band: Tensor | None,
    dropout: float,
    scale: float,
) -> Tensor:
    """One call of the kernel. ``band``: boolean (T, S), True where a query sees a key; not beside ``causal``."""
    n_out = v.shape[-1]
    if key_mask is not None:
        width = 8  # kernels want head sizes in multiples of 8
        bias = torch.where(key_mask, 0.0, -PADDED / scale / 64).to(k.dtype)
        k_pad = k.new_zeros(*k.shape[:-1], width)
        k_pad[..., 0] = bias[:, None, :]
        q_pad = q.new_zeros(*q.shape[:-1], width)
        q_pad[..., 0] = 64
        q, k = torch.cat((q, q_pad), -1), torch.cat((k, k_pad), -1)
    if q.shape[-1] != n_out:  # the kernels take one width for all three; else SDPA writes out the T×S scores
        width = -(-max(q.shape[-1], n_out) // 8) * 8
        q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=band,
        is_causal=causal,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[..., :n_out]


def _attend_locally(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None, window: int, dropout: float, scale: float
) -> Tensor:
    """As ``attend`` with a window, in memory that grows with T · window.

    Queries are cut into chunks; each sees its own tokens and as many beside them as the window reaches, through one
    band mask for all chunks. Chunks are folded into the batch; keys before the first token and after the last are
    padding.
    """
    B, T = q.shape[0], q.shape[2]
    left = window - 1 if causal else window // 2
    right = 0 if causal else window // 2
    chunk = min(T, max(MIN_CHUNK, window))
    n = -(-T // chunk)
    span = left + chunk + right
    mask = torch.ones(B, T, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
    mask = F.pad(mask, (left, n * chunk - T + right)).unfold(1, span, chunk).reshape(B * n, span)

    def spans(x: Tensor) -> Tensor:  # (B, G, T, ·) → (B · n, G, span, ·)
        x = F.pad(x, (0, 0, left, n * chunk - T + right)).unfold(2, span, chunk)  # (B, G, n, ·, span)
        return x.permute(0, 2, 1, 4, 3).flatten(0, 1)

    chunks = F.pad(q, (0, 0, 0, n * chunk - T)).unflatten(2, (n, chunk)).transpose(1, 2).flatten(0, 1)
    ahead = torch.arange(span, device=q.device) - left - torch.arange(chunk, device=q.device)[:, None]
    band = (ahead >= -left) & (ahead <= right)  # key position − query position
    out = _fused(
        chunks, spans(k), spans(v), causal=False, key_mask=mask, band=band, dropout=dropout, scale=scale
    )  # (B · n, H, chunk, E)
    return out.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)[:, :, :T]
