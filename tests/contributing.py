"""CONTRIBUTING.md's examples as data, and the package with one of them added."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:^`(\S+)`\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A fenced block: the path in the line before it, its language and its text."""


class Example(NamedTuple):
    files: dict[str, str]
    changes: list[tuple[str, str]]
    commands: list[str]


def examples() -> dict[str, Example]:
    """Heading → what stands under it: new files, changes of files that are there, and commands."""
    found = {}
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding something")[1]
    for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        heading, path = part.split("\n", 1)[0], ""
        example = Example({}, [], [])
        for named, language, block in BLOCK.findall(part):
            path = named or path
            if language == "python":
                example.files[path] = block
            elif language == "diff":
                example.changes.append((path, block))
            else:
                example.commands.extend(line.removeprefix("$ ") for line in block.splitlines())
        found[heading] = example
    return found


def changed(text: str, diff: str) -> str:
    """``text`` with the lines of ``diff`` marked + after the ones before them, which must be there once."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] == " ")
    assert text.count(old) == 1, f"not there, or more than once:\n{old}"
    return text.replace(old, "".join(line[1:] for line in lines))


def package_with(example: Example, folder: Path) -> None:
    """Copies ``src`` into ``folder``, and adds ``example`` there."""
    shutil.copytree(ROOT / "src", folder / "src")
    for path, text in example.files.items():
        assert not (folder / path).exists()
        (folder / path).write_text(text)
    for path, diff in example.changes:
        (folder / path).write_text(changed((folder / path).read_text(), diff))
