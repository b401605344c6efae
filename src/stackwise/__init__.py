"""StackWise trains transformers from scratch, Stack by Stack, inside a memory budget.

``train``, ``plan``, ``load``, ``generate``, ``evaluate`` and ``embed`` do what the commands of the same names do. They
are fetched when they are first asked for: importing the package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LIES_IN = {
    "embed": "stackwise.evaluation.embed",
    "evaluate": "stackwise.evaluation.evaluate",
    "generate": "stackwise.runs.functions",
    "load": "stackwise.report.notebook",
    "plan": "stackwise.runs.functions",
    "resume": "stackwise.runs.functions",
    "train": "stackwise.runs.functions",
}

__all__ = ["__version__", "embed", "evaluate", "generate", "load", "plan", "resume", "train"]


def __getattr__(name: str) -> Any:
    if name in _LIES_IN:
        return getattr(import_module(_LIES_IN[name]), name)
    raise AttributeError(f"module 'stackwise' has no attribute {name!r}")
