"""What the README prints runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from stackwise.cli.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_python_example_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    loss, rack = capsys.readouterr().out.split(" ", 1)
    assert 0 < float(loss) < 6 and "Stack" in rack


def test_the_commands_for_ones_own_text_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = [b for b in blocks("") if "stackwise init" in b]
    commands = [shlex.split(line, comments=True) for line in block.strip().splitlines()]
    assert [c[:2] for c in commands] == [["stackwise", v] for v in ("init", "plan", "train", "eval", "generate")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STACKWISE_CACHE", str(tmp_path / "cache"))
    Path("mybook.txt").write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 60)
    for command in commands:
        # the printed run is of thousands of steps: take four of them
        smaller = ["training.max_steps=4", "training.device=cpu"] if command[1] == "train" else []
        assert main([*command[1:], *smaller]) == 0
    out = capsys.readouterr().out
    assert "bits_per_byte" in out and "It was" in out


def test_the_make_targets_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_files_it_links_to_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link
