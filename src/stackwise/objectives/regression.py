"""A number for each sequence.

B sequences, T tokens.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from stackwise.config.base import StackWiseConfig
from stackwise.data.batches import Batch
from stackwise.data.tokenizers import Tokenizer
from stackwise.model.architecture import Rack
from stackwise.objectives.base import Example, Score
from stackwise.objectives.sequences import SequenceObjective, pooling_of


class RegressionObjective(SequenceObjective):
    """Predicts one number for each sequence, by the head's first row; the loss is the mean squared error."""

    name = "regression"
    is_likelihood = False
    key = "training.progressive.training_objective"

    @classmethod
    def from_config(cls, config: StackWiseConfig, tokenizer: Tokenizer | None) -> Self:
        return cls(1, pooling_of(config))

    @classmethod
    def planned(cls, config: StackWiseConfig, vocab_size: int) -> Self:
        return cls(1, "mean")

    def corrupt(self, batch: Batch) -> Example:
        example = super().corrupt(batch)
        # Every row counts, whatever its number: no number means that there is none.
        return Example(example.reading, example.targets, counted=torch.ones(len(example.targets), dtype=torch.int64))

    def typical(self, inputs: Tensor) -> Example:
        return Example(self.read(inputs), inputs[:, 0].float())

    def terms(self, rack: Rack, example: Example) -> tuple[Tensor, Tensor]:
        """(B,): the squared error of each sequence, in fp32; and that none counts as right."""
        found = rack.logits(self.pooled(rack, example.reading), classes=self.outputs)[:, 0]
        errors = (found.float() - example.targets).square()
        return errors, torch.zeros_like(errors, dtype=torch.bool)

    def loss(self, rack: Rack, example: Example, scale: float) -> Tensor:
        return scale * self.terms(rack, example)[0].sum()

    @torch.no_grad()
    def score(self, rack: Rack, batch: Batch) -> Score:
        example = self.corrupt(batch)
        assert example.counted is not None
        errors, _ = self.terms(rack, example.to(rack.device))
        return Score(errors.cpu().double().numpy(), example.counted.numpy(), 0, 0)
