"""Whose a checkpoint is: a run goes on, is scored and exported only as what it was trained as, and whole."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from stackwise.cli.main import main
from stackwise.data.store import prepare
from stackwise.runs.run import load

CONFIG = """
model: {{d_model: 20, n_heads: 2, d_ff: 36, architecture: {{n_stacks: 3, blocks_per_stack: 1}}}}
training:
  batch_size: 3
  seq_len: 14
  max_steps: 12
  device: cpu
  offload: disk
  checkpoint: {{every_steps: 2, keep_last: 3}}
  progressive: {{trunk_strategy: frozen}}
data: {{source: files, path: {work}/text.txt, cache_dir: {work}/cache, tokenizer: {{kind: bytes}}}}
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``config.yaml``, ``text.txt`` and the finished run ``run`` of three phases of four steps."""
    folder = tmp_path_factory.mktemp("identity")
    draw = random.Random(7)
    (folder / "text.txt").write_text(" ".join(draw.choices(["stack", "rack", "block", "trunk"], k=1009)))
    (folder / "config.yaml").write_text(CONFIG.format(work=folder))
    assert main(["train", str(folder / "config.yaml"), "--out", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original / "run", tmp_path / "run")
    return tmp_path / "run"


def error(capsys: pytest.CaptureFixture[str], code: int, *line: str | Path) -> str:
    """The last line that a command prints, which must exit with ``code``."""
    capsys.readouterr()
    assert main([str(word) for word in line]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.rstrip("\n").rpartition("\n")[2].removeprefix("stackwise: ")


def files(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", ".origin"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def rewrite_state(manifest: Path, change: dict[str, Any], *dropped: str) -> None:
    """Changes the state in a manifest and gives it the digest that it then has."""
    data = json.loads(manifest.read_text())
    del data["sha256"]
    data["state"] = {k: v for k, v in (data["state"] | change).items() if k not in dropped}
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    data["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    manifest.write_text(json.dumps(data))


def manifests(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*.json"))


def edit_config(run: Path, old: str, new: str) -> None:
    text = (run / "config.yaml").read_text()
    assert text.count(old) == 1
    (run / "config.yaml").write_text(text.replace(old, new))


# The config, the tokenizer and the text.


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "RUN"],
        ["generate", "RUN"],
        ["export", "RUN", "OUT"],
        ["resume", "RUN", "--step", "10"],
        ["train", "CONFIG", "--from", "RUN", "--out", "OUT"],
    ],
    ids=lambda command: command[0],
)
def test_a_config_of_another_run_is_refused(command, original, run, tmp_path, capsys) -> None:
    edit_config(run, "n_heads: 2\n", "n_heads: 5\n")  # every shape is as before
    (tmp_path / "c.yaml").write_text((original / "config.yaml").read_text().replace("model:", "#"))
    names = {"RUN": run, "OUT": tmp_path / "out", "CONFIG": tmp_path / "c.yaml"}
    before = files(run)
    said = error(capsys, 2, *(names.get(word, word) for word in command))
    assert said == (
        f"{run}/config.yaml: model.n_heads is 5, but the checkpoint of step {10 if '--step' in command else 12} was "
        "trained with 2: this config.yaml does not belong to it; put the run's own one back"
    )
    assert files(run) == before
    assert not (tmp_path / "out").exists()


def test_settings_that_decide_nothing_and_those_of_another_version_may_differ(run) -> None:
    edit_config(run, "device: cpu\n", "device: auto\n")
    newest = manifests(run)[-1]
    state = json.loads(newest.read_text())["state"]
    rewrite_state(newest, {"config": {**state["config"], "training.of_another_version": 7}})
    assert load(run).step == 12


def test_a_tokenizer_of_another_run_is_refused(original, run, tmp_path, capsys) -> None:
    settings = [f"data.path={original / 'text.txt'}", "data.tokenizer.kind=characters", "training.max_steps=3"]
    assert main(["train", str(original / "config.yaml"), *settings, "--out", str(tmp_path / "other")]) == 0
    shutil.rmtree(run / "tokenizer")
    shutil.copytree(tmp_path / "other" / "tokenizer", run / "tokenizer")
    assert "tokenizer: this is not the tokenizer that the checkpoint of step 12 was trained with" in error(
        capsys, 2, "generate", run
    )


def test_a_text_that_has_changed_is_refused_by_resume(original, run, tmp_path, capsys) -> None:
    (tmp_path / "text.txt").write_text((original / "text.txt").read_text().replace("trunk", "crown"))
    edit_config(run, f"{original}/text.txt", f"{tmp_path}/text.txt")
    before = files(run)
    said = error(capsys, 2, "resume", run, "--step", "10", "--trust-paths")
    assert said.startswith("the text behind data.path is not the one that the checkpoint of step 10 was trained on")
    assert files(run) == before


def test_a_run_begun_before_stores_were_hashed_goes_on_and_another_is_told_apart(original, run, capsys) -> None:
    loaded = load(run)
    settings = loaded.config.to_dict()
    for key in ("device", "cpu_allocator", "logging", "checkpoint"):
        settings["training"].pop(key)
    settings["data"] = prepare(loaded.config.data).key
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    expected = json.loads((run / "summary.json").read_text())["weights_sha256"]
    manifest = manifests(run)[-2]
    rewrite_state(manifest, {"fingerprint": digest}, "config", "tokenizer", "data")
    (run / "checkpoints" / "newest").unlink()
    assert main(["resume", str(run), "--step", "10"]) == 0
    assert json.loads((run / "summary.json").read_text())["weights_sha256"] == expected
    rewrite_state(manifests(run)[-1], {"fingerprint": "0" * 64}, "config", "tokenizer", "data")
    said = error(capsys, 2, "resume", run, "--step", "12")
    assert "was saved by an earlier version, or config.yaml or the text behind data.path was changed" in said


@pytest.mark.parametrize("at_once", [True, False])
def test_flipped_bits_in_the_token_store_train_nothing(original, run, tmp_path, capsys, monkeypatch, at_once) -> None:
    if not at_once:
        monkeypatch.setattr("stackwise.data.store.VERIFIED_AT_ONCE_BYTES", 0)
    shutil.copytree(original / "cache", tmp_path / "cache")
    edit_config(run, f"{original}/cache", f"{tmp_path}/cache")
    store = tmp_path / "cache" / "tokens" / prepare(load(run).config.data).key
    content = bytearray((store / "train.bin").read_bytes())
    content[1001] ^= 0x80
    (store / "train.bin").write_bytes(content)
    commands = (
        ["resume", run, "--step", "10", "--trust-paths"],
        ["train", original / "config.yaml", f"data.cache_dir={tmp_path}/cache", "--out", tmp_path / "out"],
        ["eval", run, "--trust-paths"],
    )
    for command in commands:
        said = error(capsys, 1, *command)
        assert said == (
            f"{store} is damaged: the content of train.bin does not match its sha256; "
            "delete this folder and start again"
        )
    assert not list((tmp_path / "out").glob("checkpoints/step-*"))


# What is lost or damaged.


def test_a_run_whose_manifests_are_lost_is_refused_and_keeps_its_objects(run, capsys) -> None:
    for manifest in manifests(run):
        manifest.unlink()
    (run / "summary.json").unlink()
    before = files(run)
    for command in ("resume", "eval"):
        said = error(capsys, 1, command, run)
        assert "holds no checkpoint, though one of step 12 was saved there: its manifest is lost" in said
    (run / "checkpoints" / "newest").unlink()  # as a run of an earlier version
    said = error(capsys, 1, "resume", run)
    assert f"{run}: its checkpoints are lost: it has trained to step 12" in said
    del before["checkpoints/newest"]
    assert files(run) == before


def test_a_lost_newest_manifest_is_said_and_an_older_one_only_taken_when_asked_for(run, capsys) -> None:
    manifests(run)[-1].unlink()
    (run / "summary.json").unlink()
    before = files(run)
    for command in ("resume", "eval"):
        said = error(capsys, 1, command, run)
        assert "the checkpoint of step 12, the newest, is lost" in said
        assert f"the checkpoint of step 10 is intact: stackwise resume {run} --step 10" in said
    assert files(run) == before
    assert main(["eval", str(run), "--step", "10"]) == 0
    assert main(["resume", str(run), "--step", "10"]) == 0
    assert load(run).step == 12


def test_a_newest_checkpoint_older_than_the_summary_is_said(run, capsys) -> None:
    manifests(run)[-1].unlink()
    (run / "checkpoints" / "newest").unlink()
    for command in ("resume", "eval"):
        said = error(capsys, 1, command, run)
        assert "summary.json belongs to step 12, but the newest checkpoint to step 10: the last one is lost" in said


def test_a_run_that_is_to_go_on_from_an_earlier_step_is_incomplete_before_its_checkpoints_go(run, monkeypatch) -> None:
    """Else a kill in between would leave a complete run without its last checkpoint."""

    class Killed(Exception):
        """What nothing answers."""

    def killed(*arguments: object) -> None:
        raise Killed

    monkeypatch.setattr("stackwise.store.checkpoints.CheckpointStore.delete_after", killed)
    with pytest.raises(Killed):
        main(["resume", str(run), "--step", "10"])
    assert not (run / "summary.json").exists()


def test_a_damaged_frozen_stack_is_found_when_the_run_is_opened(run, capsys) -> None:
    manifest = manifests(run)[-2]
    sha256 = json.loads(manifest.read_text())["parts"]["stack.0"]["object"]
    path = run / "checkpoints" / "objects" / f"{sha256}.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    before = files(run)
    said = error(capsys, 1, "resume", run, "--step", "10")
    assert f"the checkpoint of step 10 is damaged in part 'stack.0': {path}" in said
    assert files(run) == before  # the summary, the later checkpoint and the metrics too
