"""What a run is scored on: the validation text, or data that a trainer is given in Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from stackwise.config.base import StackWiseConfig
from stackwise.config.run import TrainingConfig
from stackwise.data.store import PreparedData
from stackwise.errors import UserError
from stackwise.model.architecture import Rack
from stackwise.objectives import Objective, create_objective
from stackwise.objectives.scoring import Validation, evaluating, validate
from stackwise.ops.precision import autocast
from stackwise.signals import stop_if_asked
from stackwise.training.sources import IterableSource, ProgressiveDataLoader

ValidationData = np.ndarray | ProgressiveDataLoader | Iterable[Any]
"""Tokens (1-D ids), the loader that holds them, or batches as a trainer takes them, with labels where it needs them."""


def windows_of(training: TrainingConfig) -> dict[str, Any]:
    """Which windows of the validation text are scored, and how many at a time."""
    return {
        "seq_len": training.seq_len,
        "batch_size": training.micro_batch_size or training.batch_size,
        "max_tokens": training.evaluation.max_tokens,
    }


def validate_run(
    rack: Rack,
    config: StackWiseConfig,
    data: PreparedData,
    compute_dtype: torch.dtype | None,
    objective: Objective | None = None,
) -> Validation:
    """Scores the validation tokens as the run does, by ``objective`` or that of its last phase."""
    return validate(
        rack,
        objective or create_objective(config, data.tokenizer),
        data.validation,
        **windows_of(config.training),
        bytes_per_token=data.bytes_per_token,
        draws=config.training.evaluation.draws,
        compute_dtype=compute_dtype,
    )


def scorer(
    data: ValidationData | None, config: StackWiseConfig, compute_dtype: torch.dtype | None
) -> Callable[[Rack, Objective], Validation] | None:
    """What scores a Rack on the data that a trainer is given, ``None`` where it is given none.

    Tokens are scored as the validation text of a run is, without bits per byte: how many bytes they stand for is not
    known. Batches are scored by the mean loss of all their tokens (or sequences) that count.
    """
    if data is None:
        return None
    tokens = data.batches.tokens if isinstance(data, ProgressiveDataLoader) else data
    if not isinstance(tokens, np.ndarray):
        if isinstance(tokens, Iterator):
            raise UserError("validation: it can be read only once; give batches that can be iterated again, or a list")
        return lambda rack, objective: _validate_batches(rack, objective, tokens, compute_dtype)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UserError(f"validation: an array of {tokens.dtype} {tokens.shape}; give whole numbers, 1-D")

    def score(rack: Rack, objective: Objective) -> Validation:
        draws, windows = config.training.evaluation.draws, windows_of(config.training)
        return validate(
            rack, objective, tokens, **windows, bytes_per_token=None, draws=draws, compute_dtype=compute_dtype
        )

    return score


@torch.no_grad()
def _validate_batches(
    rack: Rack, objective: Objective, batches: Iterable[Any], compute_dtype: torch.dtype | None
) -> Validation:
    objective = objective.of(rack)
    total, count = 0.0, 0
    with evaluating(rack), torch.random.fork_rng(devices=()):  # what the batches draw is no step's
        torch.manual_seed(0)
        for example in IterableSource(batches, objective).once():
            stop_if_asked()
            with autocast(rack.device, compute_dtype):
                total += float(objective.loss(rack, example.to(rack.device), 1.0))
            count += example.n_targets
    if count == 0:
        raise UserError("validation: no token of its batches counts")
    loss = total / count
    return Validation(loss, math.exp(min(loss, 700.0)), None, count)
