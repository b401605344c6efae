"""Old keys that still load. Each warns, and says what to write instead."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

from stackwise.errors import ConfigError

OLD_KEYS = ("model.n_blocks", "model.architecture.n_blocks")


def migrate(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """``data`` in today's keys, and one sentence for each old key that was replaced.

    ``n_blocks`` (under ``model`` or ``model.architecture``) counted the Blocks of the whole Rack.
    """
    data = copy.deepcopy(data)
    notes: list[str] = []
    model = data.get("model")
    if not isinstance(model, dict):
        return data, notes
    architecture = model.get("architecture")
    architecture = {} if architecture is None else architecture
    if not isinstance(architecture, dict):
        return data, notes
    found = [
        (where, section)
        for where, section in (("model", model), ("model.architecture", architecture))
        if "n_blocks" in section
    ]
    for where, section in found:
        n_blocks = section.pop("n_blocks")
        n_stacks = architecture.get("n_stacks", 1)
        if isinstance(n_blocks, bool) or not isinstance(n_blocks, int) or n_blocks < 1:
            raise ConfigError(f"{where}.n_blocks: {n_blocks!r} is not allowed; must be a whole number, at least 1")
        if isinstance(n_stacks, bool) or not isinstance(n_stacks, int) or n_stacks < 1 or n_blocks % n_stacks:
            raise ConfigError(
                f"{where}.n_blocks: {n_blocks} cannot be divided among n_stacks ({n_stacks!r}); "
                "set model.architecture.blocks_per_stack"
            )
        per_stack = n_blocks // n_stacks
        if architecture.get("blocks_per_stack", per_stack) != per_stack:
            raise ConfigError(
                f"{where}.n_blocks: {n_blocks} contradicts model.architecture.blocks_per_stack "
                f"({architecture['blocks_per_stack']!r}); keep blocks_per_stack"
            )
        architecture.update(n_stacks=n_stacks, blocks_per_stack=per_stack)
        model["architecture"] = architecture
        notes.append(
            f"{where}.n_blocks is deprecated; write model.architecture: "
            f"{{n_stacks: {n_stacks}, blocks_per_stack: {per_stack}}}"
        )
    return data, notes


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
