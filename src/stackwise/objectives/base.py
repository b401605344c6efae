"""What an objective is: how tokens become inputs and targets, and what the loss is.

B sequences, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stackwise.config.base import StackWiseConfig
from stackwise.data.batches import Batch
from stackwise.data.tokenizers import Tokenizer
from stackwise.kinds import OBJECTIVES, Labels
from stackwise.model.architecture import Rack
from stackwise.model.reading import Reading
from stackwise.objectives.depth import Interval
from stackwise.ops.losses import IGNORE


@dataclass(frozen=True)
class Example:
    """What the Rack reads, and what it should predict.

    Attributes:
        reading: of B rows of T tokens.
        targets: (B, T) int64; ``IGNORE`` where nothing is predicted. Of sequences: (B,).
        weights: (B, T) fp32, of each position's cross-entropy; ``None``: 1.
        counted: (B,), the number of tokens that each row's loss covers; ``None``: the positions that have a target.
    """

    reading: Reading
    targets: Tensor
    weights: Tensor | None = None
    counted: Tensor | None = None

    @property
    def n_targets(self) -> int:
        """What the loss of the whole example is divided by."""
        return int((self.targets != IGNORE).sum() if self.counted is None else self.counted.sum())

    def _with(self, reading: Reading, change: Callable[[Tensor], Tensor]) -> Self:
        weights, counted = (None if t is None else change(t) for t in (self.weights, self.counted))
        return replace(self, reading=reading, targets=change(self.targets), weights=weights, counted=counted)

    def micro_batches(self, size: int) -> Iterator[Self]:
        """Slices of ``size`` sequences."""
        for first in range(0, len(self.targets), size):
            rows = slice(first, first + size)
            yield self._with(self.reading.between(first, first + size), itemgetter(rows))

    def to(self, device: torch.device) -> Self:
        return self._with(self.reading.to(device), lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class Score:
    """For each row of a batch: nats, and how many tokens they cover; in all: how many tokens were the likeliest.

    ``rates``, ``means`` (B,): of objectives with noise, the share of tokens masked and the mean nats of those.
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    right: int
    predicted: int
    rates: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    means: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))


class Objective(Protocol):
    """Corrupt, loss, score. The loop asks nothing else."""

    name: str
    predicts_every_token: bool
    """Whether the score covers the likelihood of the whole text, so that bits per byte mean something."""
    special_ids: frozenset[int]
    """Tokens of a text that are given and never predicted: neither their nats nor their number count. Of clm: none."""
    is_likelihood: bool
    """Whether the loss is a negative log-likelihood, so that e to its power is a perplexity."""
    is_bound: bool
    """Whether the score bounds the negative log-likelihood, by random draws, and is not the thing itself."""

    @property
    def labels(self) -> Labels: ...

    def during(self, noise: tuple[Interval, ...]) -> Objective:
        """The objective of a phase that trains these intervals of noise levels; none: all there are."""
        ...

    def of(self, rack: Rack) -> Objective:
        """The objective of all that ``rack``, which may still grow, can do."""
        ...

    def corrupt(self, batch: Batch) -> Example:
        """The example of a batch: a pure function of its tokens, epochs and sample ids."""
        ...

    def evaluated(self, batch: Batch) -> Example:
        """The example that ``score`` scores."""
        ...

    def loss(self, rack: Rack, example: Example, scale: float) -> Tensor:
        """scale · Σ over the positions that count; differentiable."""
        ...

    def score(self, rack: Rack, batch: Batch) -> Score:
        """The nats of the rows of a batch; for validation."""
        ...


class CrossEntropyObjective(ABC):
    """Loss and score of the objectives that predict one token at each target position."""

    is_bound = False
    is_likelihood = True
    name: str
    special_ids: frozenset[int] = frozenset()
    excluded: int | None = None
    """A token whose logit is −∞."""

    @property
    def labels(self) -> Labels:
        return OBJECTIVES[self.name].labels

    @classmethod
    def from_config(cls, config: StackWiseConfig, tokenizer: Tokenizer | None) -> Self:
        """The objective of a run; ``tokenizer`` has a mask token where the objective needs one (``kinds``)."""
        return cls()

    @classmethod
    def planned(cls, config: StackWiseConfig, vocab_size: int) -> Self | None:
        """The objective whose loss of ``typical`` a step costs; ``None``: that of all positions, in one pass."""
        return None

    def typical(self, inputs: Tensor) -> Example:
        """An example of the shapes that a step of sequences (B, T) has."""
        return Example(Reading(inputs), inputs)

    def during(self, noise: tuple[Interval, ...]) -> Self:
        return self

    def of(self, rack: Rack) -> Self:
        return self

    @abstractmethod
    def corrupt(self, batch: Batch) -> Example: ...

    def evaluated(self, batch: Batch) -> Example:
        """The example that ``score`` scores."""
        return self.corrupt(batch)

    def loss(self, rack: Rack, example: Example, scale: float) -> Tensor:
        hidden = rack(example.reading)
        return rack.cross_entropy(hidden, example.targets, scale, weights=example.weights, excluded=self.excluded)

    @torch.no_grad()
    def score(self, rack: Rack, batch: Batch) -> Score:
        example = self.evaluated(batch)
        on_device = example.to(rack.device)
        terms, right = self.terms(rack, on_device)
        return scored(example, terms, right, self.judged(example))

    def judged(self, example: Example) -> Tensor:
        """(B, T): the positions whose likeliest token is compared with the target."""
        return example.targets != IGNORE

    def terms(self, rack: Rack, example: Example) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each position (B, T), and whether its target is the likeliest token."""
        return rack.cross_entropy_terms(rack(example.reading), example.targets, excluded=self.excluded)


def scored(example: Example, terms: Tensor, right: Tensor, judged: Tensor) -> Score:
    """The score of an example's rows, weighted as the example says, from the terms (B, T) of its positions."""
    there = (example.targets != IGNORE).numpy()
    nats = terms.cpu().double().numpy()
    weights = np.ones_like(nats) if example.weights is None else example.weights.double().numpy()
    tokens = there.sum(axis=1) if example.counted is None else example.counted.numpy()
    return Score((nats * weights).sum(axis=1), tokens, int((right.cpu() & judged).sum()), int(judged.sum()))
