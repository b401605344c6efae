"""The checkpoint store: exact round trips, and no instant at which a kill or a full disk loses a checkpoint."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import resource
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stackwise.errors import RunError
from stackwise.store import checkpoints
from stackwise.store.checkpoints import CheckpointError, CheckpointStore
from stackwise.store.objects import CODE_DTYPES, DTYPE_CODES, weights_sha256

Parts = dict[str, dict[str, Tensor]]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


def random_parts(seed: int) -> Parts:
    """Two Stacks, a head and an optimizer, all different for each seed."""
    g = torch.Generator().manual_seed(seed)
    parts = {f"stack.{i}": {"up": torch.randn(7, 5, generator=g), "b": torch.randn(3, generator=g)} for i in range(2)}
    parts["head"] = {"weight": torch.randn(11, 5, generator=g).bfloat16()}
    parts["optimizer"] = {"exp_avg": torch.randn(13, generator=g), "step": torch.tensor(float(seed))}
    return parts


def assert_loads(folder: Path, step: int, seed: int) -> None:
    checkpoint = CheckpointStore(folder).load(step)
    assert checkpoint.state == {"seed": seed}
    expected = random_parts(seed)
    assert set(checkpoint.parts) == set(expected)
    for name, tensors in expected.items():
        assert_identical(checkpoint.part(name), tensors)


def objects(folder: Path) -> list[Path]:
    return sorted((folder / "objects").iterdir())


def in_child(function: Callable[[], str]) -> str | None:
    """What ``function`` returns in a forked process; None when that process died before returning."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, function().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return text.decode() if status == 0 else None


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


# Round trips.


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
def test_every_dtype_comes_back_bit_exact_in_any_shape(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 256, (7 * 5 * torch.empty((), dtype=dtype).element_size(),), dtype=torch.uint8)
    if dtype == torch.bool:
        raw %= 2
    matrix = raw.view(dtype).reshape(7, 5)  # random bits: NaNs with payloads and denormals among them
    tensors = {
        "matrix": matrix,
        "scalar": matrix[3, 2],
        "one": matrix[:1, :1],
        "transposed": matrix.t(),
        "strided": matrix[::3, 1],
        "expanded": matrix[2].expand(3, 5),
        "empty": matrix[:0],
    }
    CheckpointStore(tmp_path).save(1, {"part": tensors}, {})
    assert_identical(CheckpointStore(tmp_path).load().part("part"), tensors)


def test_an_object_is_a_safetensors_file_named_by_its_hash(tmp_path: Path) -> None:
    mixed = {
        "flag": torch.tensor(True),
        "half": torch.randn(3).bfloat16(),
        "a b": torch.randn(5),
        "n": torch.arange(7),
        "ü": torch.zeros(2, dtype=torch.int8),
    }
    CheckpointStore(tmp_path).save(1, {"part": mixed, "empty": {}}, {})
    files = objects(tmp_path)
    for path in files:
        assert path.name == hashlib.sha256(path.read_bytes()).hexdigest() + ".safetensors"
        length = int.from_bytes(path.read_bytes()[:8], "little")
        for item in json.loads(path.read_bytes()[8 : 8 + length]).values():
            itemsize = CODE_DTYPES[item["dtype"]].itemsize
            assert (8 + length + item["data_offsets"][0]) % itemsize == 0, "readers that map the file want it aligned"
    read = [load_file(path) for path in files]
    assert {} in read
    assert_identical(next(tensors for tensors in read if tensors), mixed)


def test_tensors_larger_than_a_piece_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stackwise.store.objects.CHUNK_BYTES", 13)
    parts = random_parts(3)
    CheckpointStore(tmp_path).save(1, parts, {"seed": 3})
    assert_loads(tmp_path, 1, seed=3)
    monkeypatch.undo()
    before = objects(tmp_path)
    CheckpointStore(tmp_path).save(2, parts, {"seed": 3})
    assert objects(tmp_path) == before


def test_tensors_that_share_storage_come_back_apart(tmp_path: Path) -> None:
    whole = torch.arange(11.0)
    tensors = {"head": whole, "tied": whole, "slice": whole[3:8]}
    CheckpointStore(tmp_path).save(1, {"part": tensors}, {})
    loaded = CheckpointStore(tmp_path).load().part("part")
    assert_identical(loaded, tensors)
    loaded["head"].zero_()
    assert torch.equal(loaded["tied"], whole)


