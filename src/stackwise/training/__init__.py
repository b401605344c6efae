"""Trains a Rack. The public names below are fetched when they are asked for, each from the room that it is in.

The builder and the trainers are use cases and lie in ``runs``, which imports this package: were they imported here, the
two would import each other.
"""

from importlib import import_module
from typing import Any

_LIES_IN = {
    "ArchitectureTrainer": "stackwise.runs.trainers",
    "PrecisionManager": "stackwise.growth.precision",
    "ProgressiveDataLoader": "stackwise.training.sources",
    "ProgressiveRackBuilder": "stackwise.runs.builder",
    "ProgressiveTrainer": "stackwise.runs.trainers",
}

__all__ = [
    "ArchitectureTrainer",
    "PrecisionManager",
    "ProgressiveDataLoader",
    "ProgressiveRackBuilder",
    "ProgressiveTrainer",
]


def __getattr__(name: str) -> Any:
    if name in _LIES_IN:
        return getattr(import_module(_LIES_IN[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
