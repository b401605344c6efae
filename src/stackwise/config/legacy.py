"""Old keys that still load. Each warns, and says what to write instead; ``stackwise migrate`` rewrites the file."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

from stackwise.config.old_keys import OLD_KEYS, Old
from stackwise.errors import ConfigError

BLOCKS = ("model.n_blocks", "model.architecture.n_blocks")
LOADS = (*BLOCKS, *(old.key for old in OLD_KEYS if old.loads))
"""Keys that are read, though they are not in the schema."""


def migrate(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """``data`` in today's keys where it has old ones that load, and one sentence for each of these.

    Raises:
        ConfigError: for old keys that do not load, with what to write; ``n_blocks`` that cannot be meant.
    """
    data = copy.deepcopy(data)
    notes: list[str] = []
    for old in OLD_KEYS:
        *names, last = old.key.split(".")
        section: Any = data
        for name in names:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and last in section and old.to != old.key:
            notes += _replaced(old, data, section, last)
    return data, notes + _blocks(data)


def _replaced(old: Old, data: dict[str, Any], section: dict[str, Any], last: str) -> list[str]:
    """Moves the value of ``old``, which is ``section[last]``, to its key of today."""
    if not old.loads and old.to:
        raise ConfigError(f"{old.key}: unknown key; did you mean {old.to}?")
    if not old.loads:
        raise ConfigError(f"{old.key}: this key no longer exists; {old.why} (stackwise migrate rewrites old configs)")
    value, target = section.pop(last), data
    if isinstance(value, str | bool) and value in old.values:
        value = old.values[value]
        if not value:  # what every run used to write, and the default still
            return []
    *names, key = old.to.split(".")
    for name in names:
        target = target.setdefault(name, {}) if isinstance(target, dict) else {}
    if not isinstance(target, dict) or target.get(key, value) != value:
        raise ConfigError(f"{old.key}: {value!r} contradicts {old.to}; keep {old.to}")
    target[key] = value
    return [f"{old.key} is deprecated; write {'.'.join(names)}: {{{key}: {value}}}"]


def blocks_in_stacks(key: str, n_blocks: Any, n_stacks: Any, blocks_per_stack: Any) -> int:
    """Blocks in each of ``n_stacks`` Stacks where ``key`` counts those of the whole Rack; ConfigError if none fits."""
    if isinstance(n_blocks, bool) or not isinstance(n_blocks, int) or n_blocks < 1:
        raise ConfigError(f"{key}: {n_blocks!r} is not allowed; must be a whole number, at least 1")
    if isinstance(n_stacks, bool) or not isinstance(n_stacks, int) or n_stacks < 1 or n_blocks % n_stacks:
        raise ConfigError(
            f"{key}: {n_blocks} cannot be divided among n_stacks ({n_stacks!r}); "
            "set model.architecture.blocks_per_stack"
        )
    per_stack = n_blocks // n_stacks
    if blocks_per_stack not in (None, per_stack):
        raise ConfigError(
            f"{key}: {n_blocks} contradicts model.architecture.blocks_per_stack "
            f"({blocks_per_stack!r}); keep blocks_per_stack"
        )
    return per_stack


def _blocks(data: dict[str, Any]) -> list[str]:
    """Replaces ``n_blocks``, which counted the Blocks of the whole Rack."""
    notes = list[str]()
    model = data.get("model")
    architecture = model.get("architecture") if isinstance(model, dict) else None
    architecture = {} if architecture is None else architecture
    if not isinstance(model, dict) or not isinstance(architecture, dict):
        return notes
    for key, section in zip(BLOCKS, (model, architecture)):
        if "n_blocks" not in section:
            continue
        n_stacks = architecture.get("n_stacks", 1)
        per_stack = blocks_in_stacks(key, section.pop("n_blocks"), n_stacks, architecture.get("blocks_per_stack"))
        architecture.update(n_stacks=n_stacks, blocks_per_stack=per_stack)
        model["architecture"] = architecture
        notes.append(
            f"{key} is deprecated; write model.architecture: {{n_stacks: {n_stacks}, blocks_per_stack: {per_stack}}}"
        )
    return notes


class OldKeyWarning(DeprecationWarning):
    """An old config key was read; the message says what to write instead."""


def load_legacy(data: dict[str, Any]) -> dict[str, Any]:
    """``migrate`` that warns, at the first caller outside this package."""
    data, notes = migrate(data)
    for note in notes:
        warnings.warn(note, OldKeyWarning, stacklevel=_depth_of_caller())
    return data


def _depth_of_caller() -> int:
    """``stacklevel`` that points a warning of the calling function at the code that uses this package."""
    depth, frame = 1, inspect.currentframe()
    frame = frame.f_back if frame else None
    while frame and frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] == "stackwise":
        depth, frame = depth + 1, frame.f_back
    return depth
