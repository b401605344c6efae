"""Masked language modelling (BERT, 1810.04805 §3.1)."""

from copy import copy
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stackwise.config.base import StackWiseConfig
from stackwise.config.objectives import MaskingConfig
from stackwise.data.batches import Batch
from stackwise.data.masking import bert_mask
from stackwise.data.tokenizers import Tokenizer
from stackwise.model.reading import Reading
from stackwise.objectives.base import CrossEntropyObjective, Example
from stackwise.objectives.depth import Interval
from stackwise.ops.losses import IGNORE
from stackwise.randomness import uniform

ROW_RATE = 10
"""Stream of the rates of sequences, beside those of ``data.masking``."""


class MaskedObjective(CrossEntropyObjective):
    """Predicts the tokens that the masking picked, from inputs where they are hidden, random or (10 %) left.

    Args:
        masking: rate and the 80/10/10 shares.
        seed: masks are a function of (seed, epoch, sample, position).
        mask_id: the mask token.
        special_ids: tokens that are never picked.
        vocab_size: of the tokenizer.
        starts: (V,), which tokens begin a word; for whole words.
    """

    name = "mlm"
    predicts_every_token = False

    def __init__(
        self,
        masking: MaskingConfig,
        *,
        seed: int,
        mask_id: int,
        special_ids: frozenset[int],
        vocab_size: int,
        starts: NDArray[np.bool_] | None = None,
    ) -> None:
        self.masking, self.seed, self.starts = masking, seed, starts
        self.mask_id, self.special_ids, self.vocab_size = mask_id, special_ids, vocab_size
        self.rates = (masking.rate, masking.max_rate or masking.rate)

    @classmethod
    def from_config(cls, config: StackWiseConfig, tokenizer: Tokenizer | None) -> Self:
        assert tokenizer is not None and tokenizer.mask_id is not None
        masking = config.training.masking
        return cls(
            masking,
            seed=config.training.seed,
            mask_id=tokenizer.mask_id,
            special_ids=tokenizer.special_ids,
            vocab_size=tokenizer.vocab_size,
            starts=tokenizer.word_starts() if masking.unit == "word" else None,
        )

    def during(self, noise: tuple[Interval, ...]) -> Self:
        """With the rates of a phase that has its own."""
        if not noise:
            return self
        (interval,) = noise
        chosen = copy(self)
        chosen.rates = (interval.low, interval.high)
        return chosen

    def corrupt(self, batch: Batch) -> Example:
        masking = self.masking
        low, high = self.rates
        rate: float | NDArray[np.float64] = low
        if high > low:
            rate = low + (high - low) * uniform(self.seed, batch.epoch, batch.sample, 0, stream=ROW_RATE)
        inputs, targets = bert_mask(
            batch.tokens[:, :-1],
            batch.epoch,
            batch.sample,
            seed=self.seed,
            rate=rate,
            unit=masking.unit,
            starts=self.starts,
            span_length=masking.span_length,
            mask_share=masking.mask_share,
            random_share=masking.random_share,
            mask_id=self.mask_id,
            special_ids=self.special_ids,
            vocab_size=self.vocab_size,
        )
        return Example(Reading(torch.from_numpy(inputs)), torch.from_numpy(targets))

    def judged(self, example: Example) -> Tensor:
        """The masked ones: of those that stayed as they were, the target is in sight."""
        return (example.targets != IGNORE) & (example.reading.ids == self.mask_id)
