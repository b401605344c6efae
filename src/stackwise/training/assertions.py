"""Checks that what a phase says trains does train, and that nothing else moves."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from stackwise.errors import RunError
from stackwise.model.architecture import Rack


def fingerprint(tensor: Tensor) -> int:
    """The sum of a tensor's bit patterns: equal bits give equal sums, and changed weights another one."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().view(bits).sum(dtype=torch.int64))


class TrainingCheck:
    """Follows the first steps of a phase.

    After the first backward pass exactly the trained parameters have gradients. After the first step no frozen
    parameter has changed, and each trained one has, unless its gradient was exactly zero so far (behind the zero
    outputs of a Stack that starts as the identity) or its learning rate too small to show in its format; those are
    watched until they move.

    Args:
        rack: at the start of the phase.
        trained: name → parameter, of those that train.
        patience: steps after which a trained parameter that never moved is an error.
    """

    def __init__(self, rack: Rack, trained: Mapping[str, nn.Parameter], patience: int) -> None:
        self._trained = dict(trained)
        self._frozen = {
            f"{part}/{name}": p
            for part, name, p in rack.part_parameters()
            if f"{part}/{name}" not in trained and not p.is_meta  # offloaded weights are only read
        }
        self._before = {name: fingerprint(p) for name, p in {**self._trained, **self._frozen}.items()}
        self._waiting = set(self._trained)
        self._patience = max(3, patience)
        self._steps = 0

    @property
    def done(self) -> bool:
        return self._steps > 0 and not self._waiting

    def after_backward(self, with_gradients: Collection[str]) -> None:
        """Call after the backward pass of a step, with the names of the trained parameters that got a gradient."""
        if self._steps:
            return
        without = sorted(set(self._trained) - set(with_gradients))
        extra = sorted(name for name, p in self._frozen.items() if p.grad is not None)
        if without:
            raise RunError(f"{without[0]} should train in this phase but got no gradient ({len(without)} such)")
        if extra:
            raise RunError(f"{extra[0]} is frozen in this phase but got a gradient ({len(extra)} such)")

    def after_step(self) -> None:
        """Call after the update."""
        self._steps += 1
        if self._steps == 1:
            moved = sorted(name for name, p in self._frozen.items() if fingerprint(p) != self._before[name])
            if moved:
                raise RunError(f"{moved[0]} is frozen in this phase but changed ({len(moved)} such)")
        self._waiting = {name for name in self._waiting if fingerprint(self._trained[name]) == self._before[name]}
        if self._waiting and self._steps >= self._patience:
            names = sorted(self._waiting)
            raise RunError(
                f"{names[0]} should train in this phase but has not changed in {self._steps} steps "
                f"({len(names)} such); is training.optimizer.lr too small for its format?"
            )
