"""How a matrix is stored below fp32, and read again.

| precision | stored | bytes a weight | largest error of a weight |
|---|---|---|---|
| full | fp32 | 4 | 0 |
| bfloat16, half | that dtype | 2 | 2⁻⁸, 2⁻¹¹ of it |
| int8 | round(127 w / s), s the largest of 128 | 1 + 4/128 | s / 254 |
| fp8 | e4m3 of 448 w / s, s the largest of 128 | 1 + 4/128 | 2⁻⁴ of it, or s / 458752 |
| nf4 | nearest of 16 quantiles of a normal, times s, the largest of 64 (QLoRA 2305.14314 §3) | 1/2 + 4/64 | 0.152 s |
| nvfp4 | e2m1 times an e4m3 scale of s, the largest of 16, times one of the matrix (NVFP4) | 1/2 + 1/16 | 17 s / 96 |

Blocks run over the matrix row after row; the last one is filled up with zeros. Zero is exact in every format.
Where s is below 2⁻⁶/448 of the matrix's largest, nvfp4 loses bits of the scale, and below 2⁻¹⁰/448 all of it. The range
of half ends at 65504, and below 2⁻¹⁴ its error is up to 2⁻²⁵.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise.ops.coding import coding

Precision = Literal["full", "half", "bfloat16", "fp8", "int8", "nf4", "nvfp4"]
DTYPES: dict[str, torch.dtype] = {"full": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
"""Precisions that are a dtype of the weight itself."""
BLOCKS = {"fp8": 128, "int8": 128, "nf4": 64, "nvfp4": 16}
"""Precisions that are codes and scales, and how many weights share a scale."""
PRECISIONS: tuple[Precision, ...] = ("full", "half", "bfloat16", "fp8", "int8", "nf4", "nvfp4")
FP8_MAX = 448.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of a 4-bit float with two bits of exponent."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""QLoRA 2305.14314, appendix E."""


def bytes_per_weight(precision: Precision) -> float:
    """Bytes that a weight of a large matrix takes, its share of the scales included."""
    if precision in DTYPES:
        return float(DTYPES[precision].itemsize)
    bits, scale = {"fp8": (8, 4), "int8": (8, 4), "nf4": (4, 4), "nvfp4": (4, 1)}[precision]
    return bits / 8 + scale / BLOCKS[precision]


def encode(weight: Tensor, precision: Precision) -> dict[str, Tensor]:
    """``codes`` (uint8, int8 or e4m3) and ``scales`` of the blocks of ``weight``; of nvfp4 also ``scale``, of them all.

    Args:
        weight: of any shape, finite.
        precision: one of ``BLOCKS``.
    """
    block = BLOCKS[precision]
    flat = weight.detach().float().flatten()
    rows = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    largest = rows.abs().amax(dim=1)
    match precision:
        case "int8":
            scales = largest / 127
            codes = (rows / _nonzero(scales)[:, None]).round_().to(torch.int8)
            return {"codes": codes.flatten(), "scales": scales}
        case "fp8":
            scales = largest / FP8_MAX
            codes = (rows / _nonzero(scales)[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
            return {"codes": codes.flatten(), "scales": scales}
        case "nf4":
            codes = _nearest(rows / _nonzero(largest)[:, None], NF4)
            return {"codes": _pack(codes), "scales": largest}
        case "nvfp4":
            scale = largest.amax() / (E2M1[-1] * FP8_MAX)
            scales = (largest / E2M1[-1] / _nonzero(scale)).to(torch.float8_e4m3fn)
            values = rows / _nonzero(scales.float() * scale)[:, None]
            codes = _nearest(values.abs().clamp_(max=E2M1[-1]), E2M1) + 8 * (values < 0)
            return {"codes": _pack(codes), "scales": scales, "scale": scale.reshape(1)}
    raise ValueError(f"precision is {precision!r}; codes and scales have: {', '.join(BLOCKS)}")


def decode(stored: dict[str, Tensor], precision: Precision, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The matrix of ``shape`` that ``encode`` stored, computed in fp32 and returned in ``dtype``."""
    block, scales = BLOCKS[precision], stored["scales"].float()
    if precision in ("int8", "fp8"):
        values = stored["codes"].to(torch.float32).view(-1, block)
    else:
        table = torch.tensor(NF4 if precision == "nf4" else [*E2M1, *(-x for x in E2M1)], device=scales.device)
        # A byte is two codes: one look-up gives both.
        pairs = torch.stack((table[:, None].expand(16, 16), table[None].expand(16, 16)), dim=-1).view(256, 2)
        values = F.embedding(stored["codes"].to(torch.int32), pairs).view(-1, block)
    with coding():
        if precision == "nvfp4":
            scales = scales * stored["scale"]
        values = values.mul_(scales[:, None]) if precision != "int8" else values * scales[:, None]
    return values.flatten()[: shape.numel()].view(shape).to(dtype)


def _nonzero(scales: Tensor) -> Tensor:
    """1 for a block of zeros, whose codes are then zero."""
    return torch.where(scales == 0, 1.0, scales)


def _nearest(values: Tensor, table: tuple[float, ...]) -> Tensor:
    """Indices of the nearest entries of an ascending table."""
    entries = torch.tensor(table, device=values.device)
    return torch.bucketize(values, (entries[1:] + entries[:-1]) / 2)


def _pack(codes: Tensor) -> Tensor:
    """Two 4-bit codes in a byte, the first one high."""
    pairs = codes.to(torch.uint8).view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]
