"""The activation cache: exact encodings, keys, budgets, and no instant at which a kill loses or corrupts a boundary."""

from __future__ import annotations

import errno
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise.errors import RunError, UserError
from stackwise.ops import boundary as layouts
from stackwise.ops.boundary import FORMATS, MANIFEST_BYTES, BoundaryLayout, bytes_per_row, round_boundary
from stackwise.store.activation_cache import ActivationCache, BoundaryId, CachedBoundary, UpstreamPart, cache_key

LAYOUT = BoundaryLayout(batch_size=2, seq_len=3, width=131, first=5, count=7, format="bfloat16")
OLD, NEW = BoundaryId(2, "a" * 64), BoundaryId(3, "b" * 64)


@pytest.fixture(autouse=True)
def three_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 7 batches lie in segments of 3, 3 and 1."""
    monkeypatch.setattr(layouts, "SEGMENTS", 3)


def hidden(batch: int) -> Tensor:
    """Values of many magnitudes, other ones for each batch."""
    g = torch.Generator().manual_seed(batch)
    return torch.randn(LAYOUT.shape, generator=g) * torch.exp2(torch.randint(-9, 9, LAYOUT.shape, generator=g))


def advance(batch: int, x: Tensor) -> Tensor:
    """The Stack between the two boundaries."""
    return torch.sin(x) * batch + x.roll(1, -1)


def rolled(batch: int, format: str = "bfloat16") -> Tensor:
    return round_boundary(advance(batch, round_boundary(hidden(batch), format)), format)


def bits(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def assert_holds(cached: CachedBoundary | None, expected: Callable[[int], Tensor]) -> None:
    assert cached is not None
    for batch in cached.layout.batches:
        assert bits(cached.read(batch)) == bits(expected(batch)), batch


def rounded(batch: int) -> Tensor:
    return round_boundary(hidden(batch), "bfloat16")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("activation-cache")]


# Reading and writing.


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_a_read_batch_is_the_rounded_one_bitwise(
    tmp_path: Path, format: str, dtype: torch.dtype, in_memory: bool
) -> None:
    cache = ActivationCache(tmp_path, replace(LAYOUT, format=format), in_memory=in_memory)
    cache.fill(OLD, hidden)
    cached = cache.open(OLD)
    assert cached is not None
    for batch in (11, 5, 8, 5, 6, 10, 9, 7):  # no order is needed
        found = cached.read(batch, dtype=dtype)
        assert found.dtype == dtype
        assert bits(found) == bits(round_boundary(hidden(batch), format, dtype))


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_batch_that_is_changed_by_its_reader_is_not_changed_in_the_cache(tmp_path: Path, in_memory: bool) -> None:
    cached = ActivationCache(tmp_path, replace(LAYOUT, format="float32"), in_memory=in_memory).fill(OLD, hidden)
    cached.read(6).zero_()
    assert_holds(cached, hidden)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_batch_that_its_writer_reuses_is_stored_as_it_was(tmp_path: Path, in_memory: bool) -> None:
    buffer = torch.empty(LAYOUT.shape)
    cache = ActivationCache(tmp_path, replace(LAYOUT, format="float32"), in_memory=in_memory)
    assert_holds(cache.fill(OLD, lambda batch: buffer.copy_(hidden(batch))), hidden)


def test_in_memory_nothing_is_written(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache", LAYOUT, in_memory=True)
    cache.fill(OLD, hidden)
    assert cache.roll(OLD, NEW, advance) is not None
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("batch", [4, 12, -1])
def test_a_batch_that_is_not_of_the_phase_is_refused(tmp_path: Path, batch: int) -> None:
    cached = ActivationCache(tmp_path, LAYOUT).fill(OLD, hidden)
    with pytest.raises(ValueError, match=f"batch {batch} is none of the 7 batches from 5 on"):
        cached.read(batch)


def test_a_batch_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 131\), not \(2, 131, 3\)"):
        ActivationCache(tmp_path, LAYOUT).fill(OLD, lambda batch: hidden(batch).transpose(1, 2))


@pytest.mark.parametrize("format", FORMATS)
def test_a_batch_that_is_not_finite_is_refused(tmp_path: Path, format: str) -> None:
    def diverged(batch: int) -> Tensor:
        return hidden(batch).index_fill(2, torch.tensor(7), math.inf if batch == 6 else 0.0)

    with pytest.raises(RunError, match="batch 6 holds values that are not finite at boundary 2"):
        ActivationCache(tmp_path, replace(LAYOUT, format=format)).fill(OLD, diverged)


# Reading ahead.


def test_a_reader_gives_what_read_gives_in_any_order(tmp_path: Path) -> None:
    cached = ActivationCache(tmp_path, LAYOUT).fill(OLD, hidden)
    order = [7, 11, 7, 5, 6, 6, 10]
    with cached.reader(order, ahead=3) as reader:
        assert [bits(x) for x in reader] == [bits(cached.read(batch)) for batch in order]
    assert not reader_threads()


def test_a_reader_of_an_endless_order_goes_round(tmp_path: Path) -> None:
    cached = ActivationCache(tmp_path, LAYOUT).fill(OLD, hidden)
    with cached.reader(itertools.cycle(LAYOUT.batches)) as reader:
        found = [bits(next(reader)) for _ in range(16)]
    assert found == [bits(rounded(5 + step % 7)) for step in range(16)]


def test_a_reader_reads_its_next_batches_before_they_are_asked_for_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = ActivationCache(tmp_path, LAYOUT).fill(OLD, hidden)
    read, done = [], threading.Semaphore(0)
    original = type(cached._records).read

    def recorded(self: Any, position: int, pinned: bool) -> Tensor:
        payload = original(self, position, pinned)
        assert threading.current_thread() in reader_threads()
        read.append(position)
        done.release()
        return payload

    def wait_for(count: int) -> None:
        for _ in range(count):
            assert done.acquire(timeout=30)
        assert not done.acquire(timeout=0.05)

    monkeypatch.setattr(type(cached._records), "read", recorded)
    with cached.reader([9, 5, 11, 6, 7], ahead=3) as reader:
        wait_for(3)
        assert read == [4, 0, 6]
        assert bits(next(reader)) == bits(rounded(9))
        wait_for(1)
        assert read == [4, 0, 6, 1]


def test_an_error_of_the_reading_thread_is_raised_in_the_caller_and_ends_the_thread(tmp_path: Path) -> None:
    cached = ActivationCache(tmp_path, LAYOUT).fill(OLD, hidden)
    flip(segment_path(tmp_path, OLD, 1), 0)  # batch 8
    reader = cached.reader([5, 8, 6])
    next(reader)
    with pytest.raises(RunError, match="batch 8 of boundary 2 is damaged"):
        next(reader)
    assert not reader_threads()
    assert list(reader) == []


def test_an_error_of_the_order_is_raised_in_the_caller_and_ends_the_thread(tmp_path: Path) -> None:
    def order() -> Iterator[int]:
        yield 5
        yield 6
        raise LookupError("no more")

    reader = ActivationCache(tmp_path, LAYOUT).fill(OLD, hidden).reader(order())
    with pytest.raises(LookupError):
        next(reader)
    assert not reader_threads()


def test_closing_a_reader_early_ends_its_thread(tmp_path: Path) -> None:
    cached = ActivationCache(tmp_path, LAYOUT).fill(OLD, hidden)
    with cached.reader(itertools.cycle(LAYOUT.batches)) as reader:
        next(reader)
        assert len(reader_threads()) == 1
    assert not reader_threads()
    assert next(reader, None) is None


def test_a_reader_reads_at_least_one_batch_ahead(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ahead is 0"):
        ActivationCache(tmp_path, LAYOUT).fill(OLD, hidden).reader([5], ahead=0)
    assert not reader_threads()


@pytest.mark.gpu
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_boundary_made_and_read_on_cuda_is_that_of_the_cpu(tmp_path: Path, format: str, in_memory: bool) -> None:
    cache = ActivationCache(tmp_path, replace(LAYOUT, format=format), in_memory=in_memory)
    cached = cache.fill(OLD, lambda batch: hidden(batch).cuda())
    for dtype in torch.float32, torch.bfloat16:
        with cached.reader(LAYOUT.batches, "cuda", dtype) as reader:
            for batch, x in zip(LAYOUT.batches, reader):
                assert x.is_cuda
                assert bits(x.cpu()) == bits(round_boundary(hidden(batch), format, dtype))
                assert bits(x.cpu()) == bits(round_boundary(hidden(batch).cuda(), format, dtype).cpu())
    assert cached._payload(5, torch.device("cuda")).is_pinned()


# Damage.


def segment_path(cache: Path, boundary: BoundaryId, segment: int) -> Path:
    return cache / boundary.folder_name / f"segment-{segment:06d}.bin"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("offset", [0, LAYOUT.payload_bytes - 1, LAYOUT.payload_bytes, LAYOUT.record_bytes - 1])
def test_a_flipped_bit_is_refused_and_the_message_says_where_and_what_to_do(tmp_path: Path, offset: int) -> None:
    cache = ActivationCache(tmp_path / "cache", LAYOUT)
    cache.fill(OLD, hidden)
    path = segment_path(cache.folder, OLD, 1)
    flip(path, LAYOUT.record_bytes + offset)  # batch 9: the second of segment 1
    cached = cache.open(OLD)
    assert cached is not None
    with pytest.raises(RunError) as error:
        cached.read(9)
    assert str(error.value) == (
        f"{path}: batch 9 of boundary 2 is damaged: its content does not match its checksum; "
        f"delete {path.parent}, and stackwise resume {tmp_path} computes the boundary again"
    )
    for batch in (8, 10):
        assert bits(cached.read(batch)) == bits(rounded(batch))


def test_a_good_record_in_the_wrong_place_is_refused(tmp_path: Path) -> None:
    cached = ActivationCache(tmp_path, LAYOUT).fill(OLD, hidden)
    path, size = segment_path(tmp_path, OLD, 0), LAYOUT.record_bytes
    content = path.read_bytes()
    path.write_bytes(content[size : 2 * size] + content[:size] + content[2 * size :])
    for batch in (5, 6):
        with pytest.raises(RunError, match=f"batch {batch} of boundary 2 is damaged"):
            cached.read(batch)
    assert bits(cached.read(7)) == bits(rounded(7))


def test_a_segment_of_another_key_is_refused(tmp_path: Path) -> None:
    for name, boundary in ("this", OLD), ("other", NEW):
        ActivationCache(tmp_path / name, LAYOUT).fill(boundary, hidden)
    shutil.copy(segment_path(tmp_path / "other", NEW, 2), segment_path(tmp_path / "this", OLD, 2))
    cached = ActivationCache(tmp_path / "this", LAYOUT).open(OLD)
    assert cached is not None
    with pytest.raises(RunError, match="batch 11 of boundary 2 is damaged"):
        cached.read(11)


def test_a_segment_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path, LAYOUT)
    cached = cache.fill(OLD, hidden)
    path = segment_path(tmp_path, OLD, 1)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(RunError, match="batch 10 of boundary 2 is damaged: the file ends too early"):
        cached.read(10)
    for attempt in (lambda: cache.open(OLD), lambda: cache.fill(OLD, hidden), lambda: cache.roll(OLD, NEW, advance)):
        with pytest.raises(RunError, match=f"{path} is damaged: it has .* bytes instead of"):
            attempt()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"complete": true}', b"\xff"])
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    cache = ActivationCache(tmp_path, LAYOUT)
    cache.fill(OLD, hidden)
    path = tmp_path / OLD.folder_name / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=f"{path}: .*delete {path.parent}"):
        cache.open(OLD)


# Keys.


@pytest.mark.parametrize(("index", "key"), [(-1, "a" * 64), (2, "a" * 63), (2, "A" * 64), (2, "../" + "a" * 61)])
def test_a_boundary_is_named_by_its_index_and_a_sha256(index: int, key: str) -> None:
    with pytest.raises(ValueError, match="needs a sha256"):
        BoundaryId(index, key)


FACTS: dict[str, Any] = {
    "upstream": (UpstreamPart("e" * 64, "full"), UpstreamPart("f" * 64, "nf4", (("stack", 7, 11.0, "a" * 64),))),
    "model": {"d_model": 131, "n_heads": 1},
    "data_sha256": "d" * 64,
    "seed": 3,
    "corruption": {"rate": 0.15},
    "layout": LAYOUT,
    "compute_dtype": "float32",
    "device": "cpu",
}


def test_a_key_does_not_depend_on_the_order_of_settings() -> None:
    key = cache_key(**FACTS)
    assert len(key) == 64 and int(key, 16) >= 0
    assert cache_key(**{**FACTS, "model": {"n_heads": 1, "d_model": 131}}) == key


@pytest.mark.parametrize(
    "other",
    [
        {"upstream": FACTS["upstream"][::-1]},
        {"upstream": FACTS["upstream"][:1]},
        {"upstream": (FACTS["upstream"][0], replace(FACTS["upstream"][1], precision="fp8"))},
        {"upstream": (FACTS["upstream"][0], replace(FACTS["upstream"][1], adapters=(("stack", 7, 13.0, "a" * 64),)))},
        {"upstream": (FACTS["upstream"][0], replace(FACTS["upstream"][1], adapters=(("stack", 7, 11.0, "b" * 64),)))},
        {"model": {"d_model": 131, "n_heads": 131}},
        {"data_sha256": "c" * 64},
        {"seed": 5},
        {"corruption": {"rate": 0.16}},
        {"layout": replace(LAYOUT, first=6)},
        {"layout": replace(LAYOUT, count=8)},
        {"layout": replace(LAYOUT, batch_size=3, seq_len=2)},
        {"layout": replace(LAYOUT, format="fp8")},
        {"compute_dtype": "bfloat16"},
        {"device": "cuda"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_key_changes_with_everything_it_depends_on(other: dict[str, Any]) -> None:
    assert cache_key(**{**FACTS, **other}) != cache_key(**FACTS)


def test_a_boundary_with_another_key_or_index_is_not_opened(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path, LAYOUT)
    cache.fill(OLD, hidden)
    assert cache.open(BoundaryId(2, "c" * 64)) is None
    assert cache.open(BoundaryId(3, OLD.key)) is None
    assert_holds(cache.open(OLD), rounded)


def test_a_boundary_under_the_name_of_another_one_is_refused(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path, LAYOUT)
    cache.fill(OLD, hidden)
    near = BoundaryId(2, "a" * 63 + "b")  # the same folder
    with pytest.raises(RunError, match="this cache does not belong to this phase"):
        cache.open(near)
    (tmp_path / OLD.folder_name).rename(tmp_path / NEW.folder_name)
    with pytest.raises(RunError, match="this cache does not belong to this phase"):
        cache.open(NEW)


@pytest.mark.parametrize("change", [{"first": 6}, {"count": 6}, {"batch_size": 3, "seq_len": 2}, {"format": "fp8"}])
def test_a_boundary_of_another_layout_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    ActivationCache(tmp_path, LAYOUT).fill(OLD, hidden)
    with pytest.raises(RunError, match="this cache does not belong to this phase"):
        ActivationCache(tmp_path, replace(LAYOUT, **change)).open(OLD)


# Room.


@pytest.mark.parametrize("format", FORMATS)
def test_required_bytes_are_the_bytes_on_the_disk_beside_the_manifest(tmp_path: Path, format: str) -> None:
    layout = replace(LAYOUT, format=format)
    cached = ActivationCache(tmp_path, layout).fill(OLD, hidden)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / OLD.folder_name).iterdir()}
    manifest = sizes.pop("manifest.json")
    assert manifest <= MANIFEST_BYTES
    assert len(sizes) == layout.segments == 3
    assert sum(sizes.values()) == layout.required_bytes == cached.nbytes
    assert layout.required_bytes == 7 * (2 * 3 * bytes_per_row(format, 131) + 4)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_limit_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path, in_memory: bool) -> None:
    needed = LAYOUT.peak_bytes
    cache = ActivationCache(tmp_path / "cache", LAYOUT, limit_bytes=needed - 1, in_memory=in_memory)
    with pytest.raises(UserError) as error:
        cache.fill(OLD, hidden)
    assert str(error.value) == (
        f"training.cache.max_bytes: {needed - 1} is not enough: the activation cache needs {needed} bytes "
        f"for 7 batches in bfloat16"
    )
    assert not (tmp_path / "cache").exists()
    cache.limit_bytes = needed
    cache.fill(OLD, hidden)
    cache.limit_bytes = needed - 1
    with pytest.raises(UserError):
        cache.fill(NEW, hidden)
    assert_holds(cache.open(OLD), rounded)


def test_a_disk_without_room_is_refused_before_anything_is_written_or_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 0
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    cache = ActivationCache(tmp_path / "cache", LAYOUT)
    free = LAYOUT.peak_bytes - 1
    with pytest.raises(UserError, match=f"needs {LAYOUT.peak_bytes} bytes .* has room for {free}"):
        cache.fill(OLD, hidden)
    assert not (tmp_path / "cache").exists()
    free = LAYOUT.peak_bytes
    cache.fill(OLD, hidden)
    before = files(tmp_path)
    free = 0  # what the boundary takes is room for the next one, but for a segment
    with pytest.raises(UserError, match="has room for"):
        cache.roll(OLD, NEW, advance)
    assert files(tmp_path) == before
    free = LAYOUT.peak_bytes - LAYOUT.required_bytes
    assert_holds(cache.roll(OLD, NEW, advance), rolled)


def test_a_full_disk_is_an_error_in_one_line_and_the_roll_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ActivationCache(tmp_path, LAYOUT)
    cache.fill(OLD, hidden)
    with monkeypatch.context() as full:
        calls = itertools.count()

        def fsync(descriptor: int) -> None:
            if next(calls) >= 6:
                raise OSError(errno.ENOSPC, "No space left on device")

        full.setattr(os, "fsync", fsync)
        with pytest.raises(RunError, match=r"segment-000001.bin: cannot be written: the disk is full$"):
            cache.roll(OLD, NEW, advance)
    assert not list(tmp_path.rglob("*.tmp"))
    assert_holds(cache.roll(OLD, NEW, advance), rolled)


# Rolling.


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_roll_gives_the_boundary_that_is_computed_from_the_rounded_one_and_drops_the_old(
    tmp_path: Path, format: str, in_memory: bool
) -> None:
    cache = ActivationCache(tmp_path, replace(LAYOUT, format=format), in_memory=in_memory)
    cache.fill(OLD, hidden)
    assert_holds(cache.roll(OLD, NEW, advance), lambda batch: rolled(batch, format))
    assert cache.open(OLD) is None
    assert_holds(cache.open(NEW), lambda batch: rolled(batch, format))
    if not in_memory:
        assert [path.name for path in tmp_path.iterdir()] == [NEW.folder_name]


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_roll_without_its_source_changes_nothing(tmp_path: Path, in_memory: bool) -> None:
    cache = ActivationCache(tmp_path, LAYOUT, in_memory=in_memory)
    cache.fill(OLD, hidden)
    before = files(tmp_path)
    assert cache.roll(BoundaryId(2, "c" * 64), NEW, advance) is None
    assert files(tmp_path) == before
    assert_holds(cache.open(OLD), rounded)


def test_a_boundary_is_not_rolled_onto_itself(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path, LAYOUT)
    cache.fill(OLD, hidden)
    with pytest.raises(ValueError, match="onto itself"):
        cache.roll(OLD, OLD, advance)
    assert_holds(cache.open(OLD), rounded)


def test_a_boundary_that_was_not_filled_to_its_end_is_neither_opened_nor_rolled(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path, LAYOUT)
    with pytest.raises(Interrupted):
        cache.fill(OLD, interrupted_at(11, lambda batch: hidden(batch)))
    assert cache.open(OLD) is None
    assert cache.roll(OLD, NEW, advance) is None


@pytest.mark.parametrize("in_memory", [False, True])
def test_filling_deletes_other_boundaries_and_nothing_else(tmp_path: Path, in_memory: bool) -> None:
    cache = ActivationCache(tmp_path, LAYOUT, in_memory=in_memory)
    cache.fill(OLD, hidden)
    (tmp_path / "boundary-notes").mkdir()
    (tmp_path / "boundary-notes" / "mine.txt").write_text("kept")
    cache.fill(NEW, hidden)
    assert cache.open(OLD) is None
    assert_holds(cache.open(NEW), rounded)
    cache.clear()
    assert cache.open(NEW) is None
    assert files(tmp_path) == {"boundary-notes/mine.txt": b"kept"}


class Interrupted(BaseException):
    """Neither an error of ours nor an Exception."""


def interrupted_at(stop: int, compute: Callable[..., Tensor], calls: list[int] | None = None) -> Callable[..., Tensor]:
    def function(batch: int, *x: Tensor) -> Tensor:
        if batch == stop:
            raise Interrupted
        if calls is not None:
            calls.append(batch)
        return compute(batch, *x)

    return function


@pytest.mark.parametrize("stop", LAYOUT.batches)
@pytest.mark.parametrize("in_memory", [False, True])
def test_an_interrupted_fill_or_roll_goes_on_from_its_last_whole_segment(
    tmp_path: Path, stop: int, in_memory: bool
) -> None:
    cache = ActivationCache(tmp_path, LAYOUT, in_memory=in_memory)
    whole = stop if in_memory else 5 + (stop - 5) // 3 * 3
    with pytest.raises(Interrupted):
        cache.fill(OLD, interrupted_at(stop, hidden))
    calls: list[int] = []
    assert_holds(cache.fill(OLD, interrupted_at(-1, hidden, calls)), rounded)
    assert calls == list(range(whole, 12))
    with pytest.raises(Interrupted):
        cache.roll(OLD, NEW, interrupted_at(stop, advance))
    assert not reader_threads()
    assert cache.open(NEW) is None
    if whole > 5:
        assert cache.open(OLD) is None
    calls.clear()
    assert_holds(cache.roll(OLD, NEW, interrupted_at(-1, advance, calls)), rolled)
    assert calls == list(range(whole, 12))


def test_a_fill_takes_over_from_a_roll_whose_source_is_lost(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path, LAYOUT)
    cache.fill(OLD, hidden)
    with pytest.raises(Interrupted):
        cache.roll(OLD, NEW, interrupted_at(9, advance))
    shutil.rmtree(tmp_path / OLD.folder_name)
    assert cache.roll(OLD, NEW, advance) is None
    calls: list[int] = []
    assert_holds(cache.fill(NEW, interrupted_at(-1, rolled, calls)), rolled)
    assert calls == [8, 9, 10, 11]


class Disk:
    """Counts the calls that change the disk, and from the ``deadly``-th on lets none of them happen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.calls, self.deadly, self.folder, self.peak_bytes = 0, sys.maxsize, folder, 0
        for name in "replace", "fsync", "unlink", "rmdir", "mkdir":
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.peak_bytes = max(self.peak_bytes, sum(len(content) for content in files(self.folder).values()))
            self.calls += 1
            if self.calls >= self.deadly:
                raise Interrupted
            return function(*args, **options)

        return call


