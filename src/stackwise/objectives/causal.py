"""Next-token prediction."""

import torch

from stackwise.data.batches import Batch
from stackwise.model.reading import Reading
from stackwise.objectives.base import CrossEntropyObjective, Example


class CausalObjective(CrossEntropyObjective):
    """Position t predicts token t + 1."""

    name = "clm"
    predicts_every_token = True

    def corrupt(self, batch: Batch) -> Example:
        tokens = torch.from_numpy(batch.tokens)  # (B, T + 1)
        return Example(Reading(tokens[:, :-1].contiguous()), tokens[:, 1:].contiguous())
