"""Settings. The three classes are fetched when they are first asked for: `stackwise --help` needs none of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stackwise.config.base import ArchitectureConfig, ModelConfig, StackWiseConfig

__all__ = ["ArchitectureConfig", "ModelConfig", "StackWiseConfig"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("stackwise.config.base"), name)
    raise AttributeError(f"module 'stackwise.config' has no attribute {name!r}")
