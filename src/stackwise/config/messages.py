"""Turns validation errors into one line: which key, what value, what is allowed, the nearest right name."""

from __future__ import annotations

import ast
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from stackwise.config.section import Section
from stackwise.errors import nearest

_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
_BOUNDS = ((Ge, "ge", "at least"), (Gt, "gt", "above"), (Le, "le", "at most"), (Lt, "lt", "below"))
_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a section of keys",
    "dict_type": "a section of keys",
}
_MOST = 100
"""Problems that are looked at: one is shown, and the others are counted."""
_COUNTS = ("too_long", "too_short", "missing")


def section_of(schema: type[Section], path: tuple[str, ...]) -> type[Section] | None:
    """The config class at ``path`` under ``schema``, or ``None`` where the path leads elsewhere."""
    for name in path:
        field = schema.model_fields.get(name)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            return None
        schema = field.annotation
    return schema


def all_keys(schema: type[Section], prefix: str = "") -> list[str]:
    """Every dotted key under ``schema``, sections included."""
    keys = []
    for name in schema.model_fields:
        section = section_of(schema, (name,))
        keys.append(f"{prefix}{name}")
        keys += all_keys(section, f"{prefix}{name}.") if section else []
    return keys


def unknown_key(schema: type[Section], path: tuple[str, ...]) -> str:
    """The message for a key that does not exist, with the nearest one that does."""
    dotted = ".".join(path)
    section: type[Section] | None = schema
    for depth in range(1, len(path)):
        section = section_of(schema, path[:depth])
        if section is None and _field(schema, path[:depth]) is None:
            return unknown_key(schema, path[:depth])
        if section is None:
            return f"{dotted}: unknown key; {'.'.join(path[:depth])} is one setting, not a section of keys"
    assert section is not None
    keys = all_keys(schema)
    inside = ".".join((*path[:-1], ""))
    same_name = [key for key in keys if key.split(".")[-1] == path[-1]]
    near_here = nearest(path[-1], section.model_fields)
    near = nearest(path[-1], [key.split(".")[-1] for key in keys], 0.8)
    suggested = (
        [key for key in same_name if key.startswith(inside)]
        or same_name
        or ([f"{inside}{near_here}"] if near_here else [])
        or [key for key in keys if key.split(".")[-1] == near]
    )
    if suggested:
        return f"{dotted}: unknown key; did you mean {' or '.join(suggested)}?"
    return f"{dotted}: unknown key; allowed here: {', '.join(section.model_fields)}"


def takes_text(annotation: Any) -> bool:
    """Whether any text is a valid value of a field with this annotation."""
    return annotation is str or str in typing.get_args(annotation)


def options_of(annotation: Any) -> list[Any]:
    """The values of a ``Literal``, alone or in a union."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [option for part in typing.get_args(annotation) for option in options_of(part)]


def _field(schema: type[Section], path: tuple[str, ...]) -> FieldInfo | None:
    section = section_of(schema, path[:-1]) if path else None
    return section.model_fields.get(path[-1]) if section else None


def _split(schema: type[Section], location: tuple[Any, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """``location`` as keys and then list positions, without the parts that name the branch of a union."""
    keys: list[str] = []
    current: type[Section] | None = schema
    for part in location:
        if current is None:
            break
        keys.append(str(part))
        current = section_of(current, (str(part),))
    return tuple(keys), tuple(part for part in location[len(keys) :] if isinstance(part, int))


def _entry(schema: type[Section], location: tuple[Any, ...]) -> tuple[str, type[Section], tuple[Any, ...]]:
    """Where ``location`` leads into an entry of a list of sections: the entry, its class, and the way from there."""
    for depth in range(1, len(location) - 1):
        names, position = location[:depth], location[depth]
        if not (isinstance(position, int) and all(isinstance(name, str) for name in names)):
            continue
        field = _field(schema, names)
        inner = next(iter(typing.get_args(field.annotation)), None) if field is not None else None
        if isinstance(inner, type) and issubclass(inner, Section):
            return f"{'.'.join(names)}[{position}].", inner, location[depth + 1 :]
    return "", schema, location


def _bounds(annotation: Any) -> Iterator[Any]:
    """The bounds written anywhere in an annotation or field."""
    if isinstance(annotation, Ge | Gt | Le | Lt):
        yield annotation
    elif isinstance(annotation, FieldInfo):
        for part in (*annotation.metadata, annotation.annotation):
            yield from _bounds(part)
    elif typing.get_origin(annotation) in (Annotated, typing.Union, types.UnionType, tuple):
        for part in typing.get_args(annotation):
            yield from _bounds(part)


def _range(field: FieldInfo, broken: str) -> str:
    """``at least 0 and below 1``. The largest size that is taken at all is named where it is what is ``broken``."""
    found = list(_bounds(field))
    words = []
    for kind, attribute, word in _BOUNDS:
        limits = {getattr(bound, attribute) for bound in found if isinstance(bound, kind)}
        if kind is Le and broken != "less_than_equal":
            limits = {limit for limit in limits if limit < 1e6}
        if kind is Ge and limits:
            limits = {max(limits)}
        words += [f"{word} {limit:g}" if limit < 1e6 else f"{word} {limit}" for limit in sorted(limits)]
    return " and ".join(words)


def _or_null(field: FieldInfo | None) -> str:
    return " or null" if field is not None and type(None) in typing.get_args(field.annotation) else ""


def _entries(field: FieldInfo | None) -> str:
    """How many entries a list of fixed length has."""
    parts = typing.get_args(field.annotation) if field is not None else ()
    return f"a list of {len(parts)} numbers{_or_null(field)}"


def _reason(field: FieldInfo | None) -> str:
    """Where only one value is allowed, the field's description says why."""
    return f" ({field.description})" if field is not None and field.description else ""


