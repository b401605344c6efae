"""Where values are multiplied only because they are stored as codes and scales."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

CODING = "stackwise.coding"
"""Name of the region, in a profile and in the planner's dry run."""


def coding() -> AbstractContextManager[Any]:
    """Marks the multiplications inside as encoding or decoding. A compiled graph has no marks: they would split it."""
    return nullcontext() if torch.compiler.is_compiling() else record_function(CODING)
