"""What a Rack reads in one pass, and which of its Stacks run.

B rows, T tokens, C width, K stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from stackwise.model.cache import KVCache


@dataclass(frozen=True)
class Route:
    """The rows of a reading that pass only the Stacks at the places ``start`` to ``stop``."""

    rows: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Reading:
    """One pass through a Rack: ``rack(Reading(…))`` gives the hidden state (B, T, C) that the head's matrix reads.

    Attributes:
        ids: (B, T) token ids, which the embedding reads. With ``stages``: (B, K, T).
        attention_mask: boolean (B, T), True where a token is real; positions are counted over real tokens.
        boundary: (B, T, C), the hidden state before the Stack at ``start``. Beside ``ids``, it is added to their
            embedding.
        start, stop: the places of the first Stack that runs and of the one after the last; default all.
        time: (B,) fp32 noise levels in [0, 1], for Blocks that are conditioned on them. With ``stages``: (B, K).
        block_length: a token sees its own block of that many tokens and the blocks before, in place of the Blocks'
            attention mode.
        clean: (B, T), with ``block_length``: the tokens without noise, read in the same pass. A token of ``ids`` sees
            its own block there and the earlier blocks here (2503.09573 §3.1). The hidden state is that of ``ids``.
        routes: the Stacks that each row passes, in place of ``start`` and ``stop``; every row is in one of them.
        stages: one pass in K stages: the Stack at place k reads the embedding of ``ids[:, k]`` plus what the Stack
            before it made of ``ids[:, k − 1]``. The result is a list with the hidden state of each stage named here.
        cache: the keys and values of the tokens before ``ids``, from ``make_cache``; the pass appends to it.
        finished: ``False``: the hidden state as the last Stack leaves it, before the final norm.
    """

    ids: Tensor | None = None
    attention_mask: Tensor | None = None
    boundary: Tensor | None = None
    start: int = 0
    stop: int | None = None
    time: Tensor | None = None
    block_length: int | None = None
    clean: Tensor | None = None
    routes: tuple[Route, ...] = ()
    stages: tuple[int, ...] = ()
    cache: KVCache | None = None
    finished: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        if self.ids is not None:
            return self.ids.shape[0], self.ids.shape[-1]
        if self.boundary is None:
            raise ValueError("a reading needs token ids or the hidden state at a boundary")
        return self.boundary.shape[0], self.boundary.shape[1]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in named.items() if isinstance(value, Tensor)}
        return replace(self, **changed)

    def rows(self, index: Tensor | slice) -> Self:
        """Some of the rows; without routes, whose numbers of rows no longer hold."""
        return replace(self._each(lambda tensor: tensor[index]), routes=())

    def between(self, first: int, last: int) -> Self:
        """The rows ``first`` to ``last``, with their routes."""
        routes = tuple(
            replace(route, rows=rows)
            for route in self.routes
            if (rows := tuple(row - first for row in route.rows if first <= row < last))
        )
        return replace(self.rows(slice(first, last)), routes=routes)

    def to(self, device: torch.device) -> Self:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))
