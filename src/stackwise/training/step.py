"""One optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stackwise.errors import RunError
from stackwise.objectives.base import Example
from stackwise.ops.precision import autocast
from stackwise.store.state import RunState
from stackwise.training.schedules import lr_ratio
from stackwise.training.sources import seed_step
from stackwise.training.stage import Stage


@dataclass(frozen=True)
class Step:
    """What a step was: the mean loss of the tokens that count, the norm of the gradient, the rate, the tokens read."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int


def take_step(stage: Stage, state: RunState) -> Step:
    """Takes the step of ``stage`` that follows the steps counted in ``state``.

    Raises:
        RunError: no token of the batch counts, the loss or the gradient is not finite, or what trained is not what the
            phase says.
    """
    training = stage.context.config.training
    lr = training.optimizer.lr * lr_ratio(stage.phase.schedule, state.phase_step)
    for group in stage.optimizer.param_groups:
        group["lr"] = lr * group["lr_share"]
    seed_step(training.seed, state.step)
    example = stage.examples.next()
    count = example.n_targets  # before it moves to the device, which would have to be waited for
    if count == 0:
        raise RunError(f"step {state.step}: no token of the batch counts in the loss; raise batch_size or seq_len")
    update = _plain_step if stage.in_backward is None else _step_in_backward
    example = example.to(stage.context.device)
    loss, norm = update(stage, example, count, state.step)
    if not stage.check.done:
        stage.check.after_step()
    return Step(loss, norm, lr, math.prod(example.reading.shape))


def _plain_step(stage: Stage, example: Example, count: int, step: int) -> tuple[float, float]:
    """(loss, gradient norm) of a step whose update follows the backward passes."""
    total = _backward(stage, example, count)
    parameters, clip = stage.parameters, stage.context.config.training.grad_clip
    if not stage.check.done:
        stage.check.after_backward({name for name, p in parameters.items() if p.grad is not None})
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
    loss_value, norm_value = float(total), float(norm)
    _check_finite(step, "the loss", loss_value, "nothing was updated")
    _check_finite(step, "the gradient norm", norm_value, "nothing was updated")
    if clip is not None and norm_value > clip:
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), clip, norm)
    stage.optimizer.step()
    stage.optimizer.zero_grad(set_to_none=True)
    return loss_value, norm_value


def _step_in_backward(stage: Stage, example: Example, count: int, step: int) -> tuple[float, float]:
    """(loss, gradient norm) of a step in whose last backward pass each parameter is updated at once."""
    inside = stage.in_backward
    assert inside is not None
    losses: list[float] = []

    def before_the_last(total: Tensor) -> None:
        losses.append(float(total))
        _check_finite(step, "the loss", losses[0], "nothing was updated")
        inside.start()

    _backward(stage, example, count, before_the_last)
    norm = inside.norm()
    if not stage.check.done:
        stage.check.after_backward(inside.seen)
    _check_finite(step, "the gradient norm", norm, "some parameters were updated and others not")
    return losses[0], norm


def _backward(
    stage: Stage, example: Example, count: int, before_the_last: Callable[[Tensor], None] | None = None
) -> Tensor:
    """The sum of the losses of all micro-batches, whose gradients are added up.

    ``before_the_last`` is called with that sum before the last backward pass.
    """
    context = stage.context
    total = torch.zeros((), device=context.device)
    micro_batches = list(example.micro_batches(context.config.training.micro_batch_size or len(example.targets)))
    for i, micro in enumerate(micro_batches):
        with autocast(context.device, context.compute_dtype):
            loss = stage.objective.loss(context.rack, micro, 1.0 / count)
        total += loss.detach()
        if before_the_last is not None and i == len(micro_batches) - 1:
            before_the_last(total)
        loss.backward()
    return total


def _check_finite(step: int, what: str, value: float, updated: str) -> None:
    if not math.isfinite(value):
        raise RunError(
            f"step {step}: {what} is {value}; {updated}, the last checkpoint is good; "
            "a lower training.optimizer.lr or a longer warm-up is the usual cure"
        )
