"""The manifest of a checkpoint: which objects it consists of, what it says beside them, and what it keeps."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise.reading import read_object
from stackwise.store.objects import StoredObject, object_of

FORMAT_VERSION = 1


class UnknownFormat(ValueError):
    """A manifest of another version."""


@dataclass(frozen=True)
class Manifest:
    """One checkpoint.

    Attributes:
        parts: the object of each part.
        state: what the run says beside its tensors.
        keep: it stays, however many follow.
        needs: steps of the checkpoints that stay as long as this one does.
    """

    step: int
    parts: dict[str, StoredObject]
    state: dict[str, Any]
    keep: bool = False
    needs: tuple[int, ...] = ()


def bytes_of_manifest(manifest: Manifest) -> bytes:
    """JSON that ends in the hash of all before it."""
    data: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "step": manifest.step,
        "parts": {name: {"object": entry.sha256, "bytes": entry.bytes} for name, entry in manifest.parts.items()},
        "keep": manifest.keep,
        "needs": list(manifest.needs),
        "state": manifest.state,
    }
    return json.dumps({**data, "sha256": _digest_of(data)}, allow_nan=False, indent=1).encode() + b"\n"


def read_manifest(path: Path, step: int) -> Manifest:
    """The manifest in ``path``, which is that of ``step``.

    Raises:
        OSError: it cannot be read.
        UnknownFormat: it is of another version.
        ValueError, TypeError, KeyError, AttributeError: it is damaged.
    """
    data = read_object(path)
    digest = data.pop("sha256")
    if digest != _digest_of(data):
        raise ValueError("its content does not match its sha256")
    if type(data["step"]) is not int or data["step"] != step:
        raise ValueError(f"it belongs to step {data['step']}")
    if data["format"] != FORMAT_VERSION:
        raise UnknownFormat(
            f"the checkpoint of step {step} has format {data['format']} in {path}; "
            f"this version of StackWise reads {FORMAT_VERSION}"
        )
    parts = {name: object_of(entry["object"], entry["bytes"]) for name, entry in data["parts"].items()}
    if not isinstance(data["state"], dict):
        raise ValueError("its state is no object")
    keep, needs = data.get("keep", False), data.get("needs", [])
    if type(keep) is not bool or not isinstance(needs, list) or any(type(other) is not int for other in needs):
        raise ValueError("what it keeps is no list of steps")
    return Manifest(step, parts, data["state"], keep, tuple(needs))


def _digest_of(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest's canonical JSON (keys sorted, no spaces), its own ``sha256`` left out."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
