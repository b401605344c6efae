"""Turns validation errors into one line: which key, what value, what is allowed, the nearest right name."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

_LIMITS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "none_required": "null (nothing else is built yet)",
    "finite_number": "a finite number",
    "tuple_type": "a list",
    "model_type": "a section of keys",
    "dict_type": "a section of keys",
}


def section_of(schema: type[BaseModel], path: tuple[str, ...]) -> type[BaseModel] | None:
    """The config class at ``path`` under ``schema``, or ``None`` where the path leads elsewhere."""
    for name in path:
        field = schema.model_fields.get(name)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return None
        schema = field.annotation
    return schema


def all_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted leaf key under ``schema``."""
    keys = []
    for name in schema.model_fields:
        section = section_of(schema, (name,))
        keys += all_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return keys


def unknown_key(schema: type[BaseModel], path: tuple[str, ...]) -> str:
    """The message for a key that does not exist, with the nearest one that does."""
    dotted = ".".join(path)
    section = section_of(schema, path[:-1])
    siblings = list(section.model_fields) if section else []
    near = difflib.get_close_matches(path[-1], siblings, 1, 0.6)
    if near:
        return f"{dotted}: unknown key; did you mean {'.'.join((*path[:-1], near[0]))}?"
    keys = all_keys(schema)
    elsewhere = [k for k in keys if k.split(".")[-1] == path[-1]] or difflib.get_close_matches(dotted, keys, 1, 0.7)
    if elsewhere:
        return f"{dotted}: unknown key; did you mean {elsewhere[0]}?"
    return f"{dotted}: unknown key; known here: {', '.join(siblings)}"


def _known_path(schema: type[BaseModel], location: tuple[Any, ...]) -> tuple[str, ...]:
    """``location`` without the parts that name the branch of a union."""
    path: list[str] = []
    current: type[BaseModel] | None = schema
    for part in location:
        if current is not None:
            path.append(str(part))
            current = section_of(current, (str(part),))
        elif isinstance(part, int):
            path.append(str(part))
    return tuple(path)


def _allows_none(schema: type[BaseModel], path: tuple[str, ...]) -> bool:
    section = section_of(schema, path[:-1]) if path else None
    if section is None or path[-1] not in section.model_fields:
        return False
    annotation = section.model_fields[path[-1]].annotation
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return is_union and type(None) in typing.get_args(annotation)


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first problem in one line, and how many more there are."""
    problems: dict[str, str] = {}
    for detail in error.errors():
        kind, location, value = detail["type"], detail["loc"], detail["input"]
        context = detail.get("ctx", {})
        path = _known_path(schema, location)
        dotted = ".".join(path)
        if kind == "extra_forbidden":
            message = unknown_key(schema, tuple(str(p) for p in location))
        elif kind == "conflict":
            dotted = f"{dotted}.{context['key']}" if dotted else context["key"]
            message = f"{dotted}: {context['problem']}"
        elif kind == "literal_error":
            options = [o.strip(" '") for o in context["expected"].replace(" or ", ", ").split(", ")]
            near = difflib.get_close_matches(str(value), options, 1, 0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            allowed = ", ".join(o.lower() if o in ("True", "False") else o for o in options)
            message = f"{dotted}: {_show(value)} is not allowed; allowed: {allowed}{hint}"
        elif kind in _LIMITS:
            key, words = _LIMITS[kind]
            message = f"{dotted}: {_show(value)} is out of range; must be {words} {context[key]:g}"
        elif kind in _TYPES:
            also = " or null" if _allows_none(schema, path) else ""
            message = f"{dotted}: {_show(value)} has the wrong type; must be {_TYPES[kind]}{also}"
        elif kind in ("too_long", "too_short", "missing"):
            message = f"{dotted}: {_show(value)} has the wrong number of entries"
        else:
            message = f"{dotted}: {_show(value)}: {detail['msg']}"
        problems.setdefault(dotted, message)
    lines = list(problems.values())
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return lines[0] + more
