"""Optimizers by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.config.schema import OptimizerConfig
from stackwise.optim.stored_adamw import BLOCK, CHUNK, STEP_BYTES, StoredAdamW


def is_matrix_of_a_stack(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes the parameter ``part/name``: matrices of Stacks, not the embedding, the head or adapters."""
    return name.startswith("stack.") and parameter.dim() == 2


def create_optimizer(
    parameters: Mapping[str, nn.Parameter], settings: OptimizerConfig, seed: int = 0
) -> torch.optim.Optimizer | Several:
    """The optimizer that ``settings`` names, of parameters by their full name ``part/name``.

    adamw: AdamW (1711.05101), torch's fused one where moments and parameters are fp32, else ``StoredAdamW``.
    muon: Muon (Jordan et al. 2024) on the matrices of Stacks, its updates scaled to AdamW's (2502.16982 §2.2) so that
    one learning rate serves, and AdamW on the rest. sgd: with momentum. Matrices decay; vectors do not.

    Args:
        seed: of the rounding of what is stored in fewer bits.
    """
    match settings.optimizer_type:
        case "adamw":
            return _adamw(parameters, settings, seed)
        case "sgd":
            return torch.optim.SGD(
                _groups(parameters, settings.weight_decay),
                lr=settings.lr,
                momentum=settings.sgd_momentum,
                foreach=False,  # the default on an accelerator: decay would copy all gradients at once
            )
        case "muon":
            matrices = {name: p for name, p in parameters.items() if is_matrix_of_a_stack(name, p)}
            others = {name: p for name, p in parameters.items() if name not in matrices}
            made: list[torch.optim.Optimizer] = []
            if matrices:
                made.append(
                    torch.optim.Muon(
                        list(matrices.values()),
                        lr=settings.lr,
                        weight_decay=settings.weight_decay,
                        momentum=settings.muon_momentum,
                        adjust_lr_fn="match_rms_adamw",
                    )
                )
            if others:
                made.append(_adamw(others, settings, seed))
            return Several(made)


def _adamw(parameters: Mapping[str, nn.Parameter], settings: OptimizerConfig, seed: int) -> torch.optim.Optimizer:
    groups = _groups(parameters, settings.weight_decay)
    plain = settings.moments == "float32" and all(p.dtype == torch.float32 for p in parameters.values())
    if plain:
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
    return StoredAdamW(groups, settings.lr, settings.betas, settings.eps, moments=settings.moments, seed=seed)


def _groups(parameters: Mapping[str, nn.Parameter], decay: float) -> list[dict[str, Any]]:
    groups = [
        {"params": [(name, p) for name, p in parameters.items() if p.dim() >= 2], "weight_decay": decay},
        {"params": [(name, p) for name, p in parameters.items() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def state_bytes(settings: OptimizerConfig, name: str, parameter: Tensor) -> int:
    """Bytes of the moments of the parameter ``part/name``; counters are left out."""
    n = parameter.numel()
    match settings.optimizer_type:
        case "sgd":
            return n * parameter.element_size() if settings.sgd_momentum else 0
        case "muon" if is_matrix_of_a_stack(name, parameter):
            return n * parameter.element_size()
    match settings.moments:
        case "float32":
            return 8 * n
        case "bfloat16":
            return 4 * n
    return 2 * n + 8 * math.ceil(n / BLOCK)


def step_bytes(settings: OptimizerConfig, name: str, parameter: Tensor) -> int:
    """Bytes that the update of the parameter ``part/name`` takes for its duration, at most."""
    n, is_bf16 = parameter.numel(), parameter.dtype == torch.bfloat16
    match settings.optimizer_type:
        case "sgd":
            return n * parameter.element_size() if settings.weight_decay and parameter.dim() >= 2 else 0
        case "muon" if is_matrix_of_a_stack(name, parameter):
            return 12 * n
    if settings.moments == "float32" and not is_bf16:
        return 0
    return STEP_BYTES[settings.moments, is_bf16] * min(n, CHUNK)


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
        parameters, settings, seed: as for ``create_optimizer``; every parameter gets an optimizer of its own.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: OptimizerConfig, seed: int = 0) -> None:
        self.armed = False
        self.seen: set[str] = set()
        self._squares: list[Tensor] = []
        one_each: list[torch.optim.Optimizer] = []
        self._handles, self._updates = [], []
        for name, parameter in parameters.items():
            made = create_optimizer({name: parameter}, settings, seed)
            optimizer = made.optimizers[0] if isinstance(made, Several) else made
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