def fill_old(cache: ActivationCache) -> CachedBoundary | None:
    return cache.fill(OLD, hidden)


def roll_to_new(cache: ActivationCache) -> CachedBoundary | None:
    return cache.roll(OLD, NEW, advance)


@pytest.mark.parametrize(
    ("before", "work", "expected"), [(None, fill_old, rounded), (fill_old, roll_to_new, rolled)], ids=["fill", "roll"]
)
def test_a_kill_at_any_instant_loses_nothing_and_takes_no_more_room(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[ActivationCache], object] | None,
    work: Callable[[ActivationCache], CachedBoundary | None],
    expected: Callable[[int], Tensor],
) -> None:
    disk = Disk(monkeypatch, tmp_path)
    cache = ActivationCache(tmp_path, LAYOUT)
    for deadly in itertools.count(1):
        cache.clear()
        if before:
            before(cache)
        disk.calls, disk.deadly = 0, deadly
        try:
            work(cache)
        except Interrupted:
            disk.deadly = sys.maxsize
            cached = work(ActivationCache(tmp_path, LAYOUT))
            assert_holds(cached, expected)
            assert cached is not None
            assert [path.name for path in tmp_path.iterdir()] == [cached.boundary.folder_name]
        else:
            break
    assert deadly > 10, "the calls that change the disk are not counted"
    assert disk.peak_bytes <= LAYOUT.peak_bytes


