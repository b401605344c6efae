"""Optimizers by name, and their state by parameter name, so that it survives growth and resume."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from stackwise.config.schema import OptimizerConfig
from stackwise.growth.phases import Phase
from stackwise.model.architecture import Rack

Moments = dict[str, dict[str, Tensor]]
"""Optimizer state of each parameter, by its full name ``part/name``."""


def trained_parameters(rack: Rack) -> dict[str, nn.Parameter]:
    """Full name → parameter, of those that require gradients."""
    return {f"{part}/{name}": p for part, name, p in rack.part_parameters() if p.requires_grad}


def create_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (1711.05101), fused. Matrices decay; vectors (norms) do not."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True
    )


def moments_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Moments:
    """The state of each named parameter that has one."""
    return {name: dict(optimizer.state[p]) for name, p in parameters.items() if p in optimizer.state}


def set_moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], moments: Moments) -> None:
    """Gives the named parameters their state; those without an entry start fresh."""
    for name, parameter in parameters.items():
        if name in moments:
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments[name].items()}


def moments_for_phase(phase: Phase, moments: Moments, names: Iterable[str]) -> Moments:
    """What remains of ``moments`` when ``phase`` starts to train the parameters ``names``.

    ``keep``: what goes on training keeps its state. ``reset``: nothing does. ``copy``: as keep, and a copied Stack
    starts with a copy of its source's state.
    """
    if phase.optimizer_state == "reset":
        return {}
    kept = {name: moments[name] for name in names if name in moments}
    if phase.optimizer_state == "copy":
        sources = {f"stack.{new.stack}": f"stack.{new.source}" for new in phase.growth if new.source is not None}
        for name in names:
            part, _, rest = name.partition("/")
            source = f"{sources.get(part)}/{rest}"
            if source in moments:
                kept[name] = {key: value.clone() for key, value in moments[source].items()}
    return kept


def flatten(moments: Moments) -> dict[str, Tensor]:
    """For a checkpoint: ``part/name/key`` → tensor."""
    return {f"{name}/{key}": value for name, state in moments.items() for key, value in state.items()}


def unflatten(tensors: Mapping[str, Tensor]) -> Moments:
    """Undoes ``flatten``."""
    moments: Moments = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition("/")
        moments.setdefault(name, {})[key] = value
    return moments
