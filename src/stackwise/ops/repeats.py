"""Loops whose passes are equal, and dry runs that make one pass for all of them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack


class Counting(TorchDispatchMode):
    """A mode that counts what operations cost. ``times``: how often the current one stands for itself."""

    times = 1


def chunk_starts(tensor: Tensor, rows: int) -> Iterator[int]:
    """The first row of each chunk of ``rows`` rows of ``tensor``; the last one may be shorter.

    Under a ``Counting`` mode, a fake tensor gives the first chunk once for all that are equal to it, and then the last
    one: a plan for a hundred million tokens takes as long as one for a thousand.
    """
    n = tensor.shape[0]
    modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Counting)]
    if not modes or not isinstance(tensor, FakeTensor) or n <= 2 * rows:
        yield from range(0, n, rows)
        return
    last = (n - 1) // rows * rows
    for mode in modes:
        mode.times *= last // rows
    yield 0
    for mode in modes:
        mode.times //= last // rows
    yield last
