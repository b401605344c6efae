"""``stackwise init``: the file it writes, and what it will not overwrite."""

import importlib.metadata
import shlex
from pathlib import Path

import pytest

from stackwise.cli.main import main
from stackwise.config import StackWiseConfig, yaml_io
from stackwise.config.presets import ABOUT, PRESETS
from stackwise.config.template import preset_config


def test_the_file_written_loads_as_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert StackWiseConfig.from_yaml("config.yaml") == StackWiseConfig()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("wrote config.yaml (preset default); next: stackwise train config.yaml")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_written_and_explained(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, full = tmp_path / "c.yaml", tmp_path / "full.yaml"
    assert main(["init", str(file), "--preset", name]) == 0
    assert main(["init", str(full), "--preset", name, "--full"]) == 0
    assert StackWiseConfig.from_yaml(file) == StackWiseConfig.from_yaml(full) == preset_config(name)
    assert len(file.read_text().splitlines()) < 60 < 150 < len(full.read_text().splitlines())
    capsys.readouterr()
    main(["init", "--help"])
    assert f"{name:<12}{ABOUT[name]}\n" in capsys.readouterr().out


def test_a_dash_writes_to_standard_output_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "-", "--preset", "bert"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert StackWiseConfig.from_dict(yaml_io.parse(out, "stdout")) == preset_config("bert")
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("mine")
    assert main(["init", str(file)]) == 2
    assert capsys.readouterr() == ("", f"stackwise: {file}: already exists; --force overwrites it\n")
    assert file.read_text() == "mine"
    assert main(["init", str(file), "--force"]) == 0
    assert StackWiseConfig.from_yaml(file) == StackWiseConfig()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "none" / "c.yaml"
    assert main(["init", str(file)]) == 2
    assert capsys.readouterr().err == f"stackwise: {file}: the folder {file.parent} does not exist\n"
    assert main(["init", str(tmp_path), "--force"]) == 2
    assert capsys.readouterr().err == f"stackwise: {tmp_path}: is a folder; name a file\n"


def test_an_unknown_preset_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    assert main(["init", str(file), "--preset", "brt"]) == 2
    assert capsys.readouterr().err.endswith("; did you mean bert?\n")
    assert not file.exists()


@pytest.mark.parametrize("preset", ["default", "characters"])
def test_the_command_that_it_prints_next_works(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my config.yaml", "--preset", preset]) == 0
    said = capsys.readouterr().err
    if preset == "characters":
        assert "; put your text in input.txt, then: stackwise" in said
        (tmp_path / "input.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 90)
    command = shlex.split(said[said.index("stackwise train") :])
    small = ["model.d_model=8", "training.batch_size=1", "training.seq_len=8", "training.max_steps=4"]
    if preset == "default":
        (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 90)
        small += ["data.source=files", "data.path=a.txt", "data.tokenizer.vocab_size=270"]
    assert main([*command[1:3], *small, f"data.cache_dir={tmp_path}/cache", *command[3:]]) == 0
    assert (tmp_path / "runs/first/summary.json").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("stackwise tr", "train"), ("stackwise init --preset ch", "characters"),
        ("stackwise train c.yaml --recipe late", "late-expansion"),
    ],
)  # fmt: skip
def test_a_shell_completes_commands_and_names(
    words: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_STACKWISE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert main([]) == 0
    assert capsys.readouterr().out.split() == [expected]


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"stackwise {importlib.metadata.version('stackwise')}\n"
