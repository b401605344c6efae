"""The class of a sequence.

B sequences, T tokens, C width, N classes.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor

from stackwise.config.base import StackWiseConfig
from stackwise.config.objectives import ClassificationConfig
from stackwise.data.batches import Batch
from stackwise.data.tokenizers import Tokenizer
from stackwise.errors import UserError
from stackwise.model.architecture import Rack
from stackwise.model.reading import Reading
from stackwise.objectives.base import CrossEntropyObjective, Example, Score, scored


class ClassificationObjective(CrossEntropyObjective):
    """Predicts one class for each sequence, from what the head reads at its last token, or on average.

    The rows 0 to N − 1 of the head score the classes, so a Rack needs no other parts for it, and one trained with any
    objective can go on with this one. Batches come from a data loader that gives ``labels`` (B,).

    Args:
        settings: ``training.classification``.
        pooling: ``last`` (real token) or ``mean`` (over real tokens).
    """

    name = "classification"
    predicts_every_token = False

    def __init__(self, settings: ClassificationConfig, pooling: Literal["last", "mean"]) -> None:
        self.classes, self.pooling = settings.classes, pooling

    @classmethod
    def from_config(cls, config: StackWiseConfig, tokenizer: Tokenizer | None) -> Self:
        settings = config.training.classification
        return cls(settings, settings.pooling or ("last" if config.attention_mode == "causal" else "mean"))

    @classmethod
    def planned(cls, config: StackWiseConfig, vocab_size: int) -> Self:
        return cls(config.training.classification, "mean")

    def corrupt(self, batch: Batch) -> Example:
        if batch.targets is None:
            raise ValueError("the objective classification needs batches with targets (labels)")
        strange = batch.targets[(batch.targets < 0) | (batch.targets >= self.classes)]
        if strange.size:
            raise UserError(
                f"labels: {strange[0]} is out of range; training.classification.classes is {self.classes}, so labels "
                f"are 0 to {self.classes - 1}"
            )
        return Example(Reading(torch.from_numpy(batch.tokens[:, :-1])), torch.from_numpy(batch.targets))

    def typical(self, inputs: Tensor) -> Example:
        """An example of the shapes that a step of sequences (B, T) has."""
        return Example(Reading(inputs), inputs[:, 0])

    def pooled(self, rack: Rack, reading: Reading) -> Tensor:
        """(B, C): of each sequence, what the head's matrix reads."""
        if rack.vocab_size < self.classes:
            raise UserError(
                f"training.classification.classes: {self.classes}, but the head has {rack.vocab_size} rows "
                "(model.vocab_size)"
            )
        hidden, mask = rack(reading), reading.attention_mask
        if self.pooling == "mean":
            if mask is None:
                return hidden.mean(dim=1)
            real = mask[..., None].to(hidden.dtype)
            return (hidden * real).sum(dim=1) / real.sum(dim=1).clamp(min=1.0)
        if mask is None:
            return hidden[:, -1]
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
        return hidden[torch.arange(len(last), device=mask.device), last]

    def logits(self, rack: Rack, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) ids, and a boolean (B, T) where there is padding → (B, N)."""
        return rack.logits(self.pooled(rack, Reading(input_ids, attention_mask)), classes=self.classes)

    def loss(self, rack: Rack, example: Example, scale: float) -> Tensor:
        return rack.cross_entropy(self.pooled(rack, example.reading), example.targets, scale, classes=self.classes)

    @torch.no_grad()
    def score(self, rack: Rack, batch: Batch) -> Score:
        example = self.corrupt(batch)
        terms, right = self.terms(rack, example.to(rack.device))
        judged = torch.ones_like(right[:, None], device="cpu")
        return scored(Example(example.reading, example.targets[:, None]), terms[:, None], right[:, None], judged)

    def terms(self, rack: Rack, example: Example) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each sequence (B,), and whether its class is the likeliest."""
        return rack.cross_entropy_terms(self.pooled(rack, example.reading), example.targets, classes=self.classes)
