"""How a boundary, the hidden state between two Stacks, is stored: its formats, and where every byte of it lies.

B batch, T tokens, C width. The activation cache writes it and the planner counts it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from stackwise.errors import allowed
from stackwise.ops.coding import coding

GROUP = 128
"""Values of a row that share a scale in fp8."""
SEGMENT_BYTES = 1 << 26
"""A segment holds no more than this (or one record), and no more than a 64th of its boundary (or one record)."""
SEGMENTS = 64
CHECKSUM_BYTES = 4
MANIFEST_BYTES = 1024
"""The most a manifest takes."""


class BoundaryFormat(Protocol):
    """How the values of a boundary are stored."""

    @property
    def name(self) -> str: ...

    def row_parts(self, C: int) -> tuple[tuple[torch.dtype, int], ...]:
        """(dtype, values) of each part of an encoded row of C values."""
        ...

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts of x (..., C), each (..., its values in a row), on the device of x."""
        ...

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """x (..., C) in ``dtype``; exact for ``float32``, and for ``bfloat16`` unless the format is float32."""
        ...


@dataclass(frozen=True)
class _Cast:
    """Values rounded to one dtype."""

    name: str
    dtype: torch.dtype

    def row_parts(self, C: int) -> tuple[tuple[torch.dtype, int], ...]:
        return ((self.dtype, C),)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.detach().to(self.dtype),)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        return parts[0].to(dtype)


