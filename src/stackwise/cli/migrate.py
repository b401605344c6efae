"""``stackwise migrate``: configs of the first public versions, rewritten in today's keys."""

from __future__ import annotations

import shutil
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stackwise.cli.train import Json
from stackwise.errors import UserError

if TYPE_CHECKING:
    from stackwise.config.migration import Migrated


def migrate(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="Old config, or a folder of them")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="File or folder to write; must be new")],
    as_json: Json = False,
) -> None:
    """Rewrite configs of the first public versions; comments stay, and a report says what changed."""
    from stackwise.files import new_folder, require_free, write_text_atomic

    if old.is_dir():
        files = sorted(file for file in old.rglob("*") if file.suffix in (".yaml", ".yml") and file.is_file())
        if not files:
            raise UserError(f"{old}: has no .yaml file")
        require_free(new)
    else:
        files = [old]
        if new.exists() or new.is_symlink():
            raise UserError(f"{new}: already exists; give a file that does not")
        if not new.parent.is_dir():
            raise UserError(f"{new}: the folder {new.parent} does not exist")
    results = _migrated(files)
    if old.is_dir():
        with new_folder(new) as scratch:
            for file, result in results.items():
                target = scratch / file.relative_to(old)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(result.text, encoding="utf-8")
    else:
        write_text_atomic(new, results[old].text)
    places = {file: new / file.relative_to(old) if old.is_dir() else new for file in files}
    if as_json:
        from stackwise.cli.results import print_json

        facts = [
            {"old": str(file), "new": str(places[file]), **{k: v for k, v in asdict(result).items() if k != "text"}}
            for file, result in results.items()
        ]
        print_json({"files": facts}, "Migration")
        return
    for file, result in results.items():
        print(_report(file, places[file], result), file=sys.stderr)


def _migrated(files: list[Path]) -> dict[Path, Migrated]:
    """The rewritten ``files``; all that cannot be rewritten are refused together, each problem in its line."""
    from stackwise.config.base import read_text
    from stackwise.config.migration import Refused
    from stackwise.config.migration_rules import migrate_config

    results: dict[Path, Migrated] = {}
    problems: list[str] = []
    for file in files:
        try:
            results[file] = migrate_config(read_text(file), str(file))
        except Refused as error:
            problems += error.problems
        except UserError as error:
            problems.append(str(error))
    for problem in problems[:-1]:
        print(f"stackwise: {' '.join(problem.split())}", file=sys.stderr)
    if problems:
        raise UserError(problems[-1])
    return results


def _report(old: Path, new: Path, result: Migrated) -> str:
    """What became of a file's settings."""
    if not (result.moved or result.differs or result.left_out):
        return f"{new}: nothing in {old} is old"
    lines = [f"{new}: {len(result.moved)} moved, {len(result.differs)} not as before, {len(result.left_out)} left out"]
    width = min(shutil.get_terminal_size((80, 24)).columns, 120)
    reasons: dict[str, list[str]] = {}
    for key, why in result.left_out.items():
        reasons.setdefault(why, []).append(key)
    for heading, entries in (
        ("moved", result.moved),
        ("not as before", result.differs),
        ("left out", [f"{', '.join(keys)}: {why}" for why, keys in reasons.items()]),
    ):
        for entry in entries:
            body = textwrap.wrap(
                entry, width - 17, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            )
            lines += [f"  {heading if not i else '':<14} {line}" for i, line in enumerate(body)]
    return "\n".join([*lines, f"next: stackwise plan {new}"])
