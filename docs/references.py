"""The references of config, commands, recipes and Python, made from the code."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic.fields import FieldInfo

import stackwise
from stackwise.cli.main import app
from stackwise.config import yaml_io
from stackwise.config.base import StackWiseConfig
from stackwise.config.section import Section
from stackwise.growth.recipes import RECIPES
from stackwise.units import size

RESULTS = Path(__file__).parents[1] / "benchmarks/results/recipes_cpu.json"
PYTHON = {
    "Commands as functions": ("stackwise", tuple(name for name in stackwise.__all__ if name != "__version__")),
    "Config": ("stackwise.config.base", ("StackWiseConfig",)),
    "Racks": (
        "stackwise.model.architecture",
        ("create_simple_rack", "create_rack_from_config", "create_rack_from_specs", "create_block_spec",
         "create_stack_from_spec", "create_stack_from_config", "Rack", "Stack", "Block"),
    ),
    "Attention": ("stackwise.model.attention", ("CoreAttention", "AttentionBuilder", "AttentionPresets")),
    "Layers": ("stackwise.model.layers", ("SwiGLUFFN", "MLGKALayer", "LexicalKernelManager")),
    "Training": (
        "stackwise.training",
        ("ProgressiveRackBuilder", "ProgressiveTrainer", "ProgressiveDataLoader", "PrecisionManager"),
    ),
    "End to end": ("stackwise.training.architecture_trainer", ("ArchitectureTrainer",)),
    "Objectives": ("stackwise.objectives", ("create_objective",)),
    "Callbacks": ("stackwise.training.callbacks", ("Callbacks",)),
    "Hugging Face": ("stackwise.interop.export", ("export_run", "export_rack")),
    "Import": ("stackwise.interop.importing", ("import_folder", "rack_from_folder")),
}  # fmt: skip
"""Heading → module, and the names in it that users import."""


def write(folder: Path) -> None:
    """Writes a page for each reference into ``folder``, where its content has changed."""
    folder.mkdir(exist_ok=True)
    pages = {"config": config(), "commands": commands(), "recipes": recipes(), "python": python()}
    for name, text in pages.items():
        file = folder / f"{name}.md"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def config() -> str:
    """Every key, with its type, default and description."""
    lines = [
        "# Config\n",
        "A config is a YAML file with the sections `model`, `training` and `data`. Keys left out take their "
        "defaults. On the command line, `key.path=value` changes one. `null` stands for a value that is derived, as "
        "the description says.\n",
    ]
    return "\n".join([*lines, *_section(StackWiseConfig, "")]) + "\n"


def _section(section: type[Section], path: str) -> Iterator[str]:
    inner = {name: field for name, field in section.model_fields.items() if _is_section(field.annotation)}
    keys = {name: field for name, field in section.model_fields.items() if name not in inner}
    if path:
        own = section.__doc__ if section.__doc__ != Section.__doc__ else None
        yield f"{'##' if '.' not in path else '###'} {path}\n"
        if own:
            yield _text(own.strip()) + "\n"
    if keys:
        yield "| key | type | default | |\n|---|---|---|---|"
        for name, field in keys.items():
            default = yaml_io.inline(_data(field.get_default(call_default_factory=True)))
            yield f"| `{name}` | {_cell(_type(field))} | `{_cell(default)}` | {_cell(_text(field.description or ''))} |"
        yield ""
    for name, field in inner.items():
        yield from _section(field.annotation, f"{path}.{name}".lstrip("."))
    for name, field in keys.items():
        entries = [part for part in _parts(field.annotation) if isinstance(part, type) and issubclass(part, Section)]
        for entry in entries:
            yield from _section(entry, f"{path}.{name}[]")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in typing.get_args(annotation) if typing.get_origin(annotation) is not Literal else ():
        yield from _parts(part)


_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
_BOUNDS = (
    (Ge, "ge", "≥"),
    (Gt, "gt", ">"),
    (Le, "le", "≤"),
    (Lt, "lt", "<"),
    (MultipleOf, "multiple_of", "multiple of"),
)


def _type(field: FieldInfo) -> str:
    return _limited(_named(field.annotation), field.metadata)


def _named(annotation: Any) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{yaml_io.inline(option)}`" for option in parts)
    if origin is Annotated:
        return _limited(_named(parts[0]), parts[1:])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_named, parts)))
    if origin is tuple:
        return f"list of {_named(parts[0])}" if parts[-1] is ... else f"list of {len(parts)} ({_named(parts[0])})"
    if _is_section(annotation):
        return "section"
    return _NAMES.get(annotation, str(annotation))


def _limited(text: str, metadata: Any) -> str:
    """``text`` with the bounds in ``metadata``; those that only keep numbers finite are left out."""
    found = [constraint for part in metadata for constraint in (*getattr(part, "metadata", ()), part)]
    limits = [
        f"{sign} {getattr(bound, name):g}"
        for kind, name, sign in _BOUNDS
        for bound in found
        if isinstance(bound, kind) and abs(getattr(bound, name)) < 1e6
    ]
    return f"{text} {', '.join(dict.fromkeys(limits))}" if limits else text


def _data(value: Any) -> Any:
    return [_data(part) for part in value] if isinstance(value, tuple) else value


def _text(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def commands() -> str:
    """Every command, with its arguments and options."""
    lines = ["# Commands\n", _text(app.info.help or "") + "\n", _text(app.info.epilog or "") + "\n"]
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join([f"stackwise {name}", "[OPTIONS]", *map(_metavar, arguments)])
        lines += [f"## {name}\n", f"```text\n{usage}\n```\n", _text(command.help or "") + "\n"]
        rows = [(_metavar(p), p) for p in arguments]
        rows += [(", ".join(p.opts), p) for p in command.params if p.param_type_name == "option" and not p.hidden]
        if rows:
            lines.append("| | | default |\n|---|---|---|")
        for shown, parameter in rows:
            default = "" if parameter.default in (None, False, ()) or callable(parameter.default) else parameter.default
            help_text = getattr(parameter, "help", None) or ""
            lines.append(f"| `{_cell(shown)}` | {_cell(_text(help_text))} | {_cell(str(default))} |")
        lines.append("")
        if command.epilog:
            lines.append(f"```text\n{command.epilog.lstrip(chr(8)).strip()}\n```\n")
    return "\n".join(lines) + "\n"


def _metavar(argument: Any) -> str:
    return argument.metavar or argument.name.upper()


def recipes() -> str:
    """Every recipe: what it is for, why, where it comes from, its settings, and what was measured."""
    measured = {row["recipe"]: row for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]}
    lines = [
        "# Recipes\n",
        "A recipe decides how a Rack grows, and leaves sizes, data and budget to the config: `stackwise train CONFIG "
        "--recipe NAME`. Best first. Measured: Shakespeare by characters at 1e12 true FLOPs each on two CPU cores, one "
        "seed; [the log](../log.md) has the table and what it does not show.\n",
    ]
    for recipe in RECIPES.values():
        lines += [f"## {recipe.name}\n", f"{_text(recipe.summary)} {_text(recipe.reason).capitalize()}.\n"]
        lines += [f"Source: {recipe.source}.\n"]
        row = measured.get(recipe.name)
        if row is not None:
            loss, memory = row["validation_loss"], size(row["peak_memory_bytes"])
            lines += [f"Measured: validation loss {loss:.3f}, peak memory {memory}, {row['wall_seconds']:.0f} s.\n"]
        lines += [f"```yaml\n{yaml_io.dump({'training': recipe.training}).strip()}\n```\n"]
    return "\n".join(lines)


def python() -> str:
    """The public names, from their docstrings."""
    lines = ["# Python\n"]
    for heading, (module, names) in PYTHON.items():
        lines.append(f"## {heading}\n")
        for name in names:
            is_class = isinstance(getattr(import_module(module), name), type)
            kind = "autoclass" if is_class else "autofunction"
            members = "\n   :members:" if is_class else ""
            lines.append(f"```{{eval-rst}}\n.. {kind}:: {module}.{name}{members}\n```\n")
    return "\n".join(lines)
