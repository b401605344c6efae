"""Optimizers at work: of all parameters at once, or of each inside the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.config.optimization import OptimizerConfig
from stackwise.optim.kinds import optimizer_of


def create_optimizer(
    parameters: Mapping[str, nn.Parameter],
    settings: OptimizerConfig,
    seed: int = 0,
    heights: Mapping[str, int] | None = None,
) -> torch.optim.Optimizer | Several:
    """The optimizer that ``settings`` names (``optim.kinds``), of parameters by their full name ``part/name``.

    Args:
        seed: of the rounding of what is stored in fewer bits.
        heights: how often ``layer_decay`` lowers the rate of each; default never.
    """
    made = optimizer_of(settings, heights).make(parameters, seed)
    return made[0] if len(made) == 1 else Several(made)


class Several:
    """Optimizers of disjoint parameters as one: their groups, their state, one step."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        self.state = _State(self.optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


class _State(MutableMapping[Tensor, Any]):
    """The state of each parameter, in the optimizer that has it."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._owner = {
            id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
        }

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._owner[id(parameter)].state[parameter]

    def __setitem__(self, parameter: Tensor, value: Any) -> None:
        self._owner[id(parameter)].state[parameter] = value

    def __delitem__(self, parameter: Tensor) -> None:
        del self._owner[id(parameter)].state[parameter]

    def __contains__(self, parameter: object) -> bool:
        return id(parameter) in self._owner and parameter in self._owner[id(parameter)].state

    def __iter__(self) -> Iterator[Tensor]:
        for optimizer in dict.fromkeys(self._owner.values()):
            yield from optimizer.state

    def __len__(self) -> int:
        return sum(1 for _ in self)


class InBackward:
    """Updates each parameter as soon as its gradient is complete, and drops the gradient (LOMO 2306.09782 §3.1).

    While ``armed``, a hook on each parameter takes its step; before the last micro-batch gradients only add up. What
    that one does not reach (with depth as time its rows need not pass every Stack) takes its step after it. A gradient
    that is not finite counts as zero, so that weights and moments stay finite; ``norm`` then is not finite.

    Args:
        parameters, settings, seed, heights: as for ``create_optimizer``; every parameter gets an optimizer of its own.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: OptimizerConfig,
        seed: int = 0,
        heights: Mapping[str, int] | None = None,
    ) -> None:
        self.armed = False
        self.seen: set[str] = set()
        self._squares: list[Tensor] = []
        one_each: list[torch.optim.Optimizer] = []
        self._handles, self._updates = [], []
        for name, parameter in parameters.items():
            (optimizer,) = optimizer_of(settings, heights).make({name: parameter}, seed)
            one_each.append(optimizer)
            update = self._hook(name, optimizer)
            self._updates.append((parameter, update))
            self._handles.append(parameter.register_post_accumulate_grad_hook(update))
        self.optimizer = Several(one_each)

    def _hook(self, name: str, optimizer: torch.optim.Optimizer) -> Any:
        def update(parameter: Tensor) -> None:
            if not self.armed:
                return
            assert parameter.grad is not None
            self.seen.add(name)
            square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
            self._squares.append(square)
            # Decided on the device: to ask here would be to wait for it, once for each parameter.
            parameter.grad.masked_fill_(torch.isfinite(square).logical_not_(), 0.0)
            optimizer.step()
            parameter.grad = None

        return update

    def start(self) -> None:
        """Before the last backward pass of a step."""
        self.armed, self._squares = True, []
        self.seen.clear()

    def norm(self) -> float:
        """After it: the norm of all gradients."""
        for parameter, update in self._updates:
            if parameter.grad is not None:
                update(parameter)
        self.armed = False
        return float(torch.stack(self._squares).sum().sqrt())

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
