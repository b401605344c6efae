"""``StackWiseConfig``: reading, writing, overriding and checking a run's settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from stackwise.config import yaml_io
from stackwise.config.legacy import load_legacy
from stackwise.config.messages import explain, section_of, unknown_key
from stackwise.config.schema import ArchitectureConfig, ModelConfig, StackWiseConfigFields
from stackwise.errors import ConfigError

__all__ = ["ArchitectureConfig", "ModelConfig", "StackWiseConfig"]


class StackWiseConfig(StackWiseConfigFields):
    """All settings of a run: ``model``, ``training`` and ``data``. Immutable; ``override`` gives a changed copy.

    Reading raises ``ConfigError`` with one line that names the key, the value and what is allowed.
    """

    @classmethod
    def from_dict(cls, data: dict[str, Any] | None) -> Self:
        """Builds from nested dicts; keys left out take their defaults. Old keys load with a warning."""
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise ConfigError(f"a config is a mapping of model, training and data, not {type(data).__name__}")
        try:
            return cls.model_validate(load_legacy(data))
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from None

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Reads a YAML file and applies ``key.path=value`` overrides."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such config file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as a config: {error}") from None
        data = yaml_io.parse(text, str(path))
        if data is not None and not isinstance(data, dict):
            raise ConfigError(f"{path}: a config is a mapping of model, training and data, not a {type(data).__name__}")
        try:
            return cls.from_dict(apply_overrides(data or {}, overrides))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def override(self, overrides: Iterable[str]) -> Self:
        """A copy with ``key.path=value`` settings changed; values are YAML."""
        return self.from_dict(apply_overrides(self.to_dict(), overrides))

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


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``data`` with each ``key.path=value`` set; the path must name a known key or section."""
    data = json.loads(json.dumps(data)) if data else {}
    for item in overrides:
        key, equals, text = item.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(f"{item!r} is not an override; write key.path=value, for example training.seed=1")
        section = section_of(StackWiseConfig, path[:-1])
        if path[-1] != "n_blocks" and (section is None or path[-1] not in section.model_fields):
            raise ConfigError(unknown_key(StackWiseConfig, path))
        node = data
        for name in path[:-1]:
            child = node.setdefault(name, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{key}: {name} is {child!r} in the file, not a section of keys")
            node = child
        node[path[-1]] = yaml_io.parse(text, f"the value of {key}")
    return data