@dataclass(frozen=True)
class _FP8:
    """e4m3 codes and, for each 128 values of a row, a power of two in one byte (E8M0, the scales of MX, 2310.10537).

    1 + 1/128 bytes a value when C is a multiple of 128; the last group of a row may be shorter. The scale is the least
    power of two that brings the group's largest magnitude to at most 448, e4m3's largest. A code keeps 3 mantissa bits
    whatever the scale, so a scale that is no power of two would not round less; this one makes scaling exact on every
    device, decoding exact in bfloat16 too, and rounding idempotent. With a the group's largest magnitude and s its
    scale, a/448 ≤ s < a/224 (or s = 2⁻¹²⁶), the error of x is at most 2⁻⁴|x|, or 2⁻¹⁰·s where |x| < 2⁻⁶·s. A group
    that holds a NaN or an infinity decodes to NaNs. Magnitudes in the last 1/32 below float32's largest may decode to
    infinity.
    """

    name: str = "fp8"

    def row_parts(self, C: int) -> tuple[tuple[torch.dtype, int], ...]:
        return (torch.float8_e4m3fn, C), (torch.uint8, -(-C // GROUP))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        *rows, C = x.shape
        groups = -(-C // GROUP)
        x = pad(x.detach().float(), (0, groups * GROUP - C)).view(*rows, groups, GROUP)
        bits = x.abs().amax(-1).view(torch.int32)  # 8 bits of exponent, 23 of mantissa
        # 448 = 1.75 · 2⁸; the least normal power of two is 2⁻¹²⁶, which the exponent 1 stands for.
        exponent = ((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000)).clamp(min=1)
        exponent = torch.where(bits >= 0x7F800000, 255, exponent)
        with coding():
            scaled = x / _power_of_two(exponent)
        codes = scaled.view(*rows, groups * GROUP)[..., :C]
        return codes.to(torch.float8_e4m3fn), exponent.to(torch.uint8)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        codes, exponent = parts
        *rows, C = codes.shape
        groups = exponent.shape[-1]
        x = pad(_e4m3_values(codes), (0, groups * GROUP - C)).view(*rows, groups, GROUP)
        with coding():
            x = x * _power_of_two(exponent)
        return x.view(*rows, groups * GROUP)[..., :C].to(dtype).contiguous()


def _e4m3_values(codes: Tensor) -> Tensor:
    """``codes.float()``, looked up: five times as fast on CPUs, whose conversion goes value by value."""
    values = torch.arange(256, dtype=torch.uint8, device=codes.device).view(torch.float8_e4m3fn).float()
    return values.index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)


def _power_of_two(exponent: Tensor) -> Tensor:
    """(..., 1) float32 2^(exponent − 127), infinity for 255, put together from bits: ``exp2`` need not be exact."""
    return (exponent.to(torch.int32) << 23).view(torch.float32)[..., None]


FORMATS: dict[str, BoundaryFormat] = {
    fmt.name: fmt for fmt in (_Cast("float32", torch.float32), _Cast("bfloat16", torch.bfloat16), _FP8())
}
"""By the name that ``training.cache.dtype`` gives."""


def boundary_format(name: str) -> BoundaryFormat:
    """ValueError, with the names there are, for another one."""
    if name not in FORMATS:
        raise ValueError(f"format of a cached boundary is {name!r}; {allowed(name, FORMATS)}")
    return FORMATS[name]


def bytes_per_row(format: str, C: int) -> int:
    """Stored bytes of one token at a boundary of width C."""
    return sum(dtype.itemsize * values for dtype, values in boundary_format(format).row_parts(C))


def round_boundary(x: Tensor, format: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """x (..., C) as the cache gives it back; a recomputed boundary that passed through here equals a cached one."""
    fmt = boundary_format(format)
    return fmt.decode(fmt.encode(x), dtype)


@dataclass(frozen=True)
class BoundaryLayout:
    """Where the bytes of a boundary lie; the same for every boundary of a Rack, so that a cache can roll.

    Attributes:
        batch_size, seq_len, width: (B, T, C) of every batch.
        first, count: the batches are numbered first … first + count − 1 (``Phase.examples``).
        format: ``float32``, ``bfloat16`` or ``fp8``.
    """

    batch_size: int
    seq_len: int
    width: int
    first: int
    count: int
    format: str

    def __post_init__(self) -> None:
        boundary_format(self.format)
        if min(self.batch_size, self.seq_len, self.width, self.count) < 1 or self.first < 0:
            raise ValueError(f"a boundary needs batches, rows and columns: {self}")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch_size, self.seq_len, self.width

    @property
    def batches(self) -> range:
        """The numbers of the batches."""
        return range(self.first, self.first + self.count)

    @property
    def payload_bytes(self) -> int:
        """Of one encoded batch."""
        return self.batch_size * self.seq_len * bytes_per_row(self.format, self.width)

    @property
    def record_bytes(self) -> int:
        """Of one batch in its file: the payload and its checksum."""
        return self.payload_bytes + CHECKSUM_BYTES

    @property
    def segment_records(self) -> int:
        """Batches of a segment; the last one of a boundary may hold fewer."""
        return max(1, min(SEGMENT_BYTES // self.record_bytes, -(-self.count // SEGMENTS)))

    @property
    def segments(self) -> int:
        return -(-self.count // self.segment_records)

    @property
    def required_bytes(self) -> int:
        """Of a whole boundary, its manifest left out."""
        return self.count * self.record_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that is on the disk at once: while the cache rolls, a boundary, a segment and two manifests."""
        return self.required_bytes + self.segment_records * self.record_bytes + 2 * MANIFEST_BYTES

    def segment_of(self, batch: int) -> tuple[int, int]:
        """(segment, record in it) of a batch. ValueError for a number that is not one of ``batches``."""
        if batch not in self.batches:
            raise ValueError(f"batch {batch} is none of the {self.count} batches from {self.first} on")
        return divmod(batch - self.first, self.segment_records)

    def records_of(self, segment: int) -> int:
        """How many batches a segment holds."""
        return min(self.segment_records, self.count - segment * self.segment_records)

    def pack(self, x: Tensor) -> Tensor:
        """The payload, (payload_bytes,) uint8 on the CPU, of a batch x (B, T, C). ValueError for another shape."""
        if tuple(x.shape) != self.shape or not x.is_floating_point():
            raise ValueError(f"a batch of this boundary has the shape {self.shape}, not {tuple(x.shape)} of {x.dtype}")
        payload, at = torch.empty(self.payload_bytes, dtype=torch.uint8), 0
        for part in boundary_format(self.format).encode(x):
            payload[at : at + part.nbytes].copy_(part.contiguous().view(torch.uint8).flatten())
            at += part.nbytes
        return payload

    def unpack(self, payload: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """x (B, T, C) in ``dtype`` on the device of the payload."""
        fmt, parts, at = boundary_format(self.format), [], 0
        for part_dtype, values in fmt.row_parts(self.width):
            size = self.batch_size * self.seq_len * values * part_dtype.itemsize
            parts.append(payload[at : at + size].view(part_dtype).view(self.batch_size, self.seq_len, values))
            at += size
        return fmt.decode(parts, dtype)


def largest_count(batch_size: int, seq_len: int, width: int, format: str, limit_bytes: int) -> int:
    """How many batches (B, T, C) a cache of ``limit_bytes`` has room for while it rolls; 0 when not for one."""

    def peak(count: int) -> int:
        return BoundaryLayout(batch_size, seq_len, width, 0, count, format).peak_bytes if count else 0

    record_bytes = BoundaryLayout(batch_size, seq_len, width, 0, 1, format).record_bytes
    return bisect.bisect_right(range(1, limit_bytes // record_bytes + 1), limit_bytes, key=peak)
