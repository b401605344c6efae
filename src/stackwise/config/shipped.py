"""The configs that come with the package, by their names in its repository: ``configs/one_billion.yaml``."""

from __future__ import annotations

from pathlib import Path

from stackwise.errors import nearest

FOLDER = Path(__file__).parents[1] / "configs"


def names() -> list[str]:
    """``configs/…`` of each, sorted."""
    return sorted(str("configs" / file.relative_to(FOLDER)) for file in FOLDER.rglob("*.yaml"))


def locate(path: Path) -> Path:
    """The shipped config that ``path`` names, where nothing else is there; else ``path``."""
    if path.parts[:1] == ("configs",) and not path.exists() and str(path) in names():
        return FOLDER.joinpath(*path.parts[1:])
    return path


def hint(path: Path) -> str:
    """The end of the message that ``path`` is no file: the shipped config that may be meant."""
    near = nearest(str(path), names())
    return f"; did you mean {near}, which comes with StackWise?" if near else ""