def _expected(value: Any, options: list[Any], types: list[str], null: str, field: FieldInfo | None) -> str:
    """What is wrong with a value that is none of ``options`` and of none of ``types``."""
    if not options:
        return f"has the wrong type; must be {' or '.join(types)}{null}"
    names = [str(option).lower() if isinstance(option, bool) else str(option) for option in options]
    near = nearest(value, names)
    hint = f"; did you mean {near}?" if near else ""
    why = _reason(field) if len(options) == 1 and not types else ""
    return f"is not allowed; allowed: {' or '.join([', '.join(names), *types])}{null}{why}{hint}"


def show(value: Any) -> str:
    """``value`` as YAML would have it, shortened, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(_lists(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _lists(value: Any) -> Any:
    return [_lists(part) for part in value] if isinstance(value, tuple) else value


def explain(error: ValidationError, schema: type[Section]) -> str:
    """The first problem in one line, and how many more there are."""
    problems: dict[str, str] = {}
    wrong_types: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False)[:_MOST]:
        kind, value = detail["type"], detail["input"]
        entry, owner, location = _entry(schema, detail["loc"])
        context = detail.get("ctx", {})
        path, positions = _split(owner, location)
        field = _field(owner, path)
        if kind in _COUNTS:
            positions = ()
        dotted = entry + ".".join(path) + "".join(f"[{position}]" for position in positions)
        if kind == "extra_forbidden":
            message = entry + unknown_key(owner, path)
        elif kind == "invalid_key":
            parent = entry + ".".join(path[:-1])
            message = f"{parent or 'the config'}: {show(value)} is not a key; keys are names"
        elif kind == "conflict":
            dotted = f"{dotted}.{context['key']}" if dotted else context["key"]
            message = f"{dotted}: {context['problem']}"
        elif (kind == "literal_error" and field is not None) or kind in _TYPES:
            # One detail for each branch of a union: name them all, unless one of them took the type.
            if dotted in problems and dotted not in refused and dotted not in wrong_types:
                continue
            options, types = refused.setdefault(dotted, []), wrong_types.setdefault(dotted, [])
            if kind == "literal_error":  # of this branch: 'left', 'middle' or 'right'
                options += ast.literal_eval(f"[{context['expected'].replace(' or ', ', ')}]")
            else:
                types.append(_TYPES[kind])
            null = "" if positions else _or_null(field)
            problems[dotted] = f"{dotted}: {show(value)} {_expected(value, options, types, null, field)}"
            continue
        elif kind == "none_required":
            message = f"{dotted}: {show(value)} is not allowed; allowed: null{_reason(field)}"
        elif kind in _OUT_OF_RANGE and field is not None:
            null = "," + _or_null(field) if not positions and _or_null(field) else ""
            message = f"{dotted}: {show(value)} is out of range; must be {_range(field, kind)}{null}"
        elif kind == "multiple_of":
            message = f"{dotted}: {show(value)} is out of range; must be a multiple of {context['multiple_of']}"
        elif kind == "finite_number":
            message = f"{dotted}: {show(value)} is out of range; must be a finite number"
        elif kind in _COUNTS:
            message = f"{dotted}: {show(value)} has the wrong number of entries; must be {_entries(field)}"
        else:
            message = f"{dotted}: {show(value)} is not allowed: {detail['msg']}"
        problems.setdefault(dotted, message)
    # Of a union, the branch that got further into the value says more.
    lines = [message for key, message in problems.items() if not any(other.startswith(f"{key}[") for other in problems)]
    at_least = "at least " if error.error_count() > _MOST else ""
    others = len(lines) - 1
    more = f" (and {at_least}{others} more problem{'s' if others > 1 else ''})" if others else ""
    return lines[0] + more
