"""The blocks that the documentation prints run, page by page, as they are printed.

``bash``: lines of ``stackwise …``, in this process. ``python``: one program a page. All blocks of a page run in order,
in one folder where ``mybook.txt`` is. Before a block, ``<!-- with: training.max_steps=9 -->`` adds arguments to the
commands that train or plan, in place of the few steps and small sizes that they have here; ``<!-- not run: why -->``
leaves the block out.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from stackwise.cli.main import main

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

BLOCK = re.compile(r"(?:^<!-- (with|not run): (.+) -->\n)?^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in page.parts]
FEW = ["training.max_steps=4", "training.device=cpu", "training.seq_len=16", "model.d_model=16", "model.n_heads=2"]
ELSEWHERE = {"migration.md": "tests/config/test_migration.py"}
"""Pages whose commands need files that a test of their own makes."""


def marked(page: Path) -> Any:
    """The page that needs transformers takes a quarter of a minute."""
    return pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem == "hugging-face" else [])


@pytest.mark.parametrize("page", [marked(p) for p in PAGES if BLOCK.search(p.read_text())])
def test_the_blocks_of_a_page_run_as_printed(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if page.name in ELSEWHERE:
        assert (ROOT / ELSEWHERE[page.name]).exists()
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STACKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("mybook.txt").write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 60)
    names: dict[str, Any] = {"__name__": page.stem}
    for mark, extra, language, text in BLOCK.findall(page.read_text()):
        if mark == "not run":
            continue
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            command = shlex.split(line, comments=True)
            if not command:
                continue
            assert command[0] == "stackwise", f"{page.name}: {line}"
            trains = command[1] in ("train", "compare", "plan")
            assert main([*command[1:], *((shlex.split(extra) or FEW) if trains else [])]) == 0, (
                line, capsys.readouterr().err,
            )  # fmt: skip


def test_the_references_list_every_key_command_recipe_and_public_name() -> None:
    import references

    import stackwise
    from stackwise.cli.main import app
    from stackwise.config import StackWiseConfig

    config = references.config()

    def keys(data: dict[str, Any], where: str) -> None:
        if where:
            assert re.search(rf"^##+ {re.escape(where)}$", config, re.MULTILINE), where
        section = re.split(rf"^##+ {re.escape(where)}$" if where else r"\A", config, maxsplit=1, flags=re.MULTILINE)[1]
        for key, value in data.items():
            if isinstance(value, dict):
                keys(value, f"{where}.{key}".lstrip("."))
            else:
                assert f"| `{key}` |" in re.split(r"^##", section, maxsplit=1, flags=re.MULTILINE)[0], (where, key)

    keys(StackWiseConfig().to_dict(), "")
    assert "## training.phases[]" in config.replace("###", "##")
    commands = references.commands()
    for command in app.registered_commands:
        assert f"\n## {command.name or command.callback.__name__.replace('_', '-')}\n" in commands
    assert "`--from`" in commands and "`--json`" in commands and "Exit codes: 0 done" in commands
    python = references.python()
    assert all(f"stackwise.{name}" in python for name in stackwise.__all__ if name != "__version__")
    recipes = references.recipes()
    assert "## append-frozen" in recipes and "validation loss 1.931" in recipes
