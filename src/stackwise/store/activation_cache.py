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

import hashlib
import json
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from stackwise.errors import RunError, UserError
from stackwise.ops.boundary import BoundaryLayout
from stackwise.store.boundary_records import FORMAT_VERSION, BoundaryId, DiskRecords, MemoryRecords, Records

_FOLDER_NAME = re.compile(r"boundary-\d+-[0-9a-f]{16}")


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


class CachedBoundary:
    """A complete boundary to read from; ``ActivationCache`` gives it."""

    def __init__(self, boundary: BoundaryId, layout: BoundaryLayout, records: Records) -> None:
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
        self._in_memory: dict[BoundaryId, MemoryRecords] = {}

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

    def _find(self, boundary: BoundaryId) -> MemoryRecords | DiskRecords | None:
        if self.in_memory:
            return self._in_memory.get(boundary)
        return DiskRecords.find(self.folder, boundary, self.layout)

    def _begin(self, boundary: BoundaryId) -> MemoryRecords | DiskRecords:
        if self.in_memory:
            return self._in_memory.setdefault(boundary, MemoryRecords(self.layout))
        return DiskRecords.begin(self.folder, boundary, self.layout)

    def _delete_all_but(self, *kept: BoundaryId) -> None:
        self._in_memory = {boundary: records for boundary, records in self._in_memory.items() if boundary in kept}
        for path in self._folders():
            if path.name not in {boundary.folder_name for boundary in kept}:
                DiskRecords.delete(path)

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
