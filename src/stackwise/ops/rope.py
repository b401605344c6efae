"""Rotary position embedding (RoFormer, 2104.09864 §3.4), in the half-split layout that Llama uses.

B batch, H heads, T tokens, D head size.
"""

import torch
from torch import Tensor


def rope_table(
    n_tokens: int, head_dim: int, theta: float, device: torch.device, start: int = 0
) -> tuple[Tensor, Tensor]:
    """(cos, cos) and (−sin, sin), each (T, D) in fp32, for positions ``start … start + n_tokens − 1``.

    Angle of pair i at position m: m · theta^(−2i/D). fp32, since bf16 angles lose whole turns.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    position = torch.arange(start, start + n_tokens, dtype=torch.float32, device=device)
    angle = torch.outer(position, theta**-exponent)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i+D/2}) of ``x`` (B, H, T, D): x·cos + swap(x)·sin, with the tables above."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).type_as(x)


def rope_rows(table: tuple[Tensor, Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of ``table`` at ``positions`` (B, T): a pair of (B, 1, T, D), which broadcasts over heads."""
    return table[0][positions][:, None], table[1][positions][:, None]
