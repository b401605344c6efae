"""Attention through ``scaled_dot_product_attention``, with padding and windows, and no T×T tensor.

B batch, H query heads, G key/value heads (H a multiple of G), T queries, S keys, D size of a query or key head, E size
of a value head.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

PADDED = 1e4
"""How far below the others the scores of padded keys lie: exp(−1e4) is exactly 0 in every float format."""

MIN_CHUNK = 64
"""Queries that local attention takes at a time at least: thinner matrix products waste the processor."""

CUDA_WIDTH = 8
"""Kernels for cuda want head sizes in multiples of this; those for CPUs take any."""

_planned: str | None = None  # a plain variable: compilers cannot trace a ContextVar


@contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Attention inside takes the way that it takes on this kind of device (``cuda``, ``mps``, ``cpu``), for a dry run.

    Tensors are fake ones for a CPU, since torch built without cuda makes no others that train. The CPU's fused kernel
    keeps what cuda's keep (q, k, v, the output, a number a query), so it stands for them.
    """
    global _planned
    before, _planned = _planned, device
    try:
        yield
    finally:
        _planned = before


def _kind(x: Tensor) -> str:
    return _planned or x.device.type


def block_causal(n_tokens: int, block_length: int, device: torch.device) -> Tensor:
    """(T, T) boolean: a token sees its own block and the blocks before it."""
    block = torch.arange(n_tokens, device=device) // block_length
    return block[:, None] >= block


def noised_and_clean(n_tokens: int, block_length: int, device: torch.device) -> Tensor:
    """(2T, 2T) boolean: which tokens each of [noised, clean] sees, in one pass over all blocks (2503.09573 §3.1).

    A noised token sees its own block's noised tokens and the clean ones of earlier blocks; a clean one its own and
    earlier blocks' clean ones.
    """
    block = torch.arange(n_tokens, device=device) // block_length
    same, earlier = block[:, None] == block, block[:, None] > block
    none = torch.zeros_like(same)
    return torch.cat((torch.cat((same, earlier), dim=1), torch.cat((none, same | earlier), dim=1)))


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
    seen: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v.

    Args:
        q: (B, H, T, D); k: (B, G, S, D); v: (B, G, S, E).
        causal: query t sees keys s ≤ t. Needs T = S, or T = 1: the last token, which sees all keys.
        key_mask: (B, S) boolean, True where a key is real. Combined with ``causal``, never instead of it.
        window: local attention, in memory that grows with T · window. Causal: query t sees t − window < s ≤ t; else
            |s − t| ≤ window // 2. Needs T = S. Default all.
        dropout: probability of dropping an attention weight. torch's fused kernel for CPUs has none: there, the T×S
            weights are written out while it is above 0. On MPS they are written out whenever gradients are needed.
        scale: default 1 / √D.
        seen: (T, S) boolean, True where query t sees key s: what neither causality nor a window says. One for all rows
            and heads. Not beside ``causal`` or ``window``. Default all.

    Returns: (B, H, T, E). A query that sees padded keys only gets a finite, meaningless row.

    Raises:
        ValueError: T ≠ S where they must be equal; a window below 1.
    """
    T, S = q.shape[-2], k.shape[-2]
    if T == 1:  # a branch, and not ``causal and T > 1``, which is no bool while sizes are traced as symbols
        causal = False
    if T != S and (causal or window is not None):
        raise ValueError(f"causal and local attention need as many queries as keys; there are {T} and {S}")
    if seen is not None and (causal or window is not None):
        raise ValueError("seen says which keys a query sees; it cannot be combined with causal or window")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if window is not None and (window - 1 if causal else window // 2) < S - 1:
        return _attend_locally(q, k, v, causal, key_mask, window, dropout, scale)
    mask = None
    if seen is not None:
        both = seen if key_mask is None else seen & key_mask[:, None, None]
        mask = _scores(both, q.dtype)
        mask = mask if mask.dim() == 4 else mask[None, None]
    elif key_mask is not None and causal:
        q, k = _with_mask_column(q, k, key_mask, scale)
    elif key_mask is not None:
        mask = _scores(key_mask, q.dtype)[:, None, None]
    return _fused(q, k, v, causal, mask, dropout, scale)


def _scores(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where ``seen``, else −PADDED. Finite, so that a row that sees nothing stays finite."""
    return torch.where(seen, 0.0, -PADDED).to(dtype)


