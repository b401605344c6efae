"""Metrics in dashboards: what they hold is what ``metrics.jsonl`` holds."""

import json
import sqlite3
import warnings
from pathlib import Path

import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.legacy import OldKeyWarning
from stackwise.errors import ConfigError, UserError
from stackwise.runs.run import resume_run, train_run
from stackwise.store.rundir import RunDir
from stackwise.training.progress import SilentReporter
from stackwise.training.tracking import numbers_of, open_trackers


def config(text: Path, *overrides: str) -> StackWiseConfig:
    return StackWiseConfig.from_dict(
        {
            "model": {"d_model": 26, "n_heads": 13, "d_ff": 19, "architecture": {"n_stacks": 2, "blocks_per_stack": 1}},
            "training": {"batch_size": 3, "seq_len": 7, "max_steps": 8, "device": "cpu", "logging": {"every_steps": 3}},
            "data": {
                "source": "files", "path": str(text), "cache_dir": f"{text}.cache", "tokenizer": {"kind": "characters"},
            },
        },
        overrides,
    )  # fmt: skip


def events(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_has_every_number_of_every_line_also_of_a_run_that_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh " * 500)
    run = tmp_path / "run"
    summary = train_run(config(text, "training.logging.trackers=[tensorboard]"), run, SilentReporter())
    (run / "summary.json").unlink()
    resume_run(run, SilentReporter(), step=4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 4, 6, 8]
    found = events(run)
    for key in ("loss", "lr", "grad_norm", "tokens", "flops"):
        wanted = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]
        # The steps after the checkpoint were taken, and told, twice.
        assert found[key] == [*wanted, *wanted[3:]]
    assert found["validation_loss"][-1][1] == pytest.approx(summary["validation"]["loss"], rel=1e-6)
    assert not {"step", "phase", "stack"} - {"stack"} & found.keys()


def test_numbers_are_numbers() -> None:
    line = {"step": 3, "phase": "stack 0", "loss": 1.5, "tokens": 7, "mfu": None, "yes": True}
    assert numbers_of(line) == {"loss": 1.5, "tokens": 7}


def test_wandb_works_offline_and_a_run_that_goes_on_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in ((1, 3), (4,)):
        (tracker,) = open_trackers(("wandb",), tmp_path, {"model.d_model": 26})
        for step in steps:
            tracker.log(step, {"loss": 2.0 + 0.125 * step})
        tracker.close()
    name = (tmp_path / "wandb" / "id").read_text()
    stored = b"".join(path.read_bytes() for path in sorted((tmp_path / "wandb").glob(f"offline-run-*-{name}/*.wandb")))
    assert all(str(2.0 + 0.125 * step).encode() in stored for step in (1, 3, 4)), stored
    assert b"model.d_model" in stored and len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


def test_trackio_keeps_the_numbers_of_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed here (pip install 'stackwise[trackio]')")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    (tmp_path / "mine").mkdir()
    (tracker,) = open_trackers(("trackio",), tmp_path / "mine", {"model.d_model": 26})
    for step in (1, 4):
        tracker.log(step, {"loss": 2.0 + 0.125 * step})
    tracker.close()
    with sqlite3.connect(tmp_path / "store" / "stackwise.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, step, json.loads(metrics)["loss"]) for name, step, metrics in rows] == [
        ("mine", 1, 2.125), ("mine", 4, 2.5),
    ]  # fmt: skip


def test_a_tracker_that_is_not_installed_is_named_with_its_extra_and_the_folder_stays_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it is an ImportError
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh " * 500)
    with pytest.raises(UserError, match=r"trackers: wandb cannot be imported.*pip install 'stackwise\[wandb\]'"):
        train_run(config(text, "training.logging.trackers=[wandb]"), tmp_path / "run", SilentReporter())
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"training\.logging\.trackers.*'tensorbord'.*did you mean"):
        config(text, "training.logging.trackers=[tensorbord]")


def test_the_old_key_is_a_tracker_and_its_default_is_silent(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        old = StackWiseConfig.from_dict({"training": {"logging": {"tensorboard": False, "trackers": ["wandb"]}}})
    assert old.training.logging.trackers == ("wandb",)
    with pytest.warns(OldKeyWarning, match=r"tensorboard is deprecated; write training\.logging: \{trackers: "):
        new = StackWiseConfig.from_dict({"training": {"logging": {"tensorboard": True}}})
    assert new.training.logging.trackers == ("tensorboard",)
    run = RunDir.create(tmp_path / "run", new.to_yaml())
    assert StackWiseConfig.from_yaml(run.config) == new
    with pytest.raises(ConfigError, match=r"logging\.tensorboard: \['tensorboard'\] contradicts"):
        StackWiseConfig.from_dict({"training": {"logging": {"tensorboard": True, "trackers": ["wandb"]}}})
