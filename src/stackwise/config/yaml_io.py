"""YAML as people expect it (PyYAML reads the older YAML 1.1).

``1e-3`` is a number, ``1e9`` a whole one, a date is text, and a key written twice is an error.
Writing follows the same rules, so that what is written reads back equal.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

import yaml

from stackwise.errors import ConfigError

_EXPONENT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+$")
_FLOAT = "tag:yaml.org,2002:float"


class Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2 floats, no timestamps and no duplicate keys."""


class Dumper(yaml.SafeDumper):
    """Quotes the text that ``Loader`` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (Loader, Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))


def _mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"line {line}: a key must be a name, not a list or a mapping")
        key = loader.construct_object(key_node)
        if key in seen:
            raise ConfigError(f"line {line}: the key {key!r} is written twice in one section; keep one")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _float(loader: Loader, node: yaml.ScalarNode) -> float | int:
    """A number with an exponent that is whole (``1e9``) is an int, as its reader meant it."""
    value = yaml.SafeLoader.construct_yaml_float(loader, node)
    if _EXPONENT.match(node.value) and math.isfinite(value) and value.is_integer() and abs(value) < 2**63:
        return int(Decimal(node.value))
    return value


Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
Loader.add_constructor(_FLOAT, _float)


def _text(dumper: Dumper, value: str) -> yaml.ScalarNode:
    """Text with a line break is quoted, so that every value stays on its key's line."""
    style = '"' if len(value.splitlines()) > 1 or value != value.strip() else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


Dumper.add_representer(str, _text)


def parse(text: str, where: str) -> Any:
    """Parses YAML ``text``; ``where`` names it in errors. Raises ``ConfigError``."""
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
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply for a config") from None
    except ValueError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def dump(data: Any) -> str:
    """A document, keys in order, sections without subsections on one line where they fit."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True)


def inline(value: Any) -> str:
    """One value on one line, as it stands after ``key:``."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").rstrip("\n")