def _with_mask_column(q: Tensor, k: Tensor, key_mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q and k, one column wider, whose products are q·k, less PADDED / scale at padded keys.

    The fused kernels take no mask beside causality; so it travels in that column, (q, 1)·(k, −PADDED).
    """
    share = 64.0  # of PADDED in q, so that neither factor leaves the range of fp16
    bias = torch.where(key_mask, 0.0, -PADDED / scale / share).to(k.dtype)
    width = CUDA_WIDTH if _kind(q) == "cuda" else 1
    q_columns, k_columns = q.new_zeros(*q.shape[:-1], width), k.new_zeros(*k.shape[:-1], width)
    q_columns[..., 0] = share
    k_columns[..., 0] = bias[:, None]
    return torch.cat((q, q_columns), -1), torch.cat((k, k_columns), -1)


def _fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, dropout: float, scale: float) -> Tensor:
    """One call of the kernel, in a form that a memory-efficient one serves; else SDPA would write out the scores.

    ``mask`` is added to the scores; any shape that broadcasts to (B, H, T, S); not beside ``causal``.
    """
    n_out, kind = v.shape[-1], _kind(q)
    on_cuda = kind == "cuda"
    width = max(q.shape[-1], n_out)  # the kernels take one for all three
    if on_cuda:
        width = -(-width // CUDA_WIDTH) * CUDA_WIDTH
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    grouped = False
    if q.shape[1] != k.shape[1]:
        # On cuda the flash kernel alone knows groups, and it takes no mask, no fp32 and no head above 256.
        if on_cuda and (mask is not None or q.dtype.itemsize > 2 or width > 256):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        else:
            grouped = True
    planned = kind != q.device.type
    if planned and on_cuda:
        dropout = 0.0  # cuda's kernels keep a seed for it, no weights
    with sdpa_kernel(SDPBackend.MATH) if planned and kind == "mps" else nullcontext():
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, dropout_p=dropout, enable_gqa=grouped
        )
    return out[..., :n_out]


def _attend_locally(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None, window: int, dropout: float, scale: float
) -> Tensor:
    """As ``attend`` with a window.

    Queries are cut into n chunks; each sees its own span of keys: the chunk's and as many beside it as the window
    reaches. Chunks are folded into the batch. Keys before the first token and after the last are masked like padding.
    """
    B, T = q.shape[0], q.shape[2]
    left = window - 1 if causal else window // 2
    right = 0 if causal else window // 2
    chunk = min(T, max(MIN_CHUNK, window // 2))
    n = -(-T // chunk)
    span = left + chunk + right
    after = n * chunk - T

    def spans(x: Tensor) -> Tensor:  # (B, G, T, ·) → (B · n, G, span, ·)
        x = F.pad(x, (0, 0, left, after + right + chunk))
        # Slices side by side, and not ``unfold``, whose backward pass is slow.
        parts = [
            x[:, :, start : start + n * chunk].unflatten(2, (n, chunk)).transpose(1, 2)[..., : span - start, :]
            for start in range(0, span, chunk)
        ]
        return torch.cat(parts, dim=3).flatten(0, 1)

    ahead = torch.arange(span, device=q.device) - left - torch.arange(chunk, device=q.device)[:, None]
    band = (ahead >= -left) & (ahead <= right)  # key position − query position
    real = torch.ones(1, T, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
    real = F.pad(real, (left, after + right)).unfold(1, span, chunk)  # (B or 1, n, span)
    mask = _scores(band & real[:, :, None], q.dtype).expand(B, -1, -1, -1).flatten(0, 1)  # (B · n, chunk, span)
    chunks = F.pad(q, (0, 0, 0, after)).unflatten(2, (n, chunk)).transpose(1, 2).flatten(0, 1)
    out = _fused(chunks, spans(k), spans(v), False, mask[:, None], dropout, scale)  # (B · n, H, chunk, E)
    return out.transpose(1, 2).unflatten(0, (B, n)).flatten(1, 2)[:, :T].transpose(1, 2)
