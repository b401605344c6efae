"""What an objective is: how tokens become inputs and targets, and what the loss is.

B sequences, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stackwise.data.batches import Batch
from stackwise.model.architecture import Rack
from stackwise.objectives.depth import Interval
from stackwise.ops.losses import IGNORE, linear_cross_entropy, linear_cross_entropy_terms

Labels = Literal["inputs", "positions", "sequences"]
"""What the labels of a batch are: the inputs themselves, the target of each position, the class of each sequence."""


@dataclass(frozen=True)
class Route:
    """``rows`` of an example pass the Stacks at the places ``start`` to ``stop`` alone."""

    rows: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Example:
    """Inputs (B, T) and targets (B, T; ``IGNORE`` where nothing is predicted), and the mask of real tokens, if any.

    Attributes:
        boundary: (B, T, C), the hidden state of the inputs after ``enters`` Stacks: those do not run.
        weights: (B, T) fp32, of each position's cross-entropy; ``None``: 1.
        time: (B,) fp32, the noise level of each row, for a Rack that is conditioned on it.
        clean: (B, T), the tokens without noise, where the Rack reads them beside the inputs or reveals them by stages.
        stage: (B, T), with ``clean``: the stage of one pass at which a token is predicted and after which it is shown.
        routes: the Stacks that each row passes; none: all do.
        counted: (B,), of how many tokens each row's loss is; ``None``: of the positions that have a target.
    """

    inputs: Tensor
    targets: Tensor
    attention_mask: Tensor | None = None
    boundary: Tensor | None = None
    enters: int = 0
    weights: Tensor | None = None
    time: Tensor | None = None
    clean: Tensor | None = None
    stage: Tensor | None = None
    routes: tuple[Route, ...] = ()
    counted: Tensor | None = None

    @property
    def n_targets(self) -> int:
        """What the loss of the whole example is divided by."""
        return int((self.targets != IGNORE).sum() if self.counted is None else self.counted.sum())

    def _tensors(self) -> dict[str, Tensor]:
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def rows(self, index: Tensor | slice) -> Self:
        """Some of the rows, for which no routes are said."""
        parts: dict[str, Any] = {name: tensor[index] for name, tensor in self._tensors().items()}
        return replace(self, **parts, routes=())

    def micro_batches(self, size: int) -> Iterator[Self]:
        """Slices of ``size`` sequences."""
        for first in range(0, len(self.inputs), size):
            within = range(first, first + size)
            routes = tuple(
                replace(route, rows=rows)
                for route in self.routes
                if (rows := tuple(row - first for row in route.rows if row in within))
            )
            yield replace(self.rows(slice(first, first + size)), routes=routes)

    def to(self, device: torch.device) -> Self:
        parts: dict[str, Any] = {name: t.to(device, non_blocking=True) for name, t in self._tensors().items()}
        return replace(self, **parts)


@dataclass(frozen=True)
class Score:
    """Of each row of a batch: nats, and the tokens that they are of; in all: how many were the likeliest, of how many.

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
    """Whether the score is of the likelihood of the whole text, so that bits per byte mean something."""
    labels: Labels
    special_ids: frozenset[int]
    """Tokens of a text that are given and never predicted: neither their nats nor their number count. Of clm: none."""
    is_bound: bool
    """Whether the score bounds the negative log-likelihood, by random draws, and is not the thing itself."""

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
    labels: Labels = "inputs"
    special_ids: frozenset[int] = frozenset()
    excluded: int | None = None
    """A token whose logit is −∞."""

    def during(self, noise: tuple[Interval, ...]) -> Self:
        return self

    def of(self, rack: Rack) -> Self:
        return self

    @abstractmethod
    def corrupt(self, batch: Batch) -> Example: ...

    def evaluated(self, batch: Batch) -> Example:
        """The example that ``score`` scores."""
        return self.corrupt(batch)

    def hidden(self, rack: Rack, example: Example) -> Tensor:
        """(B, T, C): what the head's matrix reads at each position."""
        if not example.routes:
            return rack.hidden(
                example.inputs,
                example.attention_mask,
                boundary=example.boundary,
                enters=example.enters,
                time=example.time,
            )
        parts, order = [], []
        for route in example.routes:
            index = torch.tensor(route.rows, device=example.inputs.device)
            rows = example.rows(index)
            runs = (route.start, route.stop)
            parts.append(rack.hidden(rows.inputs, rows.attention_mask, runs=runs, time=rows.time))
            order.append(index)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def loss(self, rack: Rack, example: Example, scale: float) -> Tensor:
        weights = None if example.weights is None else example.weights.flatten()
        return linear_cross_entropy(
            self.hidden(rack, example).flatten(0, 1),
            rack.head_weight,
            example.targets.flatten(),
            scale,
            bias=rack.head_bias,
            weights=weights,
            excluded=self.excluded,
        )

    @torch.no_grad()
    def score(self, rack: Rack, batch: Batch) -> Score:
        example = self.evaluated(batch)
        on_device = example.to(rack.device)
        terms, right = self.terms(rack, self.hidden(rack, on_device), on_device.targets)
        return scored(example, terms, right, self.judged(example))

    def judged(self, example: Example) -> Tensor:
        """(B, T): the positions whose likeliest token is compared with the target."""
        return example.targets != IGNORE

    def terms(self, rack: Rack, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each position (B, T), and whether its target is the likeliest token."""
        terms, right = linear_cross_entropy_terms(
            hidden.flatten(0, 1), rack.head_weight, targets.flatten(), bias=rack.head_bias, excluded=self.excluded
        )
        return terms.view_as(targets), right.view_as(targets)


def scored(example: Example, terms: Tensor, right: Tensor, judged: Tensor) -> Score:
    """The score of an example's rows, weighted as the example says, from the terms (B, T) of its positions."""
    there = (example.targets != IGNORE).numpy()
    nats = terms.cpu().double().numpy()
    weights = np.ones_like(nats) if example.weights is None else example.weights.double().numpy()
    tokens = there.sum(axis=1) if example.counted is None else example.counted.numpy()
    return Score((nats * weights).sum(axis=1), tokens, int((right.cpu() & judged).sum()), int(judged.sum()))
