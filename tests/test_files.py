"""Files and folders are written whole or not at all, with the umask's modes, and never through a link."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stackwise.config.base import StackWiseConfig
from stackwise.data.tokenizers import ByteTokenizer
from stackwise.errors import RunError, UserError
from stackwise.files import (
    append,
    locked,
    new_folder,
    publish,
    remove_leftovers,
    replacing,
    require_free,
    scratch_folder,
    write_atomic,
    write_text_atomic,
)
from stackwise.model.weights import save_weights
from stackwise.runs.run import write_untrained_run
from stackwise.store.checkpoints import CheckpointStore
from stackwise.store.rundir import RunDir

pytestmark = pytest.mark.usefixtures("any_record")

PRECIOUS = "what the user wrote\n"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim.txt"
    path.write_text(PRECIOUS)
    return path


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Links.


def guessable(path: Path) -> list[Path]:
    """Temporary names that a process could be expected to use."""
    pids = range(os.getpid() - 3, os.getpid() + 4)
    return [path.with_name(f".{path.name}.{pid}{end}") for pid in pids for end in ("", ".tmp")]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_atomic(path, [b"own"]),
        lambda path: write_text_atomic(path, "own"),
        lambda path: save_weights(path, {"a": torch.ones(3)}, {}),
        lambda path: RunDir(path.parent).write_summary({"own": 1}),
    ],
)
def test_a_link_where_a_file_or_its_temporary_goes_is_not_written_through(write, tmp_path, victim) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "summary.json"
    for link in (path, *guessable(path)):
        link.symlink_to(victim)
    write(path)
    assert victim.read_text() == PRECIOUS
    assert path.is_file() and not path.is_symlink()


def test_metrics_are_not_appended_through_a_link(tmp_path, victim) -> None:
    run = RunDir.create(tmp_path / "run", "")
    run.metrics.symlink_to(victim)
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written: it is a symbolic link"):
        run.append_metrics({"step": 1})
    os.link(victim, tmp_path / "second")
    run.metrics.unlink()
    (tmp_path / "second").rename(run.metrics)
    run.truncate_metrics(0)  # as every training begins
    run.append_metrics({"step": 1})
    assert victim.read_text() == PRECIOUS
    assert [record["step"] for record in run.read_metrics()] == [1]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_the_lock_is_not_written_through_a_link(link, tmp_path, victim) -> None:
    run = RunDir.create(tmp_path / "run", "")
    (run.path / ".lock").unlink()
    link(victim, run.path / ".lock")
    if link is os.symlink:
        with pytest.raises(UserError, match=r"\.lock: cannot be opened for writing: it is a symbolic link"), run.lock():
            pass
    else:
        with run.lock():
            pass
    assert victim.read_text() == PRECIOUS


def test_a_lock_that_is_no_file_is_refused(tmp_path) -> None:
    run = RunDir.create(tmp_path / "run", "")
    (run.path / ".lock").unlink()
    os.mkfifo(run.path / ".lock")
    with pytest.raises(UserError, match="it is not a regular file"), run.lock():
        pass


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints",
        "checkpoints/objects",
        "cache",
        f"cache/boundary-1-{'b' * 16}",
        "tokenizer",
        "tensorboard",
        "wandb",
    ],
)  # fmt: skip
def test_a_run_with_a_linked_folder_is_not_trained(name, tmp_path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    foreign = elsewhere / f"{'a' * 64}.safetensors"
    foreign.write_text(PRECIOUS)
    run = RunDir.create(tmp_path / "run", "")
    (run.path / name).parent.mkdir(exist_ok=True)
    (run.path / name).symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(UserError, match=f"{name} is a symbolic link; a run writes in its own folder only"), run.lock():
        pass
    assert names(elsewhere) == [foreign.name]


def test_checkpoints_replace_links_and_leave_foreign_files(tmp_path, victim) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
    manifest = store.save(1, {"a": {"w": torch.ones(2)}}, {})
    foreign = [manifest.parent / "objects" / "model.safetensors", manifest.parent / ".notes.1.tmp"]
    for path in foreign:
        path.write_text(PRECIOUS)
    following = manifest.with_name("step-00000002.json")
    for link in (following, *guessable(following)):
        link.symlink_to(victim)
    store.save(2, {"a": {"w": torch.zeros(2)}}, {})
    assert victim.read_text() == PRECIOUS
    assert [path.read_text() for path in foreign] == [PRECIOUS] * 2
    assert CheckpointStore(tmp_path / "checkpoints").load().step == 2


# Modes.


def test_what_is_written_has_the_modes_of_the_umask(tmp_path) -> None:
    before = os.umask(0o027)
    try:
        write_text_atomic(tmp_path / "text", "a")
        save_weights(tmp_path / "weights", {"a": torch.ones(3)}, {})
        append(tmp_path / "lines", b"a\n")
        config = StackWiseConfig.from_dict({"model": {"d_model": 16, "n_heads": 2}})
        write_untrained_run(tmp_path / "run", config, ByteTokenizer(), {"a": {"w": torch.ones(2)}}, [])
    finally:
        os.umask(before)
    for path in (p for p in tmp_path.rglob("*") if "run" not in p.parts[-1:]):
        assert mode(path) == (0o750 if path.is_dir() else 0o640), path
    assert mode(tmp_path / "run") == 0o750


# Files.


def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_leftovers_go_by_name_and_other_files_stay(tmp_path) -> None:
    kept = [".thesis.tex.0123456789abcdef.tmp", "notes.tmp", ".config.yaml.tmp", ".config.yaml.zz.tmp"]
    for name in (*kept, ".config.yaml.0123456789abcdef.tmp", ".config.yaml.71.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / ".tokenizer.0123456789abcdef.tmp").mkdir()
    remove_leftovers(tmp_path, r"config\.yaml|tokenizer")
    assert names(tmp_path) == sorted(kept)


def test_a_lock_whose_file_its_holder_deletes_is_held_by_one_alone(tmp_path) -> None:
    path = tmp_path / "lock"
    with locked(path):
        path.unlink()
        with locked(path), pytest.raises(BlockingIOError), locked(path):
            pass


# Folders.


def test_a_published_folder_is_whole_and_the_second_is_refused(tmp_path) -> None:
    for text, placed in (("first", True), ("second", False)):
        with scratch_folder(tmp_path, "out") as scratch:
            (scratch / "below").mkdir()
            (scratch / "below" / "file").write_text(text)
            assert publish(scratch, tmp_path / "out") is placed
    assert (tmp_path / "out" / "below" / "file").read_text() == "first"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("there", ["nothing", "empty", "full", "file", "link"])
def test_a_new_folder_takes_the_place_of_nothing_and_of_an_empty_one_alone(tmp_path, there) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if there in ("empty", "full"):
        out.mkdir()
    if there == "full":
        (out / "kept").write_text("as it was")
    if there == "file":
        out.write_text("as it was")
    if there == "link":
        out.symlink_to(elsewhere)

    def fill() -> None:
        with new_folder(out) as scratch:
            (scratch / "file").write_text("inside")

    if there in ("nothing", "empty"):
        require_free(out)
        fill()
        assert names(out) == ["file"]
    else:
        with pytest.raises(UserError, match="out: already exists; give a new or an empty folder"):
            require_free(out)
        with pytest.raises((UserError, RunError), match=r"out: (already exists|cannot be written)"):
            fill()
        assert names(elsewhere) == []
        assert {"full": lambda: names(out) == ["kept"], "file": out.is_file, "link": out.is_symlink}[there]()
    assert names(tmp_path) == ["elsewhere", "out"]


def test_a_new_folder_that_is_not_finished_never_appears(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out") as scratch:
        (scratch / "file").write_text("inside")
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_put_in_place_is_an_error(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "key").write_text("a file")
    with pytest.raises(NotADirectoryError):
        publish(tmp_path / "folder", tmp_path / "key")


HOLDER = """
import sys, time
from pathlib import Path
from stackwise.files import scratch_folder
with scratch_folder(Path(sys.argv[1]), "killed") as scratch:
    (scratch / "file").write_text("half")
    print("there", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_leaves_goes_with_the_next_and_a_living_ones_stays(tmp_path) -> None:
    (tmp_path / ".mine.0123456789abcdef.tmp").mkdir()
    (tmp_path / ".mine.0123456789abcdef.tmp" / "file").write_text(PRECIOUS)
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"there\n"
            with scratch_folder(tmp_path, "other"):
                assert sum(name.startswith(".killed.") for name in names(tmp_path)) == 1
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with scratch_folder(tmp_path, "other"):
            pass
        if names(tmp_path) == [".mine.0123456789abcdef.tmp"]:
            break
    assert names(tmp_path) == [".mine.0123456789abcdef.tmp"]
    assert (tmp_path / ".mine.0123456789abcdef.tmp" / "file").read_text() == PRECIOUS


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from stackwise.config.base import StackWiseConfig
from stackwise.data.tokenizers import ByteTokenizer
from stackwise.store import checkpoints
from stackwise.runs.run import write_untrained_run

def parts():
    yield b"half"
    os.kill(os.getpid(), signal.SIGKILL)

checkpoints.serialise = lambda part, tensors: parts()
config = StackWiseConfig.from_dict({"model": {"d_model": 16, "n_heads": 2}})
write_untrained_run(Path(sys.argv[1]), config, ByteTokenizer(), {"a": {"w": torch.ones(2)}}, [])
"""


def test_what_a_killed_import_leaves_goes_with_the_next_under_any_name(tmp_path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "first"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [name.startswith(".first.") for name in names(tmp_path)] == [True]
    config = StackWiseConfig.from_dict({"model": {"d_model": 16, "n_heads": 2}})
    write_untrained_run(tmp_path / "second", config, ByteTokenizer(), {"a": {"w": torch.ones(2)}}, [])
    assert names(tmp_path) == ["second"]
    assert not list((tmp_path / "second").rglob("*.tmp"))


def test_a_removal_that_was_killed_half_way_is_ended_by_the_next(tmp_path, monkeypatch) -> None:
    original, removed = shutil.rmtree, []

    def killed(path, *arguments, **options):
        removed.append(path)
        if len(removed) == 1:
            original(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with scratch_folder(tmp_path, "first") as scratch:
        (scratch / "file").write_text("half")
    monkeypatch.undo()
    assert len(names(tmp_path)) == 1
    with scratch_folder(tmp_path, "second"):
        pass
    assert names(tmp_path) == []
