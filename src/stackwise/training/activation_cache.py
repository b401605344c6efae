"""The activation cache: the hidden state at one boundary, computed once for every batch of a phase.

A Stack that trains reads it, again and again, and the trunk below the boundary need not be there.

B batch, T tokens, C width. A boundary is one folder ``RUN/cache/boundary-<index>-<key>/`` of segment files, each a row
of records of one size (an encoded batch and its CRC-32), and a JSON manifest. A segment is renamed into place when it
is whole, so a file that has its name holds its records. When the next Stack is added the cache rolls: record i of the
next boundary needs only record i of this one, so a segment of this one is deleted as soon as the same segment of the
next is durable. At most one boundary and one segment are on the disk, and a roll that was killed goes on from its last
segment.

Only append over a frozen trunk with repeatable inputs can read from a cache; whether a phase may is not decided here,
and what a boundary depends on is the caller's to name (``cache_key``). A boundary with another key is never read, and a
damaged batch is an error. No pickle, and no memory map: mapped pages count as resident memory.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
import re
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from stackwise.errors import RunError, UserError
from stackwise.training.rundir import TEMPORARY_SUFFIX, sync_directory, write_atomic

FORMAT_VERSION = 1
GROUP = 128
"""Values of a row that share a scale in fp8."""
SEGMENT_BYTES = 1 << 26
"""A segment holds no more than this (or one record), and no more than a 64th of its boundary (or one record)."""
SEGMENTS = 64
CHECKSUM_BYTES = 4
MANIFEST_BYTES = 1024
"""The most a manifest takes."""

_MANIFEST = "manifest.json"
_FOLDER_NAME = re.compile(r"boundary-\d+-[0-9a-f]{16}")


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
    """e4m3 codes and, for each 128 values of a row, a power of two in one byte (E8M0, as in OCP MX, 2310.10537 §5).

    1 + 1/128 bytes a value when C is a multiple of 128; the last group of a row may be shorter. The scale is the least
    power of two that brings the group's largest magnitude to at most 448, e4m3's largest. A code keeps 3 mantissa bits
    whatever the scale, so a scale that is no power of two would not round less; this one makes scaling exact on every
    device, decoding exact in bfloat16 too, and rounding idempotent. With a the group's largest magnitude and s its
    scale, a/448 ≤ s < a/224, the error of x is at most 2⁻⁴|x|, or 2⁻¹⁰·s where |x| < 2⁻⁶·s. A group that holds a NaN
    or an infinity decodes to NaNs. Magnitudes in the last 1/32 below float32's largest may decode to infinity.
    """

    name: str = "fp8"

    def row_parts(self, C: int) -> tuple[tuple[torch.dtype, int], ...]:
        return (torch.float8_e4m3fn, C), (torch.uint8, -(-C // GROUP))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        *rows, C = x.shape
        groups = -(-C // GROUP)
        x = pad(x.detach().float(), (0, groups * GROUP - C)).view(*rows, groups, GROUP)
        bits = x.abs().amax(-1).view(torch.int32) & 0x7FFFFFFF  # 8 bits of exponent, 23 of mantissa
        # 448 = 1.75 · 2⁸; the least normal power of two is 2⁻¹²⁶, which the exponent 1 stands for.
        exponent = ((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000)).clamp(min=1)
        exponent = torch.where(bits >= 0x7F800000, 255, exponent)
        codes = (x / _power_of_two(exponent)).view(*rows, groups * GROUP)[..., :C]
        return codes.to(torch.float8_e4m3fn), exponent.to(torch.uint8)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        codes, exponent = parts
        *rows, C = codes.shape
        groups = exponent.shape[-1]
        x = pad(codes.float(), (0, groups * GROUP - C)).view(*rows, groups, GROUP)
        x = x * _power_of_two(exponent)
        return x.view(*rows, groups * GROUP)[..., :C].to(dtype).contiguous()


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
        raise ValueError(f"no format of a boundary is named {name!r}; there are {', '.join(FORMATS)}")
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


@dataclass(frozen=True)
class BoundaryId:
    """``index``: how many Stacks the hidden state has passed. ``key``: the ``cache_key`` of all it depends on."""

    index: int
    key: str

    def __post_init__(self) -> None:
        if self.index < 0 or not re.fullmatch(r"[0-9a-f]{64}", self.key):
            raise ValueError(f"boundary {self.index} needs a sha256 in hex as its key, not {self.key!r}")

    @property
    def folder_name(self) -> str:
        return f"boundary-{self.index}-{self.key[:16]}"


@dataclass(frozen=True)
class UpstreamPart:
    """The embedding or a Stack that a boundary depends on.

    Attributes:
        weights_sha256: of its weights as they are stored, adapters included (``checkpoints.weights_sha256``).
        precision: how they are stored.
        adapters: (kind, rank, alpha) of each: alpha is in no weight.
    """

    weights_sha256: str
    precision: str
    adapters: tuple[tuple[str, int, float], ...] = ()


def cache_key(
    *,
    upstream: Sequence[UpstreamPart],
    model: Mapping[str, Any],
    data_sha256: str,
    seed: int,
    corruption: Mapping[str, Any],
    layout: BoundaryLayout,
    compute_dtype: str,
    device: str,
) -> str:
    """sha256, in hex, over the canonical JSON of everything that the values at a boundary depend on.

    Args:
        upstream: the embedding and the Stacks before the boundary, in the order in which they run.
        model: the shape of the model that is in no weight (heads, norms, positions): the config's ``model`` section.
        data_sha256: of the tokens (and so of the corpus and the tokenizer).
        seed: of the batches' order.
        corruption: of the objective, all that decides the inputs beside the tokens (masking rates and the like).
        layout: the batches there are, their shape and their format.
        compute_dtype: of the matrix products.
        device: the kind of device that computes them; others round otherwise.
    """
    facts = {
        "version": FORMAT_VERSION,
        "upstream": [asdict(part) for part in upstream],
        "model": model,
        "data_sha256": data_sha256,
        "seed": seed,
        "corruption": corruption,
        "layout": asdict(layout),
        "compute_dtype": compute_dtype,
        "device": device,
    }
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class _Records(Protocol):
    """The payloads of a boundary, appended in order and released in order."""

    @property
    def written(self) -> int:
        """Leading records that survive this process (on the disk) or a failed call (in memory)."""
        ...

    def holds_from(self, start: int) -> bool:
        """Whether the boundary was completed, and its records from the ``start``-th on are still there."""
        ...

    def append(self, payload: Tensor) -> None: ...

    def finish(self) -> None: ...

    def read(self, position: int, pinned: bool) -> Tensor:
        """A payload in memory of its own."""
        ...

    def release(self, before: int) -> None:
        """Lets go of records that lie before the ``before``-th, where that frees something."""
        ...

    @property
    def nbytes(self) -> int: ...


class _MemoryRecords:
    """Payloads in memory."""

    def __init__(self, layout: BoundaryLayout) -> None:
        self._layout = layout
        self._payloads: list[Tensor | None] = []
        self._released = 0

    @property
    def written(self) -> int:
        return len(self._payloads)

    def holds_from(self, start: int) -> bool:
        return self.written == self._layout.count and self._released <= start

    def append(self, payload: Tensor) -> None:
        self._payloads.append(payload)

    def finish(self) -> None:
        pass

    def read(self, position: int, pinned: bool) -> Tensor:
        stored = self._payloads[position]
        assert stored is not None, "a released record is read"
        return torch.empty(stored.shape, dtype=torch.uint8, pin_memory=pinned).copy_(stored)

    def release(self, before: int) -> None:
        for position in range(self._released, before):
            self._payloads[position] = None
        self._released = max(self._released, before)

    @property
    def nbytes(self) -> int:
        return sum(payload.nbytes for payload in self._payloads if payload is not None)


class _DiskRecords:
    """Payloads in segment files."""

    def __init__(self, folder: Path, boundary: BoundaryId, layout: BoundaryLayout, complete: bool) -> None:
        self.folder, self._boundary, self._layout, self._complete = folder, boundary, layout, complete
        self._present = [self._check(segment) for segment in range(layout.segments)]
        self._pending: list[Tensor] = []

    # Finding and making.

    @classmethod
    def find(cls, cache: Path, boundary: BoundaryId, layout: BoundaryLayout) -> Self | None:
        """The boundary as it lies in the folder of the cache; None when it was not begun.

        RunError when what is there is damaged or is another boundary's.
        """
        folder = cache / boundary.folder_name
        path = folder / _MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
            complete = manifest.pop("complete")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunError(f"{path}: cannot be read: {error}; {_advice(folder)}") from error
        if manifest != _facts(boundary, layout) or not isinstance(complete, bool):
            raise RunError(f"{path}: this is another cache than the one to read here; {_advice(folder)}")
        return cls(folder, boundary, layout, complete)

    @classmethod
    def begin(cls, cache: Path, boundary: BoundaryId, layout: BoundaryLayout) -> Self:
        """The boundary to go on writing: as it was left, or empty."""
        found = cls.find(cache, boundary, layout)
        folder = cache / boundary.folder_name
        with _writing(folder):
            if found is not None:
                for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
                    leftover.unlink(missing_ok=True)
                return found
            if folder.exists():  # a killed process made or deleted it half
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            sync_directory(cache)
            made = cls(folder, boundary, layout, complete=False)
            made._write_manifest()
        return made

    @staticmethod
    def delete(folder: Path) -> None:
        """Deletes a boundary; one that was deleted in part is not there."""
        with _writing(folder):
            (folder / _MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder)

    def _path(self, segment: int) -> Path:
        return self.folder / f"segment-{segment:06d}.bin"

    def _check(self, segment: int) -> bool:
        """Whether a segment is there. RunError when its size is wrong."""
        path, expected = self._path(segment), self._layout.records_of(segment) * self._layout.record_bytes
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return False
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror or error}; {_advice(self.folder)}") from error
        if size != expected:
            raise RunError(f"{path} is damaged: it has {size} bytes instead of {expected}; {_advice(self.folder)}")
        return True

    # Records.

    @property
    def written(self) -> int:
        if all(self._present):
            return self._layout.count
        return self._present.index(False) * self._layout.segment_records

    @property
    def nbytes(self) -> int:
        layout = self._layout
        return sum(layout.records_of(s) * layout.record_bytes for s in range(layout.segments) if self._present[s])

    def holds_from(self, start: int) -> bool:
        return self._complete and all(self._present[start // self._layout.segment_records :])

    def append(self, payload: Tensor) -> None:
        self._pending.append(payload)
        start = self.written
        segment = start // self._layout.segment_records
        if len(self._pending) < self._layout.records_of(segment):
            return
        with _writing(self._path(segment)):
            write_atomic(self._path(segment), self._chunks(start))
            sync_directory(self.folder)
        self._present[segment], self._pending = True, []

    def _chunks(self, start: int) -> Iterator[bytes | memoryview]:
        for offset, payload in enumerate(self._pending):
            view = payload.numpy().data
            yield view
            yield self._checksum(start + offset, view)

    def _checksum(self, position: int, payload: memoryview) -> bytes:
        """CRC-32 over the key, the batch's number and the payload: a record of elsewhere is not taken for this one."""
        seed = zlib.crc32(f"{self._boundary.key}:{self._layout.first + position}".encode())
        return zlib.crc32(payload, seed).to_bytes(CHECKSUM_BYTES, "little")

    def finish(self) -> None:
        if not self._complete:
            assert all(self._present), "a boundary is finished before its last record"
            self._complete = True
            with _writing(self.folder):
                self._write_manifest()

    def _write_manifest(self) -> None:
        manifest = {**_facts(self._boundary, self._layout), "complete": self._complete}
        write_atomic(self.folder / _MANIFEST, [json.dumps(manifest, indent=1).encode() + b"\n"])
        sync_directory(self.folder)

    def read(self, position: int, pinned: bool) -> Tensor:
        segment, record = divmod(position, self._layout.segment_records)
        path, size = self._path(segment), self._layout.record_bytes
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        view, at = buffer.numpy().data, 0
        problem = "its content does not match its checksum"
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                while at < size:
                    got = os.preadv(descriptor, [view[at:]], record * size + at)
                    if not got:
                        break
                    at += got
            finally:
                os.close(descriptor)
            if at < size:
                problem = "the file ends too early"
            elif self._checksum(position, view[:-CHECKSUM_BYTES]) == view[-CHECKSUM_BYTES:]:
                return buffer[:-CHECKSUM_BYTES]
        except OSError as error:
            problem = error.strerror or str(error)
        batch = self._layout.first + position
        raise RunError(
            f"{path}: batch {batch} of boundary {self._boundary.index} is damaged: {problem}; {_advice(self.folder)}"
        )

    def release(self, before: int) -> None:
        for segment in range(min(before // self._layout.segment_records, self._layout.segments)):
            if self._present[segment]:
                with _writing(self._path(segment)):
                    self._path(segment).unlink(missing_ok=True)
                self._present[segment] = False


def _facts(boundary: BoundaryId, layout: BoundaryLayout) -> dict[str, Any]:
    """What a manifest says beside whether the boundary is complete."""
    return {
        "version": FORMAT_VERSION,
        "boundary": boundary.index,
        "key": boundary.key,
        "layout": asdict(layout),
        "segment_records": layout.segment_records,
    }


def _advice(folder: Path) -> str:
    return f"delete {folder}, and stackwise resume {folder.parent.parent} computes the boundary again"


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong on the disk into one line."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error


class CachedBoundary:
    """A complete boundary to read from; ``ActivationCache`` gives it."""

    def __init__(self, boundary: BoundaryId, layout: BoundaryLayout, records: _Records) -> None:
        self.boundary, self.layout, self._records = boundary, layout, records

    @property
    def nbytes(self) -> int:
        """Stored bytes, checksums included, the manifest left out."""
        return self._records.nbytes

    def read(self, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """The hidden state (B, T, C) of one batch, in memory of its own.

        It crosses to the device as it is stored and is decoded there. ValueError for a batch the boundary does not
        hold, RunError for a damaged one.
        """
        device = torch.device(device)
        return self._decode(self._payload(batch, device), device, dtype)

    def reader(
        self,
        order: Iterable[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        ahead: int = 2,
    ) -> BoundaryReader:
        """Reads batches in the given order, ``ahead`` of them while the caller computes."""
        return BoundaryReader(self, order, torch.device(device), dtype, ahead)

    def _payload(self, batch: int, device: torch.device) -> Tensor:
        segment, record = self.layout.segment_of(batch)
        return self._records.read(segment * self.layout.segment_records + record, pinned=device.type == "cuda")

    def _decode(self, payload: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        return self.layout.unpack(payload.to(device, non_blocking=True), dtype)


class BoundaryReader(Iterator[Tensor]):
    """Gives the batches of ``order`` while a thread reads and checks the next ``ahead`` ones.

    What goes wrong in the thread is raised by ``next``. ``order`` may have no end. It holds ``ahead`` + 1 batches at
    most, encoded and in pinned memory where the device is cuda, decoded where it is the CPU. ``close`` (or leaving the
    ``with``, or the end of ``order``) ends the thread.
    """

    def __init__(
        self, boundary: CachedBoundary, order: Iterable[int], device: torch.device, dtype: torch.dtype, ahead: int
    ) -> None:
        if ahead < 1:
            raise ValueError(f"ahead is {ahead}; at least one batch must be read ahead")
        self._boundary, self._order, self._device, self._dtype = boundary, iter(order), device, dtype
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="activation-cache")
        self._requested: deque[Future[Tensor]] = deque()
        for _ in range(ahead):
            self._request()

    def _request(self) -> None:
        for batch in self._order:
            self._requested.append(self._thread.submit(self._read, batch))
            return

    def _read(self, batch: int) -> Tensor:
        payload = self._boundary._payload(batch, self._device)
        if self._device.type != "cpu":
            return payload  # the copy to the device belongs on the caller's stream
        return self._boundary._decode(payload, self._device, self._dtype)

    def __next__(self) -> Tensor:
        if not self._requested:
            self.close()
            raise StopIteration
        try:
            read = self._requested.popleft().result()
            self._request()
        except BaseException:
            self.close()
            raise
        return read if self._device.type == "cpu" else self._boundary._decode(read, self._device, self._dtype)

    def close(self) -> None:
        """Ends the thread, and waits until it has. Nothing more is given."""
        self._requested.clear()
        self._order = iter(())
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class ActivationCache:
    """The boundaries of one run, of which one is kept.

    To get boundary k: ``open`` it, else ``roll`` it from an earlier one, else ``fill`` it from the tokens. ``roll`` and
    ``fill`` may be stopped by any exception or kill, and called again go on where they were, a segment at most behind;
    in memory only an exception leaves something to go on from.

    Args:
        folder: ``RUN/cache``; the caller holds the run's lock.
        layout: of every boundary.
        limit_bytes: ``training.cache.max_bytes``; ``None``: no limit but the disk's.
        in_memory: keeps the boundaries, encoded, in memory; nothing is written.
    """

    def __init__(
        self, folder: Path, layout: BoundaryLayout, *, limit_bytes: int | None = None, in_memory: bool = False
    ) -> None:
        self.folder, self.layout, self.limit_bytes, self.in_memory = Path(folder), layout, limit_bytes, in_memory
        self._in_memory: dict[BoundaryId, _MemoryRecords] = {}

    def open(self, boundary: BoundaryId) -> CachedBoundary | None:
        """The boundary when it is there with this key and complete, else None. RunError when it is damaged."""
        records = self._find(boundary)
        return CachedBoundary(boundary, self.layout, records) if records and records.holds_from(0) else None

    def fill(self, boundary: BoundaryId, compute: Callable[[int], Tensor]) -> CachedBoundary:
        """Stores ``compute(batch)`` (B, T, C) of every batch that is not there, ascending; deletes other boundaries.

        UserError, before anything is written or deleted, when there is no room; RunError when a value is not finite or
        the disk fails.
        """
        self._check_room()
        self._delete_all_but(boundary)
        records = self._begin(boundary)
        for position in range(records.written, self.layout.count):
            batch = self.layout.first + position
            records.append(self._packed(boundary, batch, compute(batch)))
        records.finish()
        return CachedBoundary(boundary, self.layout, records)

    def roll(
        self,
        source: BoundaryId,
        target: BoundaryId,
        advance: Callable[[int, Tensor], Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> CachedBoundary | None:
        """Replaces ``source`` by ``target``: stores ``advance(batch, x)`` of every batch that is not there, ascending.

        x and the result are (B, T, C); x is on ``device`` in ``dtype``. None, with nothing changed, when ``source``
        does not hold what ``target`` still needs. Errors as ``fill``'s. Once it has begun, ``source`` cannot be opened:
        save a checkpoint before.
        """
        if source == target:
            raise ValueError(f"boundary {source.index} cannot be rolled onto itself")
        begun, old = self._find(target), self._find(source)
        if begun is not None and begun.holds_from(0):
            self._delete_all_but(target)  # a kill may have left some of the source
            return CachedBoundary(target, self.layout, begun)
        if old is None or not old.holds_from(begun.written if begun else 0):
            return None
        self._check_room()
        self._delete_all_but(source, target)
        new = self._begin(target)
        old.release(new.written)
        missing = self.layout.batches[new.written :]
        with CachedBoundary(source, self.layout, old).reader(missing, device, dtype) as reader:
            for batch, x in zip(missing, reader):
                new.append(self._packed(target, batch, advance(batch, x)))
                old.release(new.written)
        new.finish()
        self._delete_all_but(target)
        return CachedBoundary(target, self.layout, new)

    def clear(self) -> None:
        """Deletes every boundary, whatever its key."""
        self._delete_all_but()

    def _packed(self, boundary: BoundaryId, batch: int, x: Tensor) -> Tensor:
        if not bool(torch.isfinite(x).all()):
            raise RunError(
                f"batch {batch} holds values that are not finite at boundary {boundary.index}: the Stacks before it "
                f"have diverged"
            )
        return self.layout.pack(x)

    # Where the boundaries are.

    def _find(self, boundary: BoundaryId) -> _MemoryRecords | _DiskRecords | None:
        if self.in_memory:
            return self._in_memory.get(boundary)
        return _DiskRecords.find(self.folder, boundary, self.layout)

    def _begin(self, boundary: BoundaryId) -> _MemoryRecords | _DiskRecords:
        if self.in_memory:
            return self._in_memory.setdefault(boundary, _MemoryRecords(self.layout))
        return _DiskRecords.begin(self.folder, boundary, self.layout)

    def _delete_all_but(self, *kept: BoundaryId) -> None:
        self._in_memory = {boundary: records for boundary, records in self._in_memory.items() if boundary in kept}
        for path in self._folders():
            if path.name not in {boundary.folder_name for boundary in kept}:
                _DiskRecords.delete(path)

    def _folders(self) -> list[Path]:
        if self.in_memory or not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if _FOLDER_NAME.fullmatch(path.name)]

    def _check_room(self) -> None:
        """UserError when the limit, or the disk once the boundaries on it are gone, is too small."""
        needed = self.layout.peak_bytes
        what = f"the activation cache needs {needed} bytes for {self.layout.count} batches in {self.layout.format}"
        if self.limit_bytes is not None and needed > self.limit_bytes:
            raise UserError(f"training.cache.max_bytes: {self.limit_bytes} is not enough: {what}")
        if self.in_memory:
            return
        there = sum(file.stat().st_size for folder in self._folders() for file in folder.iterdir())
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        available = shutil.disk_usage(existing).free + there
        if needed > available:
            raise UserError(
                f"training.cache.max_bytes: {what}, but {self.folder} has room for {available}; set it to that or less"
            )
