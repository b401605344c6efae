"""Ctrl-C and SIGTERM at any time: one line, an exit code, no traceback, nothing in part."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stackwise.cli.main import main
from stackwise.data import store
from stackwise.errors import RunError, StoppedBySignal
from stackwise.planning.dry_step import Ledger
from stackwise.signals import stop_if_asked, stoppable
from stackwise.store.activation_cache import ActivationCache
from stackwise.store.state import RunState
from stackwise.training.stage import Stage
from stackwise.training.step import Step, take_step

CONFIG = """
model: {{d_model: 20, n_heads: 2, d_ff: 22, architecture: {{n_stacks: 2, blocks_per_stack: 1}}}}
training: {{batch_size: 3, seq_len: 11, max_steps: 13, device: cpu}}
data: {{source: files, path: {0}/text.txt, cache_dir: {0}/cache, tokenizer: {{kind: characters}}}}
"""
BOTH = pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM], ids=lambda which: which.name)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 90)
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(tmp_path))
    return file


def process(before: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``stackwise ARGUMENTS`` in a process of its own that runs ``before`` first."""
    code = f"import builtins, os, signal\nfrom stackwise.__main__ import run\n{before}\nrun()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


@BOTH
@pytest.mark.parametrize("module", ["typer", "torch"])
def test_a_signal_while_the_process_imports_is_one_line(which: signal.Signals, module: str, config: Path) -> None:
    done = process(
        f"""
real = builtins.__import__
def importing(name, *rest):
    if name == {module!r}:
        os.kill(os.getpid(), {which.value})
    return real(name, *rest)
builtins.__import__ = importing""",
        "train", str(config), "--out", str(config.parent / "run"),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stackwise: interrupted\n")
    assert sorted(path.name for path in config.parent.iterdir()) == ["config.yaml", "text.txt"]


def test_a_second_signal_ends_the_process_at_once_with_a_line(config: Path) -> None:
    run = config.parent / "run"
    done = process(
        """
from stackwise.store.activation_cache import ActivationCache
from stackwise.training import loop
def step(*_):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("still here")
loop.take_step = step""",
        "train", str(config), "--out", str(run),
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"stackwise: stopped at once; stackwise resume {run} continues from the last checkpoint, or from the start"
    )
    assert "Traceback" not in done.stderr
    assert main(["resume", str(run)]) == 0


def signal_inside_torch(which: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends one from where an exception would have to pass through torch's C++: the dry run's 29th operation."""
    inner, calls = Ledger.__torch_dispatch__, 0

    def dispatch(self, *rest, **options):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 29:
            os.kill(os.getpid(), which)
        return inner(self, *rest, **options)

    monkeypatch.setattr(Ledger, "__torch_dispatch__", dispatch)


@BOTH
def test_a_signal_while_the_run_is_planned_leaves_nothing(
    which: signal.Signals, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config.parent / "run"
    with monkeypatch.context() as patch:
        signal_inside_torch(which, patch)
        assert main(["train", str(config), "--out", str(run)]) == 130
    assert capsys.readouterr() == ("", "stackwise: interrupted\n")
    assert not run.exists()


def test_a_signal_while_a_plan_is_made_is_one_line(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signal_inside_torch(signal.SIGINT, monkeypatch)
    assert main(["plan", str(config)]) == 130
    assert capsys.readouterr() == ("", "stackwise: interrupted\n")


def test_a_signal_while_text_is_prepared_leaves_no_token_store(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, scan = config.parent / "run", store._scan

    def scanned(*rest):  # type: ignore[no-untyped-def]
        os.kill(os.getpid(), signal.SIGINT)
        return scan(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_scan", scanned)
        assert main(["train", str(config), "--out", str(run)]) == 3
    assert "stopped by SIGINT" in capsys.readouterr().err
    left = [path for path in (config.parent / "cache").rglob("*") if path.is_file() and path.name != ".lock"]
    assert {path.parent.name for path in left} <= {"hashes"}, "the memo of what a file's content is"
    assert main(["resume", str(run)]) == 0


def test_signals_go_back_to_who_had_them() -> None:
    had = signal.signal(signal.SIGINT, signal.default_int_handler)  # what was started in the background ignores it
    before = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    with stoppable("there is more") as outer, stoppable() as inner:
        assert inner is outer and not outer
        stop_if_asked()
        signal.raise_signal(signal.SIGTERM)
        assert outer.name == "SIGTERM"
        with pytest.raises(StoppedBySignal, match=r"^stopped by SIGTERM; there is more$"):
            stop_if_asked()
        with pytest.raises(KeyboardInterrupt):  # Python's own handler
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)] == before
    stop_if_asked()
    signal.signal(signal.SIGINT, had)


def test_the_last_step_is_taken_before_a_signal_stops_the_run(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config.parent / "run"

    def step(stage: Stage, state: RunState) -> Step:
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(stage, state)

    with monkeypatch.context() as patch:
        patch.setattr("stackwise.training.loop.take_step", step)
        assert main(["train", str(config), "--out", str(run)]) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "stackwise: stopped by SIGINT after step 5; its checkpoint is saved"


def test_a_cache_whose_last_step_was_taken_before_a_kill_is_deleted_by_the_resume(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config.parent / "run"

    def killed(*_: object) -> None:
        raise RunError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(ActivationCache, "clear", killed)
        assert main(["train", str(config), "--recipe", "append-cached", "--out", str(run)]) == 1
    assert list((run / "cache").glob("boundary-*"))
    assert main(["resume", str(run)]) == 0
    assert not list((run / "cache").glob("boundary-*"))
