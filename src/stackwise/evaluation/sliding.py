"""Text scored with context: windows that overlap, in which only what no window before has scored counts."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from stackwise.data.batches import Batch, windows
from stackwise.errors import UserError
from stackwise.objectives.base import Example
from stackwise.objectives.causal import CausalObjective
from stackwise.ops.losses import IGNORE


class SlidingContext(CausalObjective):
    """Predicts each token of a text once, from at least ``seq_len`` − ``stride`` tokens before it where there are any.

    Windows begin every ``stride`` tokens, and the last one ends with the text. All tokens but the first are predicted.

    Args:
        tokens: 1-D ids.
        seq_len: of a window; stride: from 1 to ``seq_len``, where the windows no longer overlap.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, stride: int) -> None:
        if not 1 <= stride <= seq_len:
            raise UserError(f"--context-stride: {stride} must be from 1 to {seq_len}, the tokens of a window")
        self._tokens, self._seq_len = tokens, seq_len
        last = len(tokens) - 1 - seq_len
        starts = np.arange(0, last + 1, stride)
        self.starts = starts if starts[-1] == last else np.append(starts, last)
        scored = np.concatenate(([0], self.starts[:-1] + seq_len))  # how many targets the windows before have scored
        self._known = scored - self.starts

    def windows(self, index: NDArray[np.int64], draw: NDArray[np.int64]) -> Batch:
        """The windows of these numbers."""
        return Batch(windows(self._tokens, self.starts[index], self._seq_len), index, draw)

    def corrupt(self, batch: Batch) -> Example:
        example = super().corrupt(batch)
        known = torch.from_numpy(self._known[batch.sample])[:, None]
        seen = torch.arange(example.targets.shape[1]) < known
        return Example(example.reading, example.targets.masked_fill(seen, IGNORE))
