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

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise.errors import allowed
from stackwise.kinds import STORAGES
from stackwise.ops.coding import coding

FP8_MAX = 448.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of a 4-bit float with two bits of exponent."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""QLoRA 2305.14314, appendix E."""


class Storage(ABC):
    """A way to store a matrix.

    Attributes:
        names: of the tensors that it stores: ``weight``, or those of codes and scales.
        bytes_per_weight: that a weight of a large matrix takes, its share of the scales included.
    """

    names: tuple[str, ...] = ("codes", "scales")
    bytes_per_weight: float

    @abstractmethod
    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """``names`` → tensors, of a finite ``weight`` of any shape."""

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The matrix of ``shape`` that ``encode`` stored, in ``dtype``; codes are computed with in fp32."""


class Cast(Storage):
    """The weight in a dtype of its own."""

    names = ("weight",)
    dtype: torch.dtype

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight.detach().to(self.dtype)}

    def decode(self, stored: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return stored["weight"].to(dtype)


class Full(Cast):
    dtype, bytes_per_weight = torch.float32, 4


class Half(Cast):
    dtype, bytes_per_weight = torch.float16, 2


class BFloat16(Cast):
    dtype, bytes_per_weight = torch.bfloat16, 2


class Blocks(Storage):
    """Codes, and a scale for every ``block`` of them: a number of fp32, unless ``bytes_per_weight`` says else."""

    block: int

    def rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks in fp32, (blocks, ``block``), and the largest magnitude of each."""
        flat = weight.detach().float().flatten()
        rows = F.pad(flat, (0, -len(flat) % self.block)).view(-1, self.block)
        return rows, rows.abs().amax(dim=1)

    def values(self, codes: Tensor) -> Tensor:
        """(blocks, ``block``) what the codes stand for, in fp32, before the scales."""
        return codes.to(torch.float32).view(-1, self.block)

    def scales(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["scales"].float()

    def scaled(self, values: Tensor, scales: Tensor) -> Tensor:
        return values.mul_(scales)

    def decode(self, stored: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        values = self.values(stored["codes"])
        with coding():
            values = self.scaled(values, self.scales(stored)[:, None])
        return values.flatten()[: shape.numel()].view(shape).to(dtype)


class Int8(Blocks):
    block, bytes_per_weight = 128, 1 + 4 / 128

    def scaled(self, values: Tensor, scales: Tensor) -> Tensor:
        return values * scales

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        rows, largest = self.rows(weight)
        scales = largest / 127
        codes = (rows / _nonzero(scales)[:, None]).round_().to(torch.int8)
        return {"codes": codes.flatten(), "scales": scales}


class Fp8(Blocks):
    block, bytes_per_weight = 128, 1 + 4 / 128

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        rows, largest = self.rows(weight)
        scales = largest / FP8_MAX
        codes = (rows / _nonzero(scales)[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return {"codes": codes.flatten(), "scales": scales}


class FourBits(Blocks):
    """Two codes in a byte; ``table`` says what the 16 codes stand for."""

    table: tuple[float, ...]

    def values(self, codes: Tensor) -> Tensor:
        table = torch.tensor(self.table, device=codes.device)
        # A byte is two codes: one look-up gives both.
        pairs = torch.stack((table[:, None].expand(16, 16), table[None].expand(16, 16)), dim=-1).view(256, 2)
        return F.embedding(codes.to(torch.int32), pairs).view(-1, self.block)


class Nf4(FourBits):
    block, bytes_per_weight, table = 64, 1 / 2 + 4 / 64, NF4

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        rows, largest = self.rows(weight)
        return {"codes": _pack(_nearest(rows / _nonzero(largest)[:, None], NF4)), "scales": largest}


class Nvfp4(FourBits):
    """Its scales are e4m3, times ``scale``, the one of the whole matrix."""

    names = ("codes", "scales", "scale")
    block, bytes_per_weight, table = 16, 1 / 2 + 1 / 16, (*E2M1, *(-x for x in E2M1))

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        rows, largest = self.rows(weight)
        scale = largest.amax() / (E2M1[-1] * FP8_MAX)
        scales = (largest / E2M1[-1] / _nonzero(scale)).to(torch.float8_e4m3fn)
        values = rows / _nonzero(scales.float() * scale)[:, None]
        codes = _nearest(values.abs().clamp_(max=E2M1[-1]), E2M1) + 8 * (values < 0)
        return {"codes": _pack(codes), "scales": scales, "scale": scale.reshape(1)}

    def scales(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["scales"].float() * stored["scale"]


@functools.cache
def storage_of(precision: str) -> Storage:
    """The storage of that name. ValueError, with the names there are, for one that there is not."""
    if precision not in STORAGES:
        raise ValueError(f"precision is {precision!r}; {allowed(precision, STORAGES)}")
    storage: Storage = STORAGES[precision].load()()
    return storage


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