def test_object_bytes_do_not_depend_on_order_or_strides(tmp_path: Path) -> None:
    a, b = torch.randn(5, 3), torch.randn(7).bfloat16()
    CheckpointStore(tmp_path).save(1, {"x": {"a": a, "b": b}}, {})
    strided = a.t().contiguous().t()
    assert not strided.is_contiguous()
    CheckpointStore(tmp_path).save(2, {"x": {"b": b, "a": torch.nn.Parameter(strided)}}, {})
    assert len(objects(tmp_path)) == 1


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path: Path) -> None:
    value = torch.randn(1009)
    CheckpointStore(tmp_path).save(1, {"x": {"a": value}}, {})
    loaded = CheckpointStore(tmp_path).load().part("x")["a"]
    with open(objects(tmp_path)[0], "r+b") as file:
        file.write(b"\0" * 4000)
    assert torch.equal(loaded, value)


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    state = {
        "floats": [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0],
        "seed": 2**63 - 1,
        "nested": {"none": None, "true": True, "text": "é\n"},
    }
    CheckpointStore(tmp_path).save(1, {}, state)
    loaded = CheckpointStore(tmp_path).load().state
    assert loaded == state
    assert str(loaded["floats"][-1]) == "-0.0"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), (1, 2), {3: 4}])
def test_state_that_json_would_change_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError):
        CheckpointStore(tmp_path / "c").save(1, {}, {"value": value})
    assert not (tmp_path / "c").exists()


def test_a_dtype_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"part\.z: tensors of torch\.complex64 cannot be saved"):
        CheckpointStore(tmp_path).save(1, {"part": {"z": torch.zeros(3, dtype=torch.complex64)}}, {})


def test_one_part_loads_without_reading_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CheckpointStore(tmp_path).save(1, random_parts(2), {"seed": 2})
    checkpoint = CheckpointStore(tmp_path).load()
    read: list[Path] = []
    original = checkpoints.read_safetensors
    monkeypatch.setattr(checkpoints, "read_safetensors", lambda path, entry: read.append(path) or original(path, entry))
    assert "stack.0" in checkpoint.parts and len(checkpoint.parts) == 4
    checkpoint.part("stack.0")
    assert len(read) == 1
    with pytest.raises(KeyError):
        checkpoint.part("stack.9")


# Frozen parts are written once.


def test_a_frozen_part_is_hashed_and_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    frozen, hashed = random_parts(0)["stack.0"], []
    original = checkpoints.hash_part
    monkeypatch.setattr(checkpoints, "hash_part", lambda name, t: hashed.append(name) or original(name, t))
    for step in (1, 2, 3):
        parts = {**random_parts(step), "stack.0": frozen}
        store.save(step, parts, {}, unchanged=["stack.0"] if step > 1 else [])
        if step == 1:
            before = {path: path.stat() for path in objects(tmp_path)}
    assert hashed.count("stack.0") == 1 and hashed.count("stack.1") == 3
    assert len(objects(tmp_path)) == 1 + 3 * 3
    for path, status in before.items():
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (status.st_mtime_ns, status.st_ino)
    for step in (1, 2, 3):
        assert_identical(store.load(step).part("stack.0"), frozen)


def test_a_part_that_is_equal_is_stored_once_without_being_named_unchanged(tmp_path: Path) -> None:
    frozen = random_parts(0)["stack.0"]
    for step in (1, 2):
        copies = {name: tensor.clone() for name, tensor in frozen.items()}
        CheckpointStore(tmp_path).save(step, {"stack.0": copies, "stack.1": copies}, {})
    assert len(objects(tmp_path)) == 1


def test_unchanged_is_taken_on_trust_only_after_this_process_read_the_object(tmp_path: Path) -> None:
    old, other = random_parts(0), random_parts(1)
    CheckpointStore(tmp_path).save(1, old, {})
    unread = CheckpointStore(tmp_path)
    unread.load()
    unread.save(2, other, {}, unchanged=other)
    assert_identical(unread.load(2).part("head"), other["head"])
    read = CheckpointStore(tmp_path)
    read.load(2).part("head")
    read.save(3, old, {}, unchanged=old)  # a caller's untruth, to see which parts were serialised
    assert_identical(read.load(3).part("head"), other["head"])
    assert_identical(read.load(3).part("stack.0"), old["stack.0"])


