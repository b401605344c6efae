"""The encoded batches of a cached boundary, a record each: in memory, or in segment files on the disk."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from stackwise.errors import RunError
from stackwise.files import reason, remove_leftovers, sync_directory, write_atomic
from stackwise.ops.boundary import CHECKSUM_BYTES, BoundaryLayout
from stackwise.reading import read_json

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"


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


class Records(Protocol):
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


class MemoryRecords:
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


class DiskRecords:
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
            raise RunError(f"{path}: this cache does not belong to this phase; {_advice(folder)}")
        return cls(folder, boundary, layout)

    @classmethod
    def begin(cls, cache: Path, boundary: BoundaryId, layout: BoundaryLayout) -> Self:
        """The boundary to go on writing: as it was left, or empty."""
        found = cls.find(cache, boundary, layout)
        folder = cache / boundary.folder_name
        with writing(folder):
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
        with writing(folder):
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
        with writing(self._path(segment)):
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
                with writing(self._path(segment)):
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
def writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong on the disk into one line."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {reason(error)}") from error
