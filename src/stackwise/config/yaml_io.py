"""The one reader and writer of YAML: numbers as people expect them, and limits on what a file may hold.

``010`` is ten, ``1e-3`` a number, ``1e9`` a whole one; ``1:30`` and dates are text; a key written twice is an error
(PyYAML, which follows YAML 1.1, reads eight, text, text, ninety and the second value). Tags give the types of JSON and
no others. Writing follows the same rules, so that what is written reads back equal.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

import yaml

from stackwise.errors import ConfigError

MAX_BYTES = 1 << 20
"""Of a file or text."""
MAX_NODES = 100_000
"""Values in a document, those that aliases repeat counted each time."""
MAX_DEPTH = 32
"""Lists and sections inside each other."""

_INT = re.compile(r"[-+]?(?:0x[0-9a-fA-F][0-9a-fA-F_]*|0o[0-7][0-7_]*|0b[01][01_]*|[0-9][0-9_]*)$")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_BOOL = re.compile(f"(?i:{'|'.join(yaml.SafeLoader.bool_values)})$")
_NULL = re.compile("(?:~|null|Null|NULL)?$")
_TAG = "tag:yaml.org,2002:"
_NUMBER_STARTS = list("-+.0123456789")


class Loader(yaml.SafeLoader):
    """The safe loader with the numbers of YAML 1.2, the types of JSON, no duplicate keys, and the limits above."""

    yaml_constructors = {  # noqa: RUF012 (PyYAML's attribute)
        tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (_TAG + "str", _TAG + "seq", None)
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._n_nodes = self._depth = 0
        self._sizes: dict[int, int] = {}  # id of an anchored node -> nodes in it

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise ConfigError(f"line {line}: the alias *{event.anchor} stands inside the value that it repeats")
            self._n_nodes += self._sizes[id(node)]
        else:
            before = self._n_nodes
            self._n_nodes += 1
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise ConfigError(f"line {line}: nested too deeply (more than {MAX_DEPTH} levels)")
            node = super().compose_node(parent, index)
            self._depth -= 1
            if event.anchor is not None:
                self._sizes[id(node)] = self._n_nodes - before
        if self._n_nodes > MAX_NODES:
            raise ConfigError(f"line {line}: more than {MAX_NODES:,} values, counting those that aliases repeat")
        return node


class Dumper(yaml.SafeDumper):
    """Quotes the text that ``Loader``, or a reader of YAML 1.1, would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _without(*tags: str) -> dict[Any, Any]:
    return {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(_TAG) not in tags]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.yaml_implicit_resolvers = _without("timestamp", "int", "float", "merge")
Dumper.yaml_implicit_resolvers = _without("timestamp")
for _class in (Loader, Dumper):
    _class.add_implicit_resolver(_TAG + "int", _INT, _NUMBER_STARTS)
    _class.add_implicit_resolver(_TAG + "float", _FLOAT, _NUMBER_STARTS)


def _scalar(loader: Loader, node: yaml.Node, what: str, pattern: re.Pattern[str]) -> str:
    """The text of a node whose tag (``!!int``) may have been put on it by hand."""
    text = loader.construct_scalar(node) if isinstance(node, yaml.ScalarNode) else ""
    if not pattern.match(text):
        raise ConfigError(f"line {node.start_mark.line + 1}: {text[:40]!r} is not {what}")
    return text


def _mapping(loader: Loader, node: yaml.Node) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"line {node.start_mark.line + 1}: {str(node.value)[:40]!r} is not a section of keys")
    seen: set[Any] = set()
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"line {line}: a key must be a name, not a list or a mapping")
        key = loader.construct_object(key_node)
        if key in seen:
            raise ConfigError(f"line {line}: the key {key!r} is written twice in one section; keep one")
        seen.add(key)
    return {loader.construct_object(key): loader.construct_object(value, deep=True) for key, value in node.value}


def _int(loader: Loader, node: yaml.Node) -> int:
    text = _scalar(loader, node, "a whole number", _INT).replace("_", "")
    prefix = text.lstrip("+-")[:2]
    base = {"0x": 16, "0o": 8, "0b": 2}.get(prefix, 10)
    if len(text) > 80 or abs(value := int(text, base)) >= 2**63:
        raise ConfigError(
            f"line {node.start_mark.line + 1}: {text[:40]} is out of range; whole numbers are below 2**63"
        )
    return -value if text.startswith("-") and value > 0 else value


def _float(loader: Loader, node: yaml.Node) -> float | int:
    """A number with an exponent that is whole (``1e9``) is an int, as its reader meant it."""
    text = _scalar(loader, node, "a number", _FLOAT).replace("_", "")
    value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if "e" in text.lower() and math.isfinite(value) and value.is_integer() and abs(value) < 2**63:
        return int(Decimal(text))
    return value


def _null(loader: Loader, node: yaml.Node) -> None:
    _scalar(loader, node, "null", _NULL)


def _bool(loader: Loader, node: yaml.Node) -> bool:
    text = _scalar(loader, node, "true or false", _BOOL).lower()
    return yaml.SafeLoader.bool_values[text]


for _name, _constructor in (("null", _null), ("map", _mapping), ("int", _int), ("float", _float), ("bool", _bool)):
    Loader.add_constructor(_TAG + _name, _constructor)


def _text(dumper: Dumper, value: str) -> yaml.ScalarNode:
    """Text with a line break is quoted, so that every value stays on its key's line."""
    style = '"' if len(value.splitlines()) > 1 or value != value.strip() else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


Dumper.add_representer(str, _text)


def parse(text: str, where: str) -> Any:
    """Parses YAML ``text``; ``where`` names it in errors. Raises ``ConfigError``."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where}: larger than {MAX_BYTES:,} bytes, the limit for a config")
    try:
        return yaml.load(text, Loader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}: not valid YAML{at}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def dump(data: Any) -> str:
    """A document, keys in order, sections without subsections on one line where they fit."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True)


def inline(value: Any) -> str:
    """One value on one line, as it stands after ``key:``."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").rstrip("\n")
