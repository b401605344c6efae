"""Old keys that still load. Each warns, and says what to write instead."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

from stackwise.errors import ConfigError

OLD_KEYS = ("model.n_blocks", "model.architecture.n_blocks")

_GONE = {
    "time_step_masking": "training.progressive: {training_objective: diffusion, time_interpretation: depth}",
    "num_time_steps": "model.architecture.n_stacks, one Stack for each interval of noise levels",
    "time_step_mask_fractions": "training.diffusion.levels, a list of rates from 1 down to 0, or for mlm "
    "training.masking.stack_rates, one rate a Stack",
}
"""Old keys of ``training`` (or its section ``progressive``) whose meaning has moved: what to write."""

_RENAMED = {"mask_fraction_min": "rate", "mask_fraction_max": "max_rate"}
"""Old keys of the same place that are now keys of ``training.masking``."""


def migrate(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """``data`` in today's keys, and one sentence for each old key that was replaced.

    ``n_blocks`` (under ``model`` or ``model.architecture``) counted the Blocks of the whole Rack.
    """
    data = copy.deepcopy(data)
    notes = _old_masking(data)
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


def _old_masking(data: dict[str, Any]) -> list[str]:
    """Moves the old rates of masking in ``data``; refuses old keys that nothing can stand for, with the new ones."""
    training, notes = data.get("training"), list[str]()
    if not isinstance(training, dict):
        return notes
    for where, section in (("training", training), ("training.progressive", training.get("progressive"))):
        if not isinstance(section, dict):
            continue
        for key, instead in _GONE.items():
            if key in section:
                raise ConfigError(f"{where}.{key}: this key no longer exists; write {instead}")
        for key, name in _RENAMED.items():
            if key not in section:
                continue
            masking = training.setdefault("masking", {})
            value = section.pop(key)
            if not isinstance(masking, dict) or masking.get(name, value) != value:
                raise ConfigError(
                    f"{where}.{key}: {value!r} contradicts training.masking.{name}; keep training.masking.{name}"
                )
            masking[name] = value
            notes.append(f"{where}.{key} is deprecated; write training.masking: {{{name}: {value}}}")
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
