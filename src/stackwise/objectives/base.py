"""What an objective is: how tokens become inputs and targets, and what the loss is.

B sequences, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stackwise.data.batches import Batch
from stackwise.model.architecture import Rack
from stackwise.ops.losses import IGNORE, linear_cross_entropy, linear_cross_entropy_terms


@dataclass(frozen=True)
class Example:
    """Inputs (B, T) and targets (B, T; ``IGNORE`` where nothing is predicted), and the mask of real tokens, if any.

    ``boundary`` (B, T, C), where given, is the hidden state of the inputs after ``enters`` Stacks: those do not run.
    """

    inputs: Tensor
    targets: Tensor
    attention_mask: Tensor | None = None
    boundary: Tensor | None = None
    enters: int = 0

    @property
    def n_targets(self) -> int:
        """Positions that count in the loss."""
        return int((self.targets != IGNORE).sum())

    def micro_batches(self, size: int) -> Iterator[Example]:
        """Slices of ``size`` sequences."""
        masks, boundaries = (
            [None] * len(self.inputs) if part is None else part.split(size)
            for part in (self.attention_mask, self.boundary)
        )
        for inputs, targets, mask, boundary in zip(
            self.inputs.split(size), self.targets.split(size), masks, boundaries
        ):
            yield Example(inputs, targets, mask, boundary, self.enters)

    def to(self, device: torch.device) -> Example:
        def moved(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device, non_blocking=True)

        inputs, targets = self.inputs.to(device, non_blocking=True), self.targets.to(device, non_blocking=True)
        return Example(inputs, targets, moved(self.attention_mask), moved(self.boundary), self.enters)


class Objective(Protocol):
    """Corrupt, loss, score. The loop asks nothing else."""

    name: str
    predicts_every_token: bool
    """Whether the score is the likelihood of the whole text, so that bits per byte mean something."""

    def corrupt(self, batch: Batch) -> Example:
        """The example of a batch: a pure function of its tokens, epochs and sample ids."""
        ...

    def loss(self, rack: Rack, example: Example, scale: float) -> Tensor:
        """scale · Σ over the positions that count; differentiable."""
        ...

    def score(self, rack: Rack, batch: Batch) -> tuple[float, int]:
        """Σ of nats over the positions that count, and how many they are; for validation."""
        ...


class CrossEntropyObjective(ABC):
    """Loss and score of the objectives that predict one token at each target position."""

    @abstractmethod
    def corrupt(self, batch: Batch) -> Example: ...

    def loss(self, rack: Rack, example: Example, scale: float) -> Tensor:
        hidden = rack.hidden(example.inputs, example.attention_mask, boundary=example.boundary, enters=example.enters)
        targets = example.targets.flatten()
        return linear_cross_entropy(hidden.flatten(0, 1), rack.head_weight, targets, scale, bias=rack.head_bias)

    @torch.no_grad()
    def score(self, rack: Rack, batch: Batch) -> tuple[float, int]:
        example = self.corrupt(batch).to(rack.device)
        hidden = rack.hidden(example.inputs, example.attention_mask)
        targets = example.targets.flatten()
        terms = linear_cross_entropy_terms(hidden.flatten(0, 1), rack.head_weight, targets, bias=rack.head_bias)
        return float(terms.double().sum()), example.n_targets
