"""The run directory: one process trains it, its files are whole or absent, its metrics follow the checkpoint."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from stackwise.errors import RunError, UserError
from stackwise.files import write_text_atomic
from stackwise.store.rundir import RunDir

pytestmark = pytest.mark.usefixtures("any_record")

LOCKER = """
import os, sys, time
from stackwise.store.rundir import RunDir
with RunDir.open(sys.argv[1]).lock():
    if len(sys.argv) > 2 and os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print("locked", flush=True)
    time.sleep(60)
"""


def lines(run: RunDir) -> list[str]:
    return run.metrics.read_text().splitlines()


# Creating and opening.


def test_a_created_run_holds_its_config_and_opens(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "runs" / "first", "model: {}\n# é\n")
    assert run.config.read_text(encoding="utf-8") == "model: {}\n# é\n"
    found = RunDir.open(str(run.path))
    assert found.path == run.path
    names = [p.name for p in (found.checkpoints, found.cache, found.tokenizer, found.metrics, found.summary)]
    assert names == ["checkpoints", "cache", "tokenizer", "metrics.jsonl", "summary.json"]
    assert not found.is_complete()
    assert found.read_metrics() == []


def test_a_folder_that_holds_a_run_is_refused_and_unharmed(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", "a: 1\n")
    with pytest.raises(UserError) as error:
        RunDir.create(tmp_path / "run", "a: 2\n")
    assert str(error.value) == (
        f"{run.path} holds a run; stackwise resume {run.path} continues it, or choose another --out"
    )
    assert run.config.read_text() == "a: 1\n"


def test_a_folder_that_holds_other_files_is_refused_and_unharmed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"not empty and not a run \(it holds 'thesis.tex'\)"):
        RunDir.create(tmp_path, "")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        RunDir.create(tmp_path / "thesis.tex", "")
    with pytest.raises(UserError, match="cannot make this folder: Not a directory"):
        RunDir.create(tmp_path / "thesis.tex" / "run", "")


def test_a_folder_left_by_a_creation_that_was_killed_can_be_used(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("71")
    (tmp_path / ".config.yaml.71.tmp").write_text("mod")
    with pytest.raises(UserError, match=r"is not a run: it has no config\.yaml"):
        RunDir.open(tmp_path)
    assert RunDir.create(tmp_path, "a: 1\n").config.read_text() == "a: 1\n"


def test_opening_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run"):
        RunDir.open(tmp_path / "absent")
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        RunDir.open(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="a file, not a folder"):
        RunDir.open(tmp_path / "config.yaml")


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", ".origin", "checkpoints/newest", "tokenizer/t.json"])
def test_a_run_with_something_that_is_no_file_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    run = RunDir.create(tmp_path / "run", "")
    path = run.path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"{name} is not a regular file"):
        RunDir.open(run.path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{name} is not a regular file"):
        RunDir.open(run.path)
    path.unlink()
    path.symlink_to(tmp_path / "absent")
    RunDir.open(run.path)


# The lock.


def test_a_run_that_another_process_trains_is_refused_until_it_is_killed(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", "")
    # The holder forks a worker, which outlives it: the lock must not.
    with subprocess.Popen([sys.executable, "-c", LOCKER, run.path, "fork"], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
            with pytest.raises(UserError) as error, run.lock():
                pass
            assert str(error.value) == f"{run.path} is being trained by another process (pid {holder.pid})"
            workers = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
            worker = int(workers.read_text()) if workers.exists() else None
        finally:
            holder.kill()
            holder.wait()
    try:
        if worker is not None:
            os.kill(worker, 0)  # still alive
        with run.lock():
            assert (run.path / ".lock").read_text() == str(os.getpid())
    finally:
        if worker is not None:
            os.kill(worker, 9)


def test_the_lock_is_let_go_at_the_end_and_after_an_error(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", "")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), run.lock():
            raise ZeroDivisionError
    with run.lock():
        with pytest.raises(UserError, match="is being trained"), RunDir.open(run.path).lock():
            pass
        with pytest.raises(UserError, match="is being trained"), run.lock():
            pass


def test_a_forked_child_does_not_let_go_of_its_parents_lock(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", "")
    with run.lock():
        child = os.fork()
        if child == 0:
            try:
                with run.lock():
                    os._exit(1)
            except UserError:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(UserError), RunDir.open(run.path).lock():
            pass


def test_a_forked_child_that_leaves_the_block_closes_none_of_its_own_files(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", "")
    lock = run.lock()
    lock.__enter__()
    child = os.fork()
    if child == 0:
        try:
            with open(tmp_path / "own", "w") as file:  # takes the number that the lock's descriptor had
                lock.__exit__(None, None, None)
                file.write("whole")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "own").read_text() == "whole"
    lock.__exit__(None, None, None)


# Metrics.


def test_metrics_come_back_exactly_in_order(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", "")
    records = [{"step": s, "loss": 1 / s, "phase": "a\nb", "mfu": None} for s in (1, 3, 7)]
    for record in records:
        run.append_metrics(record)
        assert run.read_metrics()[-1] == record
    assert run.read_metrics() == records
    assert len(lines(run)) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_metrics_that_are_not_finite_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    run = RunDir.create(tmp_path / "run", "")
    with pytest.raises(RunError, match=rf"step 5: grad_norm is {bad}"):
        run.append_metrics({"step": 5, "grad_norm": bad})
    with pytest.raises(ValueError, match="integer step"):
        run.append_metrics({"loss": 1.0})
    assert run.read_metrics() == []


@pytest.mark.parametrize("torn", ["", '{"step": 4, "lo', '{"step": 4, "loss": 1.0}', "\0\0\0", '{"st\n\0\0\n', "4\n"])
def test_truncating_keeps_whole_lines_up_to_the_step_and_drops_a_torn_end(tmp_path: Path, torn: str) -> None:
    run = RunDir.create(tmp_path / "run", "")
    for step in (1, 2, 2, 3, 5):
        run.append_metrics({"step": step})
    whole = lines(run)
    with open(run.metrics, "a") as file:
        file.write(torn)
    assert [m["step"] for m in run.read_metrics()] == [1, 2, 2, 3, 5]
    run.truncate_metrics(5)
    assert lines(run) == whole
    run.truncate_metrics(2)
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2}\n'
    run.append_metrics({"step": 3})
    assert [m["step"] for m in run.read_metrics()] == [1, 2, 2, 3]
    run.truncate_metrics(0)
    assert run.metrics.read_text() == ""


def test_truncating_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir.create(tmp_path / "run", "")
    run.truncate_metrics(3)
    assert not run.metrics.exists()
    run.append_metrics({"step": 3})
    run.append_metrics({"step": 7})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(RunError, match="the disk is full"):
                run.truncate_metrics(3)
        assert lines(run) == ['{"step": 3}', '{"step": 7}']
    assert not list(run.path.glob("*.tmp")) and not list(run.path.glob(".*.tmp"))


def test_a_damaged_line_before_good_ones_is_named_and_nothing_is_dropped(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", "")
    text = '{"step": 1}\n{"step": 2\n{"step": 3}\n'
    run.metrics.write_text(text)
    for action in (run.read_metrics, lambda: run.truncate_metrics(3)):
        with pytest.raises(RunError, match="line 2 is damaged"):
            action()
    assert run.metrics.read_text() == text


# The summary.


def test_a_summary_comes_back_and_marks_the_run_complete(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", "")
    with pytest.raises(UserError, match=f"has no summary.json.*stackwise resume {run.path}"):
        run.read_summary()
    summary = {"validation": {"loss": 1 / 3}, "tokens": 7, "phases": [{"name": "é", "validation_loss": None}]}
    run.write_summary(summary)
    assert run.is_complete()
    assert run.read_summary() == summary
    json.loads(run.summary.read_text())


def test_a_summary_that_is_not_finite_is_refused_by_key_and_the_run_stays_incomplete(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", "")
    with pytest.raises(RunError, match=r"phases\[1\]\.loss is nan"):
        run.write_summary({"phases": [{"loss": 1.0}, {"loss": float("nan")}]})
    assert not run.is_complete()


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_summary_is_one_line(tmp_path: Path, content: str) -> None:
    run = RunDir.create(tmp_path / "run", "")
    run.summary.write_text(content)
    with pytest.raises(RunError, match=r"summary\.json: cannot be read"):
        run.read_summary()


# Atomic text.


def test_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    mask = os.umask(0o022)
    try:
        write_text_atomic(path, "one é")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match=r"a\.txt: cannot be written: the disk is full"):
        write_text_atomic(path, "two")
    assert path.read_text(encoding="utf-8") == "one é"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
