"""Masked language modelling (BERT, 1810.04805 §3.1)."""

import torch

from stackwise.config.schema import MaskingConfig
from stackwise.data.batches import Batch
from stackwise.data.masking import bert_mask
from stackwise.objectives.base import CrossEntropyObjective, Example


class MaskedObjective(CrossEntropyObjective):
    """Predicts the tokens that the masking picked, from inputs where they are hidden, random or (10 %) left.

    Args:
        masking: rate and the 80/10/10 shares.
        seed: masks are a function of (seed, epoch, sample, position).
        mask_id: the mask token.
        special_ids: tokens that are never picked.
        vocab_size: of the tokenizer.
    """

    name = "mlm"
    predicts_every_token = False

    def __init__(
        self, masking: MaskingConfig, *, seed: int, mask_id: int, special_ids: frozenset[int], vocab_size: int
    ) -> None:
        self.masking, self.seed = masking, seed
        self.mask_id, self.special_ids, self.vocab_size = mask_id, special_ids, vocab_size

    def corrupt(self, batch: Batch) -> Example:
        inputs, targets = bert_mask(
            batch.tokens[:, :-1],
            batch.epoch,
            batch.sample,
            seed=self.seed,
            rate=self.masking.rate,
            mask_share=self.masking.mask_share,
            random_share=self.masking.random_share,
            mask_id=self.mask_id,
            special_ids=self.special_ids,
            vocab_size=self.vocab_size,
        )
        return Example(torch.from_numpy(inputs), torch.from_numpy(targets))
