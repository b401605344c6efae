"""Runs that are killed, stopped, damaged and resumed, in processes of their own.

The claim: after SIGKILL at any instant, resuming gives bit for bit what an uninterrupted run gives.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.cli.main import main
from stackwise.errors import RunError

LIMIT = 240
"""Seconds that one process may take on a busy machine."""
CONFIG = """
model: {d_model: 16, n_heads: 2, d_ff: 40, dropout: 0.1, architecture: {n_stacks: 3, blocks_per_stack: 1}}
training:
  batch_size: 5
  seq_len: 17
  max_steps: 53
  progressive: {trunk_strategy: frozen, joint_fraction: 0.25, new_stack_init: copy, optimizer_state: copy}
  schedule: {warmup_steps: 3, rewarmup_steps: 2}
  checkpoint: {every_steps: 3}
  evaluation: {max_tokens: 340}
  logging: {every_steps: 1}
  device: cpu
data: {source: files, tokenizer: {kind: bpe, vocab_size: 307}}
"""
pytestmark = pytest.mark.timeout(900)
SAME = ("step", "phase", "stack", "tokens", "loss", "lr", "grad_norm", "flops", "validation_loss")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``config.yaml`` and the text that it trains on."""
    folder = tmp_path_factory.mktemp("work")
    draw = random.Random(11)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 7))) for _ in range(400)]
    (folder / "texts").mkdir()
    for i in range(31):
        (folder / "texts" / f"{i:02}.txt").write_text(" ".join(draw.choices(words, k=1500)))
    (folder / "config.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(work: Path) -> Path:
    """A run that nothing happened to."""
    process = start(work, "uninterrupted")
    assert process.wait(LIMIT) == 0, process.stderr.read() if process.stderr else ""
    return work / "uninterrupted"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The threads that the other processes have: sums of floats depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(work: Path, name: str) -> subprocess.Popen[str]:
    """Goes on with the run ``name`` if there is one, else starts it. Each run has a token store of its own."""
    run = work / name
    if (run / "config.yaml").exists():
        arguments = ["resume", str(run)]
    else:
        settings = [f"data.path={work / 'texts'}", f"data.cache_dir={work / (name + '-cache')}"]
        arguments = ["train", str(work / "config.yaml"), *settings, "--out", str(run)]
    return subprocess.Popen(
        [sys.executable, "-m", "stackwise", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def outcome(run: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on what happened to it: weights, moments, losses, records."""
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    newest = json.loads(max((run / "checkpoints").glob("step-*.json")).read_text())
    clock = {"seconds", "peak_memory_bytes"}
    return {
        "weights": summary["weights_sha256"],
        "validation": summary["validation"],
        "totals": [summary["tokens"], summary["flops"]],
        "phases": [{k: v for k, v in phase.items() if k not in clock} for phase in summary["phases"]],
        "metrics": [{key: line.get(key) for key in SAME} for line in lines],
        "objects": newest["parts"],  # the optimizer's among them
    }


@pytest.mark.skipif(sys.platform != "linux", reason="the harness reads /proc")
def test_work_hit_at_random_instants_ends_as_if_undisturbed(tmp_path: Path) -> None:
    harness = Path(__file__).parent / "kill" / "harness.py"
    kinds = ["append", "cached", "import"]
    command = [str(harness), "--kills", "6", "--signals", "3", "--kinds", ",".join(kinds), "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["kinds"] == len(kinds) and summary["kills"] >= 6 and summary["signals"] >= 3
    assert [summary[word] for word in ("different", "orphans", "leftovers", "traceback", "refused")] == [0] * 5


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_3_and_resume_goes_on_exactly(
    which: signal.Signals, work: Path, uninterrupted: Path, one_thread: None
) -> None:
    run = work / which.name
    process = start(work, run.name)
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 10):
        time.sleep(0.002)
    process.send_signal(which)
    _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 3, said
    steps = len(metrics.read_text().splitlines())
    assert 10 <= steps < 53
    assert said.splitlines()[-1] == f"stackwise: stopped by {which.name} after step {steps}; its checkpoint is saved"
    assert (run / "checkpoints" / f"step-{steps:08}.json").exists()
    assert not (run / "summary.json").exists()
    assert main(["resume", str(run)]) == 0
    assert outcome(run) == outcome(uninterrupted)


@pytest.fixture
def finished(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of the uninterrupted run that a test may spoil."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "run"))


def newest_steps(run: Path) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in (run / "checkpoints").glob("step-*.json"))


def test_resuming_from_an_earlier_step_takes_the_same_course_again(
    finished: Path, uninterrupted: Path, one_thread: None
) -> None:
    *_, earlier, last = newest_steps(finished)
    assert earlier < last == 53
    assert main(["resume", str(finished), "--step", str(earlier)]) == 0
    assert outcome(finished) == outcome(uninterrupted)


def test_a_run_that_goes_back_and_fails_at_once_is_not_complete_and_goes_on_from_there(
    finished: Path, uninterrupted: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, earlier, _ = newest_steps(finished)

    def fail(*_: object) -> None:
        raise RunError("no step was taken")

    with monkeypatch.context() as patch:
        patch.setattr("stackwise.training.loop.take_step", fail)
        assert main(["resume", str(finished), "--step", str(earlier)]) == 1
    assert not (finished / "summary.json").exists()
    assert newest_steps(finished)[-1] == earlier
    assert len((finished / "metrics.jsonl").read_text().splitlines()) == earlier
    assert main(["resume", str(finished)]) == 0
    assert outcome(finished) == outcome(uninterrupted)


def test_resuming_a_complete_run_changes_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def files() -> dict[str, bytes]:
        return {str(p.relative_to(finished)): p.read_bytes() for p in finished.rglob("*") if p.is_file()}

    before = files()
    assert main(["resume", str(finished), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads(before["summary.json"])
    assert said.err == f"{finished} is complete; nothing to do\n"
    assert files() == before


def test_a_damaged_newest_checkpoint_is_one_line_and_the_one_before_it_serves(
    finished: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    *_, earlier, last = newest_steps(finished)
    (finished / "summary.json").unlink()
    manifest = json.loads((finished / "checkpoints" / f"step-{last:08}.json").read_text())
    damaged = finished / "checkpoints" / "objects" / f"{manifest['parts']['stack.2']['object']}.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert main(["resume", str(finished)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"stackwise: the checkpoint of step {last} is damaged") and f"--step {earlier}" in error
    assert main(["resume", str(finished), "--step", str(earlier)]) == 0
    assert outcome(finished) == outcome(uninterrupted)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def compare(work: Path, out: Path) -> list[str]:
    """The arguments of a comparison of two recipes in ``out``."""
    settings = [f"data.path={work / 'texts'}", f"data.cache_dir={work / 'compare-cache'}", "training.max_steps=11"]
    recipes = ["--recipes", "append-frozen,end-to-end", "--seeds", "2", "--jobs", "2"]
    return ["compare", str(work / "config.yaml"), *settings, *recipes, "--json", "--out", str(out)]


CLOCK = {"seconds", "wall_seconds", "peak_memory_bytes", "verdict"}


def table(value: Any) -> Any:
    """What a comparison says, without times, memory and the sentence that names memory."""
    if isinstance(value, dict):
        return {key: table(child) for key, child in value.items() if key not in CLOCK}
    return [table(child) for child in value] if isinstance(value, list) else value


@pytest.mark.slow  # kills of compare are also in `make kill`
def test_compare_stops_with_its_child_and_goes_on_to_the_same_table(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = work / "compared"

    def until(run: str, steps: int) -> tuple[subprocess.Popen[str], list[int]]:
        """A comparison that has taken some steps of ``run``, and its children, two at a time."""
        metrics = out / run / "metrics.jsonl"
        process = subprocess.Popen(
            [sys.executable, "-m", "stackwise", *compare(work, out)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= steps):
            time.sleep(0.002)
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as children:
            return process, [int(child) for child in children.read().split()]

    process, children = until("append-frozen-seed-0", 3)
    assert len(children) == 2
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 3, errors
    assert not any(map(alive, children))
    assert errors.splitlines()[-1] == "stackwise: stopped by SIGTERM; the same command continues it"
    assert "append-frozen, seed 0: stackwise: stopped by SIGTERM after step" in errors
    stopped = len((out / "append-frozen-seed-0" / "metrics.jsonl").read_text().splitlines())
    assert (out / "append-frozen-seed-0" / "checkpoints" / f"step-{stopped:08}.json").exists()

    process, children = until("append-frozen-seed-1", 2)
    assert (out / "append-frozen-seed-0" / "summary.json").exists()
    process.kill()
    process.communicate(timeout=LIMIT)
    deadline = time.monotonic() + 10
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, children))
    assert not (out / "append-frozen-seed-1" / "summary.json").exists()

    tables = []
    for folder in (out, work / "whole"):
        assert main(compare(work, folder)) == 0
        tables.append(table(json.loads(capsys.readouterr().out)))
    assert tables[0] == tables[1]


def test_training_into_a_run_is_refused(finished: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"data.path={work / 'texts'}", f"data.cache_dir={work / 'uninterrupted-cache'}"]
    assert main(["train", str(work / "config.yaml"), *settings, "--out", str(finished)]) == 2
    assert capsys.readouterr().err == (
        f"stackwise: {finished} holds a run; stackwise resume {finished} continues it, or choose another --out\n"
    )
