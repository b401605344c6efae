"""The state of optimizers by parameter name, so that it survives growth and resume."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from stackwise.growth.phases import Phase
from stackwise.model.architecture import Rack
from stackwise.optim.create import Several

AnyOptimizer = torch.optim.Optimizer | Several
Moments = dict[str, dict[str, Tensor]]
"""Optimizer state of each parameter, by its full name ``part/name``."""


def trained_parameters(rack: Rack) -> dict[str, nn.Parameter]:
    """Full name → parameter, of those that require gradients."""
    return {f"{part}/{name}": p for part, name, p in rack.part_parameters() if p.requires_grad}


def heights(rack: Rack) -> dict[str, int]:
    """How far below the head each parameter is, in Blocks: norm and head 0, the last Block 1, … the embedding last."""
    first, blocks = {}, 0
    for stack in rack.stacks:
        first[f"{stack.stack_id}"] = blocks
        blocks += len(stack.blocks)
    found = {}
    for part, name, _ in rack.part_parameters():
        kind, _, stack_id = part.partition(".")
        if kind in ("stack", "adapters"):
            found[f"{part}/{name}"] = blocks - first[stack_id] - int(name.split(".")[1])  # blocks.<index>.…
        else:
            found[f"{part}/{name}"] = blocks + 1 if kind == "embedding" else 0
    return found


def moments_of(optimizer: AnyOptimizer, parameters: Mapping[str, nn.Parameter]) -> Moments:
    """The state of each named parameter that has one."""
    return {name: dict(optimizer.state[p]) for name, p in parameters.items() if p in optimizer.state}


def set_moments(optimizer: AnyOptimizer, parameters: Mapping[str, nn.Parameter], moments: Moments) -> None:
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


def moments_to_keep(moments: Moments, following: Sequence[Phase]) -> Moments:
    """What of ``moments`` the next phase can use, at a phase's end; nothing after the last."""
    if not following or following[0].optimizer_state == "reset":
        return {}
    phase = following[0]
    wanted = [*phase.trains, *(f"adapters.{adapter.stack}" for adapter in phase.adapters if adapter.trains)]
    if phase.optimizer_state == "copy":
        wanted += [f"stack.{new.source}" for new in phase.growth if new.source is not None]
    # A part's name ends at "/", that of a Block within it at ".".
    begins = tuple(f"{name}{'.' if '/' in name else '/'}" for name in wanted)
    return {name: state for name, state in moments.items() if name.startswith(begins)}


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
