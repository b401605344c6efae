"""``stackwise init``: a commented config to start from."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from stackwise.config.presets import ABOUT
from stackwise.errors import UserError

EPILOG = "\b\nPresets:\n" + "\n".join(f"  {name:<12}{about}" for name, about in ABOUT.items())


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write; - for standard output.")] = Path(
        "config.yaml"
    ),
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="Settings to start from; see below.", autocompletion=lambda: list(ABOUT))
    ] = "default",
    full: Annotated[bool, typer.Option("--full", help="Write every key.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
) -> None:
    """Write a commented config to start from.

    It has the settings that people change; --full writes every key.
    """
    from stackwise.config.template import preset_config, template

    config = preset_config(preset)
    text = template(config, ABOUT[preset], full)
    if str(file) == "-":
        sys.stdout.write(text)
        return
    if file.is_dir():
        raise UserError(f"{file}: is a folder; name a file")
    try:
        with file.open("w" if force else "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise UserError(f"{file}: already exists; --force overwrites it") from None
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file}: the folder {file.parent} does not exist") from None
    except PermissionError:
        raise UserError(f"{file}: you have no permission to write it") from None
    text_first = "" if config.data.path is None else f"put your text in {config.data.path}, then: "
    command = f"stackwise train {shlex.quote(str(file))} --out runs/first"
    print(f"wrote {file} (preset {preset}); {text_first or 'next: '}{command}", file=sys.stderr)
