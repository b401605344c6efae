"""Targets that come with the batch."""

from __future__ import annotations

import torch

from stackwise.data.batches import Batch
from stackwise.model.reading import Reading
from stackwise.objectives.base import CrossEntropyObjective, Example


class CustomObjective(CrossEntropyObjective):
    """Position t predicts the target that the batch gives for it; ``IGNORE`` where there is none.

    Batches come from a data loader that gives ``labels``, which are taken as they are.
    """

    name = "custom"
    predicts_every_token = False

    def corrupt(self, batch: Batch) -> Example:
        if batch.targets is None:
            raise ValueError("the objective custom needs batches with targets (labels)")
        return Example(Reading(torch.from_numpy(batch.tokens[:, :-1])), torch.from_numpy(batch.targets))