@pytest.mark.parametrize("harm", ["deleted", "reshaped"])
def test_an_unchanged_part_is_serialised_when_its_object_cannot_be_it(tmp_path: Path, harm: str) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"head": {"w": torch.randn(7, 5)}}, {})
    tensors = {"w": torch.randn(7, 5 if harm == "deleted" else 3)}
    if harm == "deleted":
        objects(tmp_path)[0].unlink()
    store.save(2, {"head": tensors}, {}, unchanged=["head"])
    assert_identical(store.load(2).part("head"), tensors)


def test_a_damaged_object_that_is_saved_again_is_replaced(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(1, random_parts(1), {"seed": 1})
    for path in objects(tmp_path):
        flip_bit(path, 8 * path.stat().st_size - 3)
    CheckpointStore(tmp_path).save(2, random_parts(1), {"seed": 1})
    assert_loads(tmp_path, 2, seed=1)


# Retention.


def test_only_the_newest_checkpoints_and_their_objects_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in range(1, 6):
        store.save(step, random_parts(step), {"seed": step})
        assert store.steps() == [max(1, step - 1), step][-min(step, 2) :]
        assert len(objects(tmp_path)) == 4 * min(step, 2)
    assert_loads(tmp_path, 4, seed=4)
    assert_loads(tmp_path, 5, seed=5)


def test_retention_never_deletes_an_object_that_a_kept_checkpoint_needs(tmp_path: Path) -> None:
    rng = random.Random(0)
    store = CheckpointStore(tmp_path, keep_last=3)
    saved: dict[int, Parts] = {}
    for step in range(1, 30):
        # Few different contents, so that objects are shared, dropped and wanted again.
        saved[step] = {name: random_parts(rng.randrange(3))[name] for name in ("stack.0", "stack.1", "head")}
        store.save(step, saved[step], {})
        named = set()
        for kept in store.steps():
            checkpoint = store.load(kept)
            for name, tensors in saved[kept].items():
                assert_identical(checkpoint.part(name), tensors)
            named |= {entry.sha256 for entry in store._read_manifest(kept).parts.values()}
        assert {path.stem for path in objects(tmp_path)} == named
    assert store.steps() == [27, 28, 29]


def test_half_written_files_are_invisible_and_the_next_save_deletes_them(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(1, random_parts(1), {"seed": 1})
    torn = [tmp_path / ".step-00000002.json.71.tmp", tmp_path / "objects" / f".{'ab' * 32}.safetensors.71.tmp"]
    for path in torn:
        path.write_bytes(b"{")
    assert CheckpointStore(tmp_path).steps() == [1]
    assert CheckpointStore(tmp_path).load().step == 1
    CheckpointStore(tmp_path).save(2, random_parts(2), {"seed": 2})
    assert not any(path.exists() for path in torn)


@pytest.mark.parametrize("damage", [False, True])
def test_a_save_after_going_back_drops_the_checkpoints_of_the_course_left(tmp_path: Path, damage: bool) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (5, 7):
        manifest = store.save(step, random_parts(step), {"seed": step})
    if damage:
        manifest.write_text("{}")
    store.load(5)
    store.save(6, random_parts(6), {"seed": 6})
    assert not manifest.exists()
    assert store.steps() == [5, 6] and len(objects(tmp_path)) == 8
    assert_loads(tmp_path, 6, seed=6)
    assert CheckpointStore(tmp_path).load().step == 6


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    store.save(1, random_parts(1), {"seed": 1})
    manifest = store.save(2, random_parts(2), {"seed": 2})
    manifest.write_bytes(manifest.read_bytes()[:-30])
    store.save(3, random_parts(3), {"seed": 3})
    assert store.steps() == [1, 3]
    assert_loads(tmp_path, 1, seed=1)


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        manifest = CheckpointStore(tmp_path / "c").save(1, random_parts(1), {})
    finally:
        os.umask(mask)
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o644 for p in [manifest, *objects(tmp_path / "c")])


# Damage.


def assert_one_line(error: pytest.ExceptionInfo[CheckpointError], *words: str) -> None:
    message = str(error.value)
    assert isinstance(error.value, RunError)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("part", ["stack.0", "stack.1", "head", "optimizer"])
def test_any_flipped_bit_of_an_object_is_noticed_and_the_older_checkpoint_named(tmp_path: Path, part: str) -> None:
    folder = tmp_path / "run" / "checkpoints"
    store = CheckpointStore(folder)
    for step in (100, 200):
        store.save(step, random_parts(step), {"seed": step})
    path = folder / "objects" / f"{store._read_manifest(200).parts[part].sha256}.safetensors"
    positions = list(range(64)) + random.Random(1).sample(range(64, 8 * path.stat().st_size), 40)
    for position in positions:
        flip_bit(path, position)
        checkpoint = CheckpointStore(folder).load()
        with pytest.raises(CheckpointError) as error:
            checkpoint.part(part)
        assert_one_line(error, "step 200", repr(part), str(path), "does not match its sha256")
        assert_one_line(error, f"the checkpoint of step 100 is intact: stackwise resume {folder.parent} --step 100")
        flip_bit(path, position)
    assert_loads(folder, 200, seed=200)
    assert_loads(folder, 100, seed=100)


def test_a_truncated_or_missing_object_is_noticed_by_load(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, random_parts(1), {"seed": 1})
    store.save(2, random_parts(2), {"seed": 2})
    path = tmp_path / "objects" / f"{store._read_manifest(2).parts['head'].sha256}.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 7)
    with pytest.raises(CheckpointError) as error:
        CheckpointStore(tmp_path).load()
    assert_one_line(error, "step 2", "'head'", f"{size - 7} bytes instead of {size}", "step 1 is intact")
    assert CheckpointStore(tmp_path).steps() == [1]
    path.unlink()
    with pytest.raises(CheckpointError) as error:
        CheckpointStore(tmp_path).load()
    assert_one_line(error, "step 2", "'head'", str(path), "missing", "step 1 is intact")


def test_an_older_checkpoint_is_called_intact_only_when_every_byte_of_it_is(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        store.save(step, random_parts(step), {"seed": step})
    for step in (2, 3):
        flip_bit(tmp_path / "objects" / f"{store._read_manifest(step).parts['optimizer'].sha256}.safetensors", 999)
    with pytest.raises(CheckpointError) as error:
        CheckpointStore(tmp_path).load().part("optimizer")
    assert_one_line(error, "step 3", "step 1 is intact")
    flip_bit(tmp_path / "objects" / f"{store._read_manifest(1).parts['head'].sha256}.safetensors", 999)
    with pytest.raises(CheckpointError) as error:
        CheckpointStore(tmp_path).load().part("optimizer")
    assert_one_line(error, "no other checkpoint is intact")


def test_a_torn_or_edited_manifest_is_noticed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, random_parts(1), {"seed": 1})
    path = store.save(2, random_parts(2), {"seed": 2})
    whole = path.read_bytes()
    torn = [whole[:length] for length in range(0, len(whole) - 2, 17)]
    edited = [whole.replace(b'"seed": 2', b'"seed": 3'), whole.replace(b'"step": 2', b'"step": 1'), b"[]", b"\xff"]
    for content in torn + edited:
        assert content != whole
        path.write_bytes(content)
        assert CheckpointStore(tmp_path).steps() == [1]
        with pytest.raises(CheckpointError) as error:
            CheckpointStore(tmp_path).load()
        assert_one_line(error, "step 2", str(path), "damaged", "step 1 is intact")
    path.write_bytes((tmp_path / "step-00000001.json").read_bytes())
    with pytest.raises(CheckpointError, match="it belongs to step 1"):
        CheckpointStore(tmp_path).load()


def test_a_checkpoint_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        CheckpointStore(tmp_path / "absent").load()
    assert CheckpointStore(tmp_path / "absent").steps() == []
    store = CheckpointStore(tmp_path)
    assert not store.has_any()
    store.save(7, {}, {})
    last = store.save(123456789, {}, {})
    with pytest.raises(CheckpointError, match="no checkpoint of step 8; there are steps 7, 123456789"):
        store.load(8)
    (tmp_path / "step-00000007.json").unlink()
    last.write_text("")
    assert store.has_any() and store.steps() == []


# Kills and failures while saving.

STEPS_OF_A_SAVE = ("replace", "fsync", "unlink")


def at_call(number: int, action: Callable[[], None], patch: pytest.MonkeyPatch) -> list[str]:
    """Runs ``action`` before the ``number``-th of the calls that change the disk; returns the growing list of calls."""
    calls: list[str] = []

    def watch(name: str) -> None:
        original = getattr(os, name)

        def call(*args: object, **options: object) -> object:
            calls.append(name)
            if len(calls) == number:
                action()
            return original(*args, **options)

        patch.setattr(os, name, call)

    for name in STEPS_OF_A_SAVE:
        watch(name)
    return calls


def prepared(folder: Path) -> CheckpointStore:
    store = CheckpointStore(folder, keep_last=2)
    for step in (1, 2):
        store.save(step, random_parts(step), {"seed": step})
    return store


def calls_of_a_save(folder: Path) -> list[str]:
    store = prepared(folder)
    with pytest.MonkeyPatch.context() as patch:
        calls = at_call(0, lambda: None, patch)
        store.save(3, random_parts(3), {"seed": 3})
    return list(calls)


def test_a_kill_at_any_write_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    count = len(calls_of_a_save(tmp_path / "count"))
    assert count >= 5 * 2 + 2 + 1 + 4  # objects and manifest, directories, the old manifest and its objects
    newest = []
    for number in range(1, count + 1):
        folder = tmp_path / str(number)
        store = prepared(folder)

        def killed_save(number: int = number, store: CheckpointStore = store) -> str:
            at_call(number, lambda: os._exit(9), pytest.MonkeyPatch())
            store.save(3, random_parts(3), {"seed": 3})
            return "saved"

        assert in_child(killed_save) is None
        after = CheckpointStore(folder)
        newest.append(after.load().step)
        assert_loads(folder, newest[-1], seed=newest[-1])
        assert_loads(folder, after.steps()[-2], seed=after.steps()[-2])
        after.save(4, random_parts(4), {"seed": 4})
        assert_loads(folder, 4, seed=4)
        assert len(objects(folder)) == 8 and len(list(folder.iterdir())) == 4, "rubbish is left"
    assert newest == sorted(newest) and set(newest) == {2, 3}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failure_at_any_write_is_one_line_and_harms_no_checkpoint(tmp_path: Path, code: int) -> None:
    count = len(calls_of_a_save(tmp_path / "count"))
    for number in range(1, count + 1):
        folder = tmp_path / str(number)
        store = prepared(folder)

        def fail() -> None:
            raise OSError(code, os.strerror(code))

        with pytest.MonkeyPatch.context() as patch:
            at_call(number, fail, patch)
            with pytest.raises(CheckpointError) as error:
                store.save(3, random_parts(3), {"seed": 3})
        if "is saved" in str(error.value):
            assert_one_line(error, "the checkpoint of step 3 is saved, but an older one cannot be deleted")
            assert_loads(folder, 3, seed=3)
        else:
            saved = 3 in store.steps()  # only the last sync failed
            reason = "the disk is full" if code == errno.ENOSPC else os.strerror(code)
            assert_one_line(error, reason, "the checkpoint of step 3", "the checkpoint of step 2 is intact")
            assert len(objects(folder)) == (12 if saved else 8) and not list(folder.rglob(".*"))
            assert_loads(folder, 1, seed=1)
        assert_loads(folder, 2, seed=2)
        store.save(3, random_parts(3), {"seed": 3})  # the same store goes on
        assert_loads(folder, 3, seed=3)


def test_a_file_that_may_not_grow_further_is_one_line_and_harms_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    store = prepared(folder)
    big = {**random_parts(3), "embedding": {"weight": torch.zeros(50021)}}
    needed = sum(checkpoints.hash_part(name, tensors).bytes for name, tensors in big.items())

    def save() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            store.save(3, big, {"seed": 3})
        except CheckpointError as error:
            return str(error)
        return "saved"

    message = in_child(save)
    assert message is not None and "\n" not in message
    start, rest = "the limit on the size of a file is reached: the checkpoint of step 3 needs ", " KiB more"
    found = re.match(start + "(.*)" + rest, message)
    assert found is not None and 150 < float(found[1]) < 250
    assert message.endswith("the checkpoint of step 2 is intact")
    assert 150_000 < needed < 250_000
    assert len(objects(folder)) == 8 and not list(folder.rglob(".*"))
    assert CheckpointStore(folder).steps() == [1, 2]
    assert_loads(folder, 2, seed=2)


def test_the_first_save_that_fails_says_that_nothing_else_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as error:
        CheckpointStore(tmp_path / "file" / "checkpoints").save(1, random_parts(1), {})
    assert_one_line(error, "step 1 cannot be written", "Not a directory", "no other checkpoint is intact")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path) -> None:
    store = prepared(tmp_path)
    (tmp_path / "objects").chmod(0o555)
    try:
        with pytest.raises(CheckpointError) as error:
            store.save(3, random_parts(3), {})
    finally:
        (tmp_path / "objects").chmod(0o755)
    assert_one_line(error, "step 3 cannot be written", "Permission denied", "step 2 is intact")


