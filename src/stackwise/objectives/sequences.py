"""Objectives of whole sequences: one target for each, from what the head reads of it.

B sequences, T tokens, C width, N outputs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from stackwise.config.base import StackWiseConfig
from stackwise.data.batches import Batch
from stackwise.errors import UserError
from stackwise.model.architecture import Rack
from stackwise.model.reading import Reading
from stackwise.objectives.base import CrossEntropyObjective, Example
from stackwise.ops.pooling import Pooling, pool


def pooling_of(config: StackWiseConfig) -> Pooling:
    """With causal attention only the last token has seen all others."""
    return "last" if config.attention_mode == "causal" else "mean"


class SequenceObjective(CrossEntropyObjective):
    """Reads sequences whose labels (B,) come with the batch, and gives N outputs for each, from the head's first rows.

    Args:
        outputs: N.
        pooling: of a sequence.
    """

    predicts_every_token = False
    key: ClassVar[str]
    """The setting that N comes from, for messages."""

    def __init__(self, outputs: int, pooling: Pooling) -> None:
        self.outputs, self.pooling = outputs, pooling

    def corrupt(self, batch: Batch) -> Example:
        if batch.targets is None:
            raise ValueError(f"the objective {self.name} needs batches with targets (labels)")
        mask = None if batch.mask is None else torch.from_numpy(batch.mask)
        return Example(Reading(torch.from_numpy(batch.tokens[:, :-1]), mask), torch.from_numpy(batch.targets))

    def read(self, inputs: Tensor) -> Reading:
        """(B, T) ids as a step reads them: with a mask, for rows of files are padded."""
        return Reading(inputs, torch.ones_like(inputs, dtype=torch.bool))

    def pooled(self, rack: Rack, reading: Reading) -> Tensor:
        """(B, C): of each sequence, what the head's matrix reads."""
        if rack.vocab_size < self.outputs:
            raise UserError(f"{self.key}: {self.outputs}, but the head has {rack.vocab_size} rows (model.vocab_size)")
        return pool(rack(reading), reading.attention_mask, self.pooling)

    def logits(self, rack: Rack, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) ids, and a boolean (B, T) where there is padding → (B, N)."""
        return rack.logits(self.pooled(rack, Reading(input_ids, attention_mask)), classes=self.outputs)
