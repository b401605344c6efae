"""Where the loop's examples come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from stackwise.config.base import StackWiseConfig
from stackwise.data.batches import Batch, Batches
from stackwise.errors import UserError
from stackwise.objectives.base import Example, Objective
from stackwise.ops.losses import IGNORE
from stackwise.randomness import seed_of

_LABELS = {
    "positions": "the target of each position",
    "classes": "the class of each sequence",
    "numbers": "the number of each sequence",
}


def seed_step(seed: int, step: int) -> None:
    """Seeds torch's own generator for a step: dropout, and what a data loader or an objective of one's own draws."""
    torch.manual_seed(seed_of(seed, "dropout", step))


class ProgressiveDataLoader:
    """Batches of a token array: the batch of a step is a function of (seed, step), so any run over it can be resumed.

    Args:
        tokens: 1-D ids, in memory or memory-mapped.
        config: ``training.batch_size``, ``seq_len`` and ``seed``.
        sources: (tokens, weight) of each source of a mixture (``Batches``).

    Iterating gives {"input_ids": (B, T), "labels": (B, T)} for ever, the two being equal: Hugging Face models, and
    ``IterableSource``, shift the labels themselves.
    """

    def __init__(self, tokens: np.ndarray, config: StackWiseConfig, sources: Sequence[tuple[int, int]] = ()) -> None:
        training = config.training
        self.batches = Batches(tokens, training.seq_len, training.batch_size, training.seed, sources)

    def batch(self, step: int) -> Batch:
        return self.batches.batch(step)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        step = 0
        while True:
            ids = torch.from_numpy(self.batch(step).tokens[:, :-1])
            yield {"input_ids": ids, "labels": ids.clone()}
            step += 1


class Steps(Protocol):
    """Batches that are a function of the step."""

    def batch(self, step: int) -> Batch: ...


class BatchSource:
    """The objective's view of batches that are a function of the step."""

    repeatable = True

    def __init__(self, loader: Steps, objective: Objective) -> None:
        self._loader, self._objective = loader, objective

    def during(self, objective: Objective) -> Self:
        """The same batches as another objective sees them."""
        return type(self)(self._loader, objective)

    def example(self, step: int) -> Example:
        return self._objective.corrupt(self._loader.batch(step))


class TokenSource(BatchSource):
    """The objective's view of a ``ProgressiveDataLoader``."""

    def __init__(self, loader: Steps, objective: Objective) -> None:
        if objective.labels != "inputs":
            raise UserError(
                f"the objective {objective.name} needs labels, which a token array does not have; "
                "give batches with labels"
            )
        super().__init__(loader, objective)


