"""Attention through ``scaled_dot_product_attention``, with padding, and no T×T tensor.

B batch, H query heads, G key/value heads (H a multiple of G), T queries, S keys, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PADDED = 1e4
"""How far below the others the scores of padded keys lie: exp(−1e4) is exactly 0 in every float format."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q kᵀ / √D) v.

    Args:
        q: (B, H, T, D); k, v: (B, G, S, D).
        causal: query t sees keys s ≤ t (needs T = S).
        key_mask: (B, S) boolean, True where a key is real. Combined with ``causal``, never instead of it.
        dropout: probability of dropping an attention weight.

    Returns: (B, H, T, D). A query that sees padded keys only gets a finite, meaningless row.

    The mask travels in one more column of q and k, (q, 1)·(k, −PADDED) = q·k − PADDED at padded keys, so that the
    memory-efficient kernels, which take no mask beside causality, still serve.
    """
    head_dim = q.shape[-1]
    scale = head_dim**-0.5
    if key_mask is not None:
        width = 8  # kernels want head sizes in multiples of 8
        bias = torch.where(key_mask, 0.0, -PADDED / scale / 64).to(k.dtype)
        k_pad = k.new_zeros(*k.shape[:-1], width)
        k_pad[..., 0] = bias[:, None, :]
        q_pad = q.new_zeros(*q.shape[:-1], width)
        q_pad[..., 0] = 64
        q, k, v = torch.cat((q, q_pad), -1), torch.cat((k, k_pad), -1), F.pad(v, (0, width))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out if key_mask is None else out[..., :head_dim]
