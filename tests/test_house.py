"""The house: which room may import which, how long a file and a function may be, and CONTRIBUTING.md's picture of it.

All of it is read from the source with ``ast``; nothing is imported, and nothing here knows what a room does.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/stackwise"
GROUND = "ground"
ROOMS = (
    GROUND, "config", "ops", "data", "optim", "model", "objectives", "growth", "planning", "generation", "store",
    "training", "runs", "evaluation", "interop", "report", "cli",
)  # fmt: skip
"""From the ground up: a room imports only what comes before it."""
DOORS = {"__init__.py", "__main__.py", "training/__init__.py", "training/architecture_trainer.py"}
"""Files that only pass on names of rooms above, under the path that users import them from, when they are asked for."""
MAX_FILE, MAX_FUNCTION, MAX_GUESSES = 500, 60, 0.3


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The folder under ``src/stackwise``; single files there are the ground."""
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else GROUND


def imports(path: Path) -> Iterator[tuple[str, str, int]]:
    """(room, module, line) of each import of this package, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            folder = SOURCE.joinpath(*(node.module or "").split(".")[1:])
            inside = [a.name for a in node.names if (folder / a.name).is_dir() or (folder / f"{a.name}.py").is_file()]
            modules = [f"{node.module}.{name}" for name in inside] or [node.module or ""]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            if module.split(".")[0] == "stackwise":
                name = module.split(".")[1:2]
                yield (name[0] if name and (SOURCE / name[0]).is_dir() else GROUND), module, node.lineno


def edges() -> dict[str, set[str]]:
    """Room → the rooms that it imports, doors left out."""
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    for path in files():
        if str(path.relative_to(SOURCE)) not in DOORS:
            found[room_of(path)] |= {room for room, _, _ in imports(path)} - {room_of(path)}
    return found


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    folders -= {path.name for path in SOURCE.iterdir() if path.is_symlink()}  # configs: no code
    assert folders | {GROUND} == set(ROOMS) and len(ROOMS) == len(set(ROOMS))


def test_imports_point_down() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)}:{line} imports {module}"
        for path in files()
        if str(path.relative_to(SOURCE)) not in DOORS
        for room, module, line in imports(path)
        if ROOMS.index(room) > ROOMS.index(room_of(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_hides_in_a_function() -> None:
    """But in ``cli``, whose help must not import torch, and in the doors."""
    hidden = []
    for path in files():
        if room_of(path) == "cli" or str(path.relative_to(SOURCE)) in DOORS:
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                hidden += [
                    f"{path.relative_to(SOURCE)}:{node.lineno} imports {node.module}"
                    for node in ast.walk(function)
                    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "stackwise"
                ]
    assert not hidden, "\n".join(hidden)


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Inside a room too; what only a type checker reads counts."""
    wanted = {
        ".".join(("stackwise", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): {
            module for _, module, _ in imports(path)
        }
        for path in files()
        if str(path.relative_to(SOURCE)) not in DOORS
    }
    state: dict[str, str] = {}

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert state.get(module) != "open", " → ".join((*way, module))
        if module in state or module not in wanted:
            return
        state[module] = "open"
        for other in sorted(wanted[module]):
            visit(other, (*way, module))
        state[module] = "done"

    for module in wanted:
        visit(module, ())


def test_files_and_functions_are_short() -> None:
    long = []
    for path in files():
        text = path.read_text()
        name = path.relative_to(SOURCE)
        if (lines := text.count("\n")) > MAX_FILE:
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION:
                    long.append(f"{name}:{node.lineno} {node.name}: {lines} lines")
    assert not long, "\n".join(long)


def test_parts_are_known_and_not_asked_what_they_have() -> None:
    """At most 0.3 ``hasattr`` or ``getattr`` with a default in a thousand lines."""
    guesses, lines = [], 0
    for path in files():
        text = path.read_text()
        lines += text.count("\n")
        for node in ast.walk(ast.parse(text)):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if called == "hasattr" or (called == "getattr" and len(node.args) == 3):
                guesses.append(f"{path.relative_to(SOURCE)}:{node.lineno} {ast.unparse(node)}")
    assert len(guesses) <= MAX_GUESSES * lines / 1000, "\n".join(guesses)


def picture() -> str:
    """The rooms and their imports as a Mermaid graph; an arrow that follows from others is left out."""
    found = {  # an arrow up is another test's to report
        room: {other for other in others if ROOMS.index(other) < ROOMS.index(room)} for room, others in edges().items()
    }

    def reach(room: str) -> set[str]:
        return set().union(*({other} | reach(other) for other in found[room]))

    lines = ["```mermaid", "graph TD"]
    for room in reversed(ROOMS):
        for other in sorted(found[room], key=ROOMS.index, reverse=True):
            if not any(other in reach(between) for between in found[room] - {other}):
                lines.append(f"    {room} --> {other}")
    return "\n".join((*lines, "```"))


def test_the_picture_in_contributing_is_this_house() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert picture() in text, "CONTRIBUTING.md should hold:\n" + picture()


@pytest.mark.parametrize("room", ROOMS)
def test_contributing_says_what_each_room_holds(room: str) -> None:
    assert f"| `{room}" in (ROOT / "CONTRIBUTING.md").read_text()