@pytest.mark.gpu
def test_tensors_of_a_gpu_come_back_to_it(tmp_path: Path) -> None:
    parts = random_parts(1)
    on_gpu = {name: {key: t.cuda() for key, t in tensors.items()} for name, tensors in parts.items()}
    CheckpointStore(tmp_path).save(1, on_gpu, {"seed": 1})
    assert_loads(tmp_path, 1, seed=1)
    loaded = CheckpointStore(tmp_path).load(device="cuda").part("head")["weight"]
    assert loaded.is_cuda and torch.equal(loaded.cpu(), parts["head"]["weight"])
    assert weights_sha256(on_gpu["head"].items()) == weights_sha256(parts["head"].items())


# The hash of all weights.


def test_a_resume_from_the_last_step_deletes_what_a_kill_in_its_save_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    store.save(3, random_parts(3), {"seed": 3})
    store.save(5, random_parts(5), {"seed": 5})
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "_delete_unnamed", lambda self: None)  # killed before it
        store.save(8, random_parts(8), {"seed": 8})
    assert len(objects(tmp_path)) == 3 * 4
    CheckpointStore(tmp_path, keep_last=2).delete_after(8)  # nothing is left to train, so that no save follows
    assert len(objects(tmp_path)) == 2 * 4
    assert_loads(tmp_path, 5, 5)
    assert_loads(tmp_path, 8, 8)


