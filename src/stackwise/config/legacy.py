"""Old keys that still load. Each warns, and says what to write instead."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from stackwise.errors import ConfigError


def migrate(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """``data`` in today's keys, and one sentence for each old key that was replaced.

    ``n_blocks`` (under ``model`` or ``model.architecture``) counted the Blocks of the whole Rack.
    """
    data = copy.deepcopy(data)
    notes: list[str] = []
    model = data.get("model")
    if not isinstance(model, dict):
        return data, notes
    architecture = model.get("architecture", {})
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
            raise ConfigError(f"{where}.n_blocks: {n_blocks!r} must be a whole number, at least 1")
        if not isinstance(n_stacks, int) or n_stacks < 1 or n_blocks % n_stacks:
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


def load_legacy(data: dict[str, Any]) -> dict[str, Any]:
    """``migrate`` that warns."""
    data, notes = migrate(data)
    for note in notes:
        warnings.warn(note, DeprecationWarning, stacklevel=4)
    return data
