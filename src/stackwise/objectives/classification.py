"""The class of a sequence.

B sequences, T tokens, C width, N classes.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from stackwise.config.base import StackWiseConfig
from stackwise.config.objectives import ClassificationConfig
from stackwise.data.batches import Batch
from stackwise.data.tokenizers import Tokenizer
from stackwise.errors import UserError
from stackwise.model.architecture import Rack
from stackwise.objectives.base import Example, Score, scored
from stackwise.objectives.sequences import SequenceObjective, pooling_of
from stackwise.ops.pooling import Pooling


class ClassificationObjective(SequenceObjective):
    """Predicts one class for each sequence.

    The rows 0 to N − 1 of the head score the classes, so a Rack needs no other parts for it, and one trained with any
    objective can go on with this one.

    Args:
        settings: ``training.classification``.
    """

    name = "classification"
    key = "training.classification.classes"

    def __init__(self, settings: ClassificationConfig, pooling: Pooling) -> None:
        super().__init__(settings.classes, pooling)

    @classmethod
    def from_config(cls, config: StackWiseConfig, tokenizer: Tokenizer | None) -> Self:
        settings = config.training.classification
        return cls(settings, settings.pooling or pooling_of(config))

    @classmethod
    def planned(cls, config: StackWiseConfig, vocab_size: int) -> Self:
        return cls(config.training.classification, "mean")

    def corrupt(self, batch: Batch) -> Example:
        if batch.targets is not None:
            strange = batch.targets[(batch.targets < 0) | (batch.targets >= self.outputs)]
            if strange.size:
                raise UserError(
                    f"labels: {strange[0]} is out of range; training.classification.classes is {self.outputs}, so "
                    f"labels are 0 to {self.outputs - 1}"
                )
        return super().corrupt(batch)

    def typical(self, inputs: Tensor) -> Example:
        return Example(self.read(inputs), inputs[:, 0])

    def loss(self, rack: Rack, example: Example, scale: float) -> Tensor:
        return rack.cross_entropy(self.pooled(rack, example.reading), example.targets, scale, classes=self.outputs)

    @torch.no_grad()
    def score(self, rack: Rack, batch: Batch) -> Score:
        example = self.corrupt(batch)
        terms, right = self.terms(rack, example.to(rack.device))
        judged = torch.ones_like(right[:, None], device="cpu")
        return scored(Example(example.reading, example.targets[:, None]), terms[:, None], right[:, None], judged)

    def terms(self, rack: Rack, example: Example) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each sequence (B,), and whether its class is the likeliest."""
        return rack.cross_entropy_terms(self.pooled(rack, example.reading), example.targets, classes=self.outputs)