def test_going_back_deletes_what_is_later_and_keeps_the_rest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=3)
    for step in (3, 5, 8):
        store.save(step, random_parts(step), {"seed": step})
    store.delete_after(8)
    assert store.steps() == [3, 5, 8]
    store.delete_after(5)
    assert store.steps() == [3, 5]
    for step in (3, 5):
        assert_loads(tmp_path / "checkpoints", step, step)
    named = {entry for step in (3, 5) for entry in store.load(step).parts}
    assert len(objects(tmp_path / "checkpoints")) == 2 * len(named)


def test_the_weights_hash_changes_with_name_dtype_shape_and_byte_and_with_nothing_else() -> None:
    base = {"a": torch.arange(15.0).reshape(3, 5), "b": torch.zeros(7, dtype=torch.int32), "c": torch.tensor(2.0)}
    flipped = base["a"].clone()
    flipped.view(-1).view(torch.uint8)[37] ^= 1
    different = {
        "name": {"A": base["a"], "b": base["b"], "c": base["c"]},
        "swapped names": {"a": base["a"], "b": base["c"], "c": base["b"]},
        "dtype": {**base, "b": base["b"].view(torch.float32)},
        "shape": {**base, "a": base["a"].reshape(5, 3)},
        "rank": {**base, "c": base["c"].reshape(1)},
        "byte": {**base, "a": flipped},
        "missing": {"a": base["a"], "b": base["b"]},
        "empty one more": {**base, "d": torch.empty(0)},
    }
    digests = {name: weights_sha256(tensors.items()) for name, tensors in different.items()}
    digest = weights_sha256(base.items())
    assert len({digest, *digests.values()}) == 1 + len(different), digests
    strided = base["a"].t().contiguous().t()
    same = [("c", base["c"]), ("b", base["b"].clone()), ("a", torch.nn.Parameter(strided))]
    assert weights_sha256(same) == digest
    assert len(digest) == 64


def test_the_weights_hash_refuses_a_name_twice() -> None:
    with pytest.raises(ValueError, match="'a'"):
        weights_sha256([("a", torch.zeros(2)), ("a", torch.zeros(2))])
