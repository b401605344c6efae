"""StackWise trains transformers from scratch, Stack by Stack, inside a memory budget."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """``stackwise.load``, fetched when it is first asked for: importing the package imports no torch."""
    if name == "load":
        from stackwise.runs.run import load

        return load
    raise AttributeError(f"module 'stackwise' has no attribute {name!r}")
