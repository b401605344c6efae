"""A run of somebody else touches nothing outside its folder unless the user says so; one's own goes on unasked."""

from __future__ import annotations

import os
import random
import shutil
import stat
from pathlib import Path

import pytest

from stackwise.cli.main import main
from stackwise.config.base import StackWiseConfig
from stackwise.data import files, records, store

CONFIG = """
model: {{d_model: 20, n_heads: 2, d_ff: 36, architecture: {{n_stacks: 1, blocks_per_stack: 1}}}}
training: {{batch_size: 3, seq_len: 14, max_steps: 5, device: cpu, checkpoint: {{every_steps: 2}}}}
data: {{source: files, path: {work}/text.txt, cache_dir: {work}/cache, tokenizer: {{kind: bytes}}}}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "mine"))
    draw = random.Random(3)
    (tmp_path / "text.txt").write_text(" ".join(draw.choices(["stack", "rack", "block", "trunk"], k=503)))
    (tmp_path / "config.yaml").write_text(CONFIG.format(work=tmp_path))
    assert main(["train", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


@pytest.fixture
def received(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same run in the hands of another user, whose key is another one."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "theirs"))
    return run


def refusal(capsys: pytest.CaptureFixture[str], *line: str | Path) -> str:
    capsys.readouterr()
    assert main([str(word) for word in line]) == 2
    return capsys.readouterr().err.rstrip("\n").rpartition("\n")[2].removeprefix("stackwise: ")


def test_ones_own_run_is_scored_and_goes_on_unasked_also_elsewhere(run, tmp_path) -> None:
    shutil.move(run, tmp_path / "moved")
    assert main(["eval", str(tmp_path / "moved")]) == 0
    assert main(["resume", str(tmp_path / "moved"), "--step", "4"]) == 0


@pytest.mark.parametrize("command", [["eval"], ["resume", "--step", "4"]], ids=["eval", "resume"])
def test_a_run_of_somebody_else_reads_and_writes_nothing_outside_unasked(
    command, received, tmp_path, capsys, monkeypatch
) -> None:
    shutil.rmtree(tmp_path / "cache")
    with monkeypatch.context() as patched:
        for module, name in ((records, "stat_of"), (files, "stat_of"), (files, "expand"), (store, "scratch_folder")):
            patched.setattr(module, name, lambda *arguments: pytest.fail("something outside was used"))
        said = refusal(capsys, command[0], received, *command[1:])
    assert said == (
        f"{received}: its data.path names '{tmp_path}/text.txt', which is outside the run, and nothing shows that you "
        "set it; "
        "--trust-paths uses it all the same" + (", --data F scores other text" if command == ["eval"] else "")
    )
    assert not (tmp_path / "cache").exists()
    assert main([command[0], str(received), *command[1:], "--trust-paths"]) == 0


def test_a_run_that_goes_on_by_permission_is_ones_own_from_then_on(received) -> None:
    assert main(["resume", str(received), "--step", "4", "--trust-paths"]) == 0
    assert main(["eval", str(received)]) == 0


def test_other_text_is_scored_and_text_generated_without_permission(received, tmp_path) -> None:
    (tmp_path / "other.txt").write_text("rack stack " * 53)
    assert main(["eval", str(received), "--data", str(tmp_path / "other.txt")]) == 0
    assert main(["generate", str(received), "--tokens", "3"]) == 0


def test_a_config_that_was_made_to_name_another_place_is_asked_about(run, tmp_path, capsys) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(f"{tmp_path}/cache", f"{tmp_path}/victim"))
    assert "its data.path names" in refusal(capsys, "eval", run)
    assert not (tmp_path / "victim").exists()


def test_paths_inside_the_run_are_its_own_and_neither_links_nor_dots_lead_out(
    run, tmp_path, capsys, monkeypatch
) -> None:
    shutil.copy(tmp_path / "text.txt", run / "text.txt")
    (run / "link").symlink_to(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "theirs"))
    settings = StackWiseConfig.from_yaml(run / "config.yaml")
    for path, asked in ((run / "text.txt", False), (run / "link" / "text.txt", True), (f"{run}/../text.txt", True)):
        settings.changed({"data.path": str(path), "data.cache_dir": None}).to_yaml(run / "config.yaml")
        if asked:
            assert f"its data.path names '{path}'" in refusal(capsys, "eval", run)
        else:
            assert main(["eval", str(run)]) == 0


def test_the_key_is_readable_by_the_user_alone_and_a_signature_by_another_is_worth_nothing(run, tmp_path) -> None:
    key = tmp_path / "mine" / "stackwise" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and len(key.read_bytes()) == 32
    assert os.listdir(key.parent) == ["key"]
    key.unlink()
    assert main(["eval", str(run)]) == 2
    assert len(key.read_bytes()) == 32
