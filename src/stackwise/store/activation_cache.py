"""The activation cache: the hidden state at one boundary, computed once for every batch of a phase.

A Stack that trains reads it, again and again, and the trunk below the boundary need not be there.

B batch, T tokens, C width. A boundary is one folder ``RUN/cache/boundary-<index>-<key>/`` of segment files, each a row
of records of one size (an encoded batch and its CRC-32), and a JSON manifest that says whose they are. A segment is
renamed into place when it is whole, so a boundary is complete when all its segments are there. When the next Stack is
added the cache rolls: record i of the next boundary needs only record i of this one, so a segment of this one is
deleted as soon as the same segment of the next is durable. At most one boundary and one segment are on the disk, and a
roll that was killed goes on from its last segment.

Only append over a frozen trunk with repeatable inputs can read from a cache; whether a phase may is not decided here,
and what a boundary depends on is the caller's to name (``cache_key``). A boundary with another key is never read, and a
damaged batch is an error. No pickle, and no memory map: mapped pages count as resident memory.
"""

from __future__ import annotations

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

from stackwise.errors import RunError, UserError
from stackwise.files import remove_leftovers, sync_directory, write_atomic
from stackwise.ops.boundary import CHECKSUM_BYTES, BoundaryLayout
from stackwise.reading import read_json

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_FOLDER_NAME = re.compile(r"boundary-\d+-[0-9a-f]{16}")


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
        weights_sha256: of its weights as they are stored, without adapters (``checkpoints.weights_sha256``).
        precision: how they are stored.
        adapters: (kind, rank, alpha, sha256 of its factors) of each: alpha is in no weight.
    """

    weights_sha256: str
    precision: str
    adapters: tuple[tuple[str, int, float, str], ...] = ()


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
        """Whether the records from the ``start``-th to the last one are there."""
        ...

    def append(self, payload: Tensor) -> None: ...

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

    def __init__(self, folder: Path, boundary: BoundaryId, layout: BoundaryLayout) -> None:
        self.folder, self._boundary, self._layout = folder, boundary, layout
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
            manifest = read_json(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot be read: {error}; {_advice(folder)}") from error
        if manifest != _facts(boundary, layout):
            raise RunError(f"{path}: this is another cache than the one to read here; {_advice(folder)}")
        return cls(folder, boundary, layout)

    @classmethod
    def begin(cls, cache: Path, boundary: BoundaryId, layout: BoundaryLayout) -> Self:
        """The boundary to go on writing: as it was left, or empty."""
        found = cls.find(cache, boundary, layout)
        folder = cache / boundary.folder_name
        with _writing(folder):
            if found is not None:
                remove_leftovers(folder, r"segment-\d{6,}\.bin")
                return found
            if folder.exists():  # a killed process had begun to make or to delete it
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            sync_directory(cache)
            manifest = json.dumps(_facts(boundary, layout), indent=1)
            write_atomic(folder / _MANIFEST, [manifest.encode() + b"\n"])
            sync_directory(folder)
        return cls(folder, boundary, layout)

    @staticmethod
    def delete(folder: Path) -> None:
        with _writing(folder):
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
        return all(self._present[start // self._layout.segment_records :])

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
    """What a manifest says."""
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
