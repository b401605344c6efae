"""``StackWiseConfig``: reading, writing, overriding and checking a run's settings."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator
from pydantic.fields import FieldInfo

from stackwise.config import rules, shipped, yaml_io
from stackwise.config.legacy import LOADS, load_legacy
from stackwise.config.messages import explain, section_of, takes_text, unknown_key
from stackwise.config.model import ArchitectureConfig, ModelConfig
from stackwise.config.run import Settings
from stackwise.config.section import Section
from stackwise.errors import ConfigError

__all__ = ["ArchitectureConfig", "ModelConfig", "StackWiseConfig"]

_YAML_VALUE = re.compile(r"['\"\[]|(~|null)?$")
_NOT_A_MAPPING = "a config is a mapping with the sections model, training and data"


class StackWiseConfig(Settings):
    """All settings of a run: ``model``, ``training`` and ``data``. Immutable; ``changed`` gives a changed copy.

    Reading raises ``ConfigError`` with one line that names the key, the value and what is allowed.
    """

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        rules.check(self)
        return self

    @classmethod
    def from_dict(cls, data: dict[str, Any] | None, overrides: Iterable[str] = (), source: str = "") -> Self:
        """Builds from nested dicts; keys left out take their defaults. Old keys load with a warning.

        Args:
            overrides: ``key.path=value`` settings, applied first.
            source: the file that ``data`` comes from, for messages.
        """
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise ConfigError(f"{_NOT_A_MAPPING}, not {type(data).__name__}")
        data = apply_overrides(data, overrides)
        where = f"{source}: " if source else ""
        try:
            return cls.model_validate(load_legacy(data))
        except ValidationError as error:
            raise ConfigError(f"{where}{explain(error, cls)}") from None
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from None

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Reads a YAML file and applies ``key.path=value`` overrides."""
        return cls.from_dict(read_yaml(path), overrides, str(path))

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """A copy with some settings changed: ``config.changed({"training.max_steps": 30, "model.window": None})``.

        Args:
            changes: by the dotted key of a setting, its value, of the type that the setting has; by that of a section,
                a dict. Setting one of several alternatives, such as the budgets, clears the others.
        """
        return self.from_dict(_with(self.to_dict(), changes.items()))

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts and lists, every key present; ``from_dict`` reads them back exactly."""
        return self.model_dump(mode="json")

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The YAML text of all settings; also written to ``path`` when given."""
        text = yaml_io.dump(self.to_dict())
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def validate(self) -> None:  # type: ignore[override]
        """Checks everything again. A config that exists has already passed; kept for callers that ask."""
        self.from_dict(self.to_dict())

    def fingerprint(self) -> str:
        """A short hash of all settings."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def dotted(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys; lists and empty sections whole."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def why_fixed(key: str) -> str | None:
    """Why the setting with a dotted ``key`` may not change in mid-run; None where it may."""
    reason, path = "", tuple(key.split("."))
    for depth, name in enumerate(path):
        section = section_of(StackWiseConfig, path[:depth])
        if section is None:
            break
        if name in section.steerable:
            return None
        reason = section.fixed or reason
    return reason


def read_text(path: str | Path) -> str:
    """The text of a YAML file, or of a config that comes with the package. Raises ``ConfigError`` in one line."""
    path = Path(path)
    try:
        if path.is_fifo() and not path.is_relative_to("/dev"):  # the shell's <(…) is below /dev
            raise ConfigError(f"{path}: is a named pipe; give a regular file")
        with open(shipped.locate(path), "rb") as file:
            content = file.read(yaml_io.MAX_BYTES + 1)  # one more than is parsed
        return content.decode("utf-8", "replace" if len(content) > yaml_io.MAX_BYTES else "strict")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file{shipped.hint(path)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a config: the file is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a config: {error.strerror or error}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; empty for an empty file. Raises ``ConfigError`` in one line."""
    data = yaml_io.parse(read_text(path), str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: {_NOT_A_MAPPING}, not {type(data).__name__}")
    return data


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``data`` with each ``key.path=value`` set; the path must name a known key or section.

    Values are YAML, except that a key that takes text takes it as written (``data.path=*.txt``) unless it is quoted,
    bracketed or null. Setting one of several alternatives, such as the budgets, clears the others.
    """
    return _with(data, [_parsed(item) for item in overrides])


def as_override(key: str, value: Any) -> str:
    """``key.path=value``, which ``apply_overrides`` reads back as ``value``."""
    return f"{key}={yaml_io.inline(value)}"


def _parsed(override: str) -> tuple[str, Any]:
    """``key.path=value`` as the key and the value."""
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{override!r} is not an override; write key.path=value, for example training.seed=1")
    _, field = _setting(key)
    if field is not None and takes_text(field.annotation) and not _YAML_VALUE.match(text):
        return key, text
    return key, yaml_io.parse(text, f"the value of {key}")


def _setting(key: str) -> tuple[type[Section] | None, FieldInfo | None]:
    """The section that ``key`` belongs to, and its field; ``None`` for old keys, ConfigError for unknown ones."""
    path = tuple(key.split("."))
    section = section_of(StackWiseConfig, path[:-1])
    field = section.model_fields.get(path[-1]) if section else None
    if field is None and key not in LOADS:
        raise ConfigError(unknown_key(StackWiseConfig, path))
    return section, field


def _with(data: dict[str, Any], changes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """``data`` with ``changes`` made in turn."""
    data = copy.deepcopy(data)
    chosen: set[str] = set()
    for key, value in changes:
        path = tuple(key.split("."))
        section, _ = _setting(key)
        node = data
        for depth, name in enumerate(path[:-1], 1):
            child = node.get(name)
            if child is None:
                child = node[name] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"{'.'.join(path[:depth])}: {child!r} has the wrong type; must be a section of keys")
            node = child
        if value is not None and section and path[-1] in section.alternatives:
            chosen.add(key)
            for other in section.alternatives:
                if ".".join((*path[:-1], other)) not in chosen:
                    node.pop(other, None)
        node[path[-1]] = value
    return data