def test_a_roll_never_takes_more_than_a_boundary_and_a_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, tmp_path)
    cache = ActivationCache(tmp_path, LAYOUT, limit_bytes=LAYOUT.peak_bytes)
    cache.fill(OLD, hidden)
    cache.roll(OLD, NEW, advance)
    least = LAYOUT.required_bytes + LAYOUT.segment_records * LAYOUT.record_bytes
    assert least <= disk.peak_bytes <= LAYOUT.peak_bytes


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from stackwise.ops import boundary
from stackwise.ops.boundary import BoundaryLayout
from stackwise.store.activation_cache import ActivationCache, BoundaryId
boundary.SEGMENTS = 3
layout = BoundaryLayout(2, 3, 131, 5, 7, "bfloat16")
def advance(batch, x):
    if batch == 10:
        segment = Path(sys.argv[1], "boundary-3-" + "b" * 16, ".segment-000001.bin.1.tmp")
        segment.write_bytes(b"torn")
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.sin(x) * batch + x.roll(1, -1)
ActivationCache(Path(sys.argv[1]), layout).roll(BoundaryId(2, "a" * 64), BoundaryId(3, "b" * 64), advance)
"""


def test_a_killed_process_leaves_a_roll_that_goes_on_exactly(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path, LAYOUT)
    cache.fill(OLD, hidden)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert cache.open(OLD) is None and cache.open(NEW) is None
    calls: list[int] = []
    assert_holds(cache.roll(OLD, NEW, interrupted_at(-1, advance, calls)), rolled)
    assert calls == [8, 9, 10, 11]
    assert not list(tmp_path.rglob("*.tmp"))
