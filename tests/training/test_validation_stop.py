"""A signal while the validation text is scored: the run ends at once, and resuming scores it as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from stackwise.config import StackWiseConfig
from stackwise.errors import StoppedBySignal
from stackwise.objectives.causal import CausalObjective
from stackwise.runs.run import resume_run, train_run
from stackwise.store.rundir import RunDir
from stackwise.training.callbacks import Callbacks
from stackwise.training.progress import SilentReporter

TIMED = {"tokens_per_second", "mfu", "memory_bytes", "seconds", "wall_seconds", "peak_memory_bytes"}
WINDOWS = 5
"""Batches of a validation, one window each."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> StackWiseConfig:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 31)
    return StackWiseConfig.from_dict(
        {
            "model": {"d_model": 20, "n_heads": 2, "d_ff": 26, "architecture": {"n_stacks": 2, "blocks_per_stack": 1}},
            "training": {
                "batch_size": 3, "micro_batch_size": 1, "seq_len": 13, "max_steps": 10, "device": "cpu",
                "evaluation": {"every_steps": 3, "max_tokens": 13 * WINDOWS},
                "logging": {"every_steps": 2}, "checkpoint": {"every_steps": 4},
            },
            "data": {
                "source": "files", "path": str(folder / "text.txt"), "cache_dir": str(folder / "cache"),
                "tokenizer": {"kind": "bytes"},
            },
        }
    )  # fmt: skip


def steady(value: Any) -> Any:
    """Without what depends on the clock."""
    if isinstance(value, dict):
        return {key: steady(part) for key, part in value.items() if key not in TIMED}
    return [steady(part) for part in value] if isinstance(value, list) else value


class Told:
    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.phases: list[dict[str, Any]] = []
        self.callbacks = Callbacks(self.steps.append, self.phases.append)


@pytest.fixture(scope="module")
def unbroken(config: StackWiseConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Told]:
    out, told = tmp_path_factory.mktemp("unbroken") / "run", Told()
    summary = train_run(config, out, SilentReporter(), told.callbacks)
    return summary, RunDir(out).read_metrics(), told


# Ten steps in two phases of five: validations after 3 (in a phase), 5 (its end), 6, 9 and 10 (the end of the run).
@pytest.mark.parametrize(("which", "step"), [(1, 3), (2, 5), (4, 9), (5, 10)])
def test_a_validation_that_a_signal_ends_is_made_up_for_by_resuming(
    config: StackWiseConfig,
    unbroken: tuple[Any, Any, Told],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    which: int,
    step: int,
) -> None:
    score, calls, told, out = CausalObjective.score, 0, Told(), tmp_path / "run"

    def scored(self: CausalObjective, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (which - 1) * WINDOWS + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CausalObjective, "score", scored)
        with pytest.raises(StoppedBySignal, match=f"stopped by SIGTERM after step {step}; its checkpoint is saved"):
            train_run(config, out, SilentReporter(), told.callbacks)
    assert calls == (which - 1) * WINDOWS + 3, "it stops after the batch in which the signal came"
    assert not (out / "summary.json").exists()
    assert all(record["step"] < step for record in RunDir(out).read_metrics())
    summary, metrics, all_told = unbroken
    resumed = resume_run(out, SilentReporter(), callbacks=told.callbacks)
    assert resumed["weights_sha256"] == summary["weights_sha256"]
    assert steady(resumed) == steady(summary)
    assert steady(RunDir(out).read_metrics()) == steady(metrics)
    assert told.steps == all_told.steps and steady(told.phases) == steady(all_told.phases)
    assert json.loads((out / "summary.json").read_text()) == resumed


def test_a_long_validation_ends_within_five_seconds_of_processor_time(
    config: StackWiseConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Thousands of draws of masks: more than an hour of scoring."""
    long = config.changed(
        {
            "training.progressive.training_objective": "diffusion", "training.evaluation.draws": 1 << 20,
            "training.evaluation.max_tokens": None, "training.max_steps": 3,
        }
    )  # fmt: skip
    sent: list[float] = []

    def signalled() -> None:
        sent.append(time.process_time())
        os.kill(os.getpid(), signal.SIGTERM)

    class Watching(SilentReporter):
        def step(self, done: int, metrics: Any) -> None:
            if metrics is not None and not sent:
                threading.Timer(0.3, signalled).start()

    with pytest.raises(StoppedBySignal):
        train_run(long, tmp_path / "run", Watching())
    assert time.process_time() - sent[0] < 5
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "stopping" in line]
    assert line == "stackwise: stopping after this step; a second signal ends at once"