class IterableSource:
    """The objective's view of any re-iterable of batches (a ``torch.utils.data.DataLoader``, a list).

    A batch is a tensor of ids, a pair (input_ids, labels) or a mapping with ``input_ids`` and, if any,
    ``attention_mask`` and ``labels``, all (B, T). Labels are the inputs themselves, −100 where nothing counts; they are
    shifted here. With the objective custom they are each position's own target, and nothing is shifted; with
    classification, (B,), the class of each sequence, with regression its number. Padded positions never count.

    A run that is resumed reads the batches of the steps before once more and drops them, each with torch's generator
    seeded as in its step: what ``batches`` draws from that generator (the order, augmentation) is then the same again.

    Args:
        seed: of the run.
    """

    repeatable = False

    def __init__(self, batches: Iterable[Any], objective: Objective, seed: int = 0) -> None:
        self._batches, self._objective, self._seed = batches, objective, seed
        self._iterator: Iterator[Any] = iter(())
        self._epoch, self._sample, self._given = -1, 0, 0

    def during(self, objective: Objective) -> IterableSource:
        """The batches that follow, as another objective sees them."""
        self._objective = objective
        return self

    def example(self, step: int) -> Example:
        if self._given < step:
            with torch.random.fork_rng(devices=()):
                for given in range(self._given, step):
                    seed_step(self._seed, given)
                    self._sample += len(_unpack(self._next())[0])
        self._given = step + 1
        return self.seen(self._next())

    def once(self) -> Iterator[Example]:
        """The examples of one pass over the batches."""
        self._epoch, self._sample = self._epoch + 1, 0
        return map(self.seen, iter(self._batches))

    def seen(self, batch: Any) -> Example:
        """The objective's view of ``batch``, the next one of its epoch."""
        ids, mask, labels = _unpack(batch)
        B = len(ids)
        kind = self._objective.labels
        if kind != "inputs":
            wanted = tuple(ids.shape) if kind == "positions" else (B,)
            if labels is None or tuple(labels.shape) != wanted:
                what = _LABELS[kind]
                found = "" if labels is None else f", {wanted}, not {tuple(labels.shape)}"
                raise UserError(f"the objective {self._objective.name} needs batches with labels: {what}{found}")
            if labels.is_floating_point() and kind != "numbers":
                raise UserError(f"labels are {labels.dtype}; the objective {self._objective.name} takes whole numbers")
        elif labels is not None and bool(((labels != IGNORE) & (labels != ids)).any()):
            raise UserError(
                "the labels of a batch differ from its input_ids; give the inputs themselves, -100 where nothing "
                "counts (shifting and masking is done here)"
            )
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        counts = real if labels is None or kind != "inputs" else real & (labels != IGNORE)
        sample = np.arange(self._sample, self._sample + B)
        self._sample += B
        # One more column, so that the objective sees T inputs; nothing in it counts.
        tokens = torch.cat((ids, ids[:, :1]), dim=1).numpy()
        given = None
        if kind != "inputs" and labels is not None:
            given = labels.float().numpy() if kind == "numbers" else labels.long().numpy()
        example = self._objective.corrupt(Batch(tokens, sample, np.full(B, self._epoch), given))
        reading = replace(example.reading, attention_mask=None if mask is None else real)
        if kind in ("classes", "numbers"):
            return replace(example, reading=reading)
        if example.counted is not None:
            if mask is not None or bool((~counts).any()):
                raise UserError("the objective diffusion needs batches without padding in which every token counts")
            return example
        shifted = real & torch.cat((counts[:, 1:], torch.zeros(B, 1, dtype=torch.bool)), dim=1)
        counted = shifted if self._objective.predicts_every_token else counts
        targets = torch.where(counted, example.targets, IGNORE)
        return replace(example, targets=targets, reading=reading)

    def _next(self) -> Any:
        for attempt in range(2):
            try:
                return next(self._iterator)
            except StopIteration:
                if attempt:
                    break
                self._iterator, self._epoch, self._sample = iter(self._batches), self._epoch + 1, 0
        raise UserError("the data loader gives no batch")


def _unpack(batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(input_ids, attention_mask, labels) of a batch in any of the usual forms."""
    if isinstance(batch, Tensor):
        parts: tuple[Any, ...] = (batch, None, None)
    elif isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise UserError(f"a batch has the keys {sorted(batch)}, but no input_ids")
        parts = (batch["input_ids"], batch.get("attention_mask"), batch.get("labels"))
    elif isinstance(batch, list | tuple) and 1 <= len(batch) <= 2:
        parts = (batch[0], None, batch[1] if len(batch) == 2 else None)
    else:
        raise UserError(
            f"a batch is a {type(batch).__name__}; give ids, (input_ids, labels) or a mapping with input_ids"
        )
    ids = parts[0]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise UserError("input_ids must be an integer tensor (sequences, tokens)")
    return ids.long().cpu(), *(None if p is None else p.cpu() for p in parts[1:])  # type: ignore[return-value]


def peek_shape(batches: Iterable[Any]) -> tuple[int, int]:
    """(B, T) of the first batch."""
    if isinstance(batches, Iterator):
        raise UserError("the data loader can be read only once; give one that can be iterated again, or a list")
    for batch in batches:
        return tuple(_unpack(batch)[0].shape)  # type: ignore[return-value]
    raise UserError("the data loader gives no batch")
