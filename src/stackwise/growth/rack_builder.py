"""``ProgressiveRackBuilder``: adds Stacks to a Rack, freezes, saves and loads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from stackwise.config.base import StackWiseConfig
from stackwise.errors import UserError
from stackwise.growth.adapters import adapters_of, add_adapter, described, plain_state, restore
from stackwise.growth.phases import Adapter, AdapterKind, Growth, Phase
from stackwise.growth.precision import PrecisionManager
from stackwise.model.architecture import Rack, Stack, Stacks, create_rack_from_config, create_stack_from_config
from stackwise.model.initialisation import RESIDUAL_OUTPUTS
from stackwise.model.layers import never_trained
from stackwise.model.lexical import resolve_family
from stackwise.model.linear import linears
from stackwise.model.weights import load_weights, save_weights
from stackwise.reading import parse_json


def set_trainable(rack: Rack, parts: Iterable[str], adapters: Iterable[Adapter] = ()) -> None:
    """Gives gradients to the parameters of ``parts`` and ``adapters`` and to no others.

    Args:
        parts: names of ``Rack.parts``, or of a single Block, ``stack.<id>/blocks.<index>``; what is frozen goes to
            evaluation mode. Parameters that their module declares as never trained stay frozen.
        adapters: those that train are told by their ``trains``.

    Raises:
        ValueError: the Rack has no such part, or it is stored in a precision that cannot train.
    """
    modules = rack.parts()
    wanted: dict[str, nn.Module] = {}
    for name in parts:
        part, _, inner = name.partition("/")
        if part not in modules:
            raise ValueError(f"the Rack has no part {part!r}; it has {', '.join(modules)}")
        wanted[name] = modules[part].get_submodule(inner)
    PrecisionManager().check(rack, wanted)
    fixed = never_trained(rack)
    rack.requires_grad_(False)
    for module in modules.values():
        module.eval()
    for module in wanted.values():
        module.train()
        for parameter in module.parameters():
            parameter.requires_grad_(parameter not in fixed)
    trained = {(adapter.stack, adapter.kind) for adapter in adapters if adapter.trains}
    for stack in rack.stacks:
        for _, layer in linears(stack):
            for kind, low in layer.low_rank().items():
                trains = (stack.stack_id, kind) in trained
                low.train(trains).requires_grad_(trains)


@torch.no_grad()
def zero_residual_outputs(stack: nn.Module) -> None:
    """Makes every Block of ``stack`` (or a single Block) the identity: x + 0 and x + 0."""
    for name, module in stack.named_modules():
        if name.split(".")[-1] in RESIDUAL_OUTPUTS and isinstance(module, nn.Linear):
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()


def _copy_stack(source: Stack, new: Stack) -> None:
    """Copies all that both have. A first Block without a norm before its attention gives none, and takes none."""
    there, wanted = plain_state(source), new.state_dict()
    odd = {name for name in there.keys() ^ wanted.keys() if ".attention_norm." not in name}
    odd |= {name for name in there.keys() & wanted.keys() if there[name].shape != wanted[name].shape}
    if odd:
        raise UserError(
            f"training.progressive.new_stack_init: 'copy' needs equal Stacks, but Stack {new.stack_id} differs from "
            f"Stack {source.stack_id} in {min(odd)}; set identity or random"
        )
    new.load_state_dict({name: there.get(name, value) for name, value in wanted.items()})


def grow_rack(rack: Rack, growth: Iterable[Growth], stacks: Iterable[int], config: StackWiseConfig) -> None:
    """Adds the Stacks of ``growth`` to ``rack`` at the places they have in ``stacks``, each initialised as it says."""
    insert_stacks(rack, make_stacks(rack, growth, config), stacks)


@torch.no_grad()
def make_stacks(rack: Rack, growth: Iterable[Growth], config: StackWiseConfig) -> list[Stack]:
    """The Stacks of ``growth``, each initialised as it says, beside ``rack``."""
    present = {stack.stack_id: stack for stack in rack.stacks}
    made = []
    for new in growth:
        present[new.stack] = _new_stack(new, present, config).to(rack.device)
        made.append(present[new.stack])
    return made


def insert_stacks(rack: Rack, made: Iterable[Stack], stacks: Iterable[int]) -> None:
    """Puts Stacks into ``rack``, whose order is then ``stacks``."""
    present = {stack.stack_id: stack for stack in (*rack.stacks, *made)}
    rack.stacks = Stacks(present[k] for k in stacks)


def _new_stack(growth: Growth, present: Mapping[int, Stack], config: StackWiseConfig) -> Stack:
    new = create_stack_from_config(growth.stack, config)
    if growth.init == "copy":
        assert growth.source is not None
        _copy_stack(present[growth.source], new)
    elif growth.init == "identity":
        zero_residual_outputs(new)
    return new


def prepare_phase(
    rack: Rack, phase: Phase, config: StackWiseConfig, stored: Callable[[], None] | None = None
) -> set[str]:
    """Makes ``rack`` what ``phase`` trains: grown, stored, adapted and frozen as it says.

    What is there already stays, so that a Rack from a checkpoint of the phase is left as it is.

    Args:
        stored: called when Stacks that were there have changed their precision, before anything joins.

    Returns:
        The parts whose tensors are other ones now.
    """
    precisions, changed = PrecisionManager(), set()
    present = {stack.stack_id for stack in rack.stacks}
    # Copies are taken before their source is stored in fewer bits.
    made = make_stacks(rack, [new for new in phase.growth if new.stack not in present], config)
    for stack in rack.stacks:
        if precisions.store(stack, phase.precision_of(stack.stack_id)):
            changed.add(f"stack.{stack.stack_id}")
    if changed and stored is not None:
        stored()
    for stack in made:
        precisions.store(stack, phase.precision_of(stack.stack_id))
        changed.add(f"stack.{stack.stack_id}")
    insert_stacks(rack, made, phase.stacks)
    wanted = {(adapter.stack, adapter.kind) for adapter in phase.adapters}
    extra = [a for a in adapters_of(rack) if (a.stack, a.kind) not in wanted]
    if extra:
        raise ValueError(
            f"the phase '{phase.name}' does not know the {extra[0].kind} adapter of Stack {extra[0].stack}"
        )
    stacks = {stack.stack_id: stack for stack in rack.stacks}
    for adapter in phase.adapters:
        if add_adapter(stacks[adapter.stack], adapter, config.training.seed):
            changed.add(f"adapters.{adapter.stack}")
    set_trainable(rack, phase.trains, phase.adapters)
    return changed


class ProgressiveRackBuilder:
    """Builds a Rack Stack by Stack.

    Args:
        config: shapes, seed and ``training.progressive.new_stack_init``.
        building_mode: ``append`` or ``prepend``; default: ``training.progressive.building_mode``.
        vocab_size: default: ``model.vocab_size``.
    """

    def __init__(
        self,
        config: StackWiseConfig,
        building_mode: Literal["append", "prepend"] | None = None,
        *,
        vocab_size: int | None = None,
    ) -> None:
        mode = building_mode or config.training.progressive.building_mode
        if mode not in ("append", "prepend"):
            raise ValueError(f"building_mode is {mode!r}; allowed for a builder: append, prepend")
        self.config = resolve_family(config.changed({"training.progressive.building_mode": mode}))
        self.building_mode = mode
        self.rack = create_rack_from_config(self.config, n_stacks=0, vocab_size=vocab_size)

    def _add(self, at_left: bool, init: str | None) -> Stack:
        order = [stack.stack_id for stack in self.rack.stacks]
        new = max(order, default=-1) + 1
        neighbour = (order[0] if at_left else order[-1]) if order else None
        init = init or self.config.training.progressive.new_stack_init
        if init not in ("random", "identity", "copy"):
            raise ValueError(f"init is {init!r}; allowed: random, identity, copy")
        if neighbour is None:
            init = "random"
        growth = Growth(new, init, neighbour if init == "copy" else None)  # type: ignore[arg-type]
        grow_rack(self.rack, [growth], [new, *order] if at_left else [*order, new], self.config)
        return next(stack for stack in self.rack.stacks if stack.stack_id == new)

    def append_stack(self, init: str | None = None) -> Stack:
        """Adds a Stack at the right of the trunk and returns it. ``init``: random, identity or copy."""
        return self._add(False, init)

    def prepend_stack(self, init: str | None = None) -> Stack:
        """Adds a Stack at the left of the trunk and returns it. ``init``: random, identity or copy."""
        return self._add(True, init)

    def add_stack(self) -> Stack:
        """Adds a Stack where ``building_mode`` says."""
        return self._add(self.building_mode == "prepend", None)

    def build_rack(self, n_stacks: int | None = None) -> Rack:
        """The Rack, grown to ``n_stacks`` (default: the config's target) Stacks if it has fewer."""
        target = self.config.target_stacks if n_stacks is None else n_stacks
        while len(self.rack.stacks) < target:
            self.add_stack()
        return self.rack

    def freeze_trunk(self) -> None:
        """Freezes everything but the newest Stack, the final norm and the head."""
        if not len(self.rack.stacks):
            raise ValueError("the Rack has no Stack yet; append_stack first")
        newest = max(stack.stack_id for stack in self.rack.stacks)
        set_trainable(self.rack, {f"stack.{newest}", "norm", "head"} & set(self.rack.parts()))

    def add_adapters(self, kind: AdapterKind = "stack") -> None:
        """Gives every Stack that has none an adapter of this kind, with the rank that ``training.qlora`` says."""
        settings, total = self.config.training.qlora, self.config.target_stacks
        for stack in self.rack.stacks:
            rank, alpha = settings.stack_adapter(stack.stack_id, total)
            if kind == "progressive":
                rank, alpha = settings.progressive_rank, settings.progressive_alpha
            add_adapter(stack, Adapter(stack.stack_id, kind, rank, alpha, settings.dropout), self.config.training.seed)

    def freeze_all_but_qlora(self) -> None:
        """Freezes everything but the adapters. ValueError when there are none."""
        adapters = adapters_of(self.rack)
        if not adapters:
            raise ValueError("the Rack has no adapters yet; add_adapters first")
        set_trainable(self.rack, (), [replace(adapter, trains=True) for adapter in adapters])

    def get_rack_info(self) -> dict[str, Any]:
        """Stacks, Blocks and parameters, in all and trainable, and by part."""
        counts: dict[str, dict[str, int]] = {}
        for part, _, parameter in self.rack.part_parameters():
            entry = counts.setdefault(part, {"parameters": 0, "trainable_parameters": 0})
            entry["parameters"] += parameter.numel()
            entry["trainable_parameters"] += parameter.numel() if parameter.requires_grad else 0
        return {
            "building_mode": self.building_mode,
            "n_stacks": len(self.rack.stacks),
            "stacks": [stack.stack_id for stack in self.rack.stacks],
            "n_blocks": len(self.rack.blocks()),
            "parameters": sum(c["parameters"] for c in counts.values()),
            "trainable_parameters": sum(c["trainable_parameters"] for c in counts.values()),
            "parts": counts,
        }

    def save_rack(self, path: str | Path) -> None:
        """Writes all weights, as they are stored, to one safetensors file; its header says which Stacks there are."""
        header = {
            "stacks": ",".join(str(stack.stack_id) for stack in self.rack.stacks),
            "precision": json.dumps(PrecisionManager().described(self.rack)),
            "adapters": json.dumps(described(self.rack)),
        }
        tensors = {f"{part}/{name}": t.detach() for part, name, t in self.rack.part_tensors()}
        save_weights(path, tensors, header)

    def load_rack(self, path: str | Path) -> Rack:
        """Replaces the Rack by the one in ``path``. Raises ``UserError`` when it does not fit the config."""
        tensors, metadata = load_weights(path)
        if "stacks" not in metadata:
            raise UserError(f"{path}: not a Rack; save_rack writes one")
        order = [int(k) for k in metadata["stacks"].split(",") if k]
        rack = create_rack_from_config(self.config, n_stacks=0, vocab_size=self.rack.vocab_size, load_family=False)
        rack.stacks = Stacks(create_stack_from_config(k, self.config) for k in order)
        PrecisionManager().restore(rack, parse_json(metadata.get("precision", "{}")))
        restore(rack, parse_json(metadata.get("adapters", "[]")))
        own = {f"{part}/{name}": t for part, name, t in rack.part_tensors()}
        _copy_into(own, tensors, path)
        self.rack = rack
        return rack

    def save_stack(self, stack_id: int, path: str | Path) -> None:
        """Writes one Stack to a safetensors file."""
        save_weights(path, dict(self._stack(stack_id).state_dict()), {"stack": str(stack_id)})

    def load_stack(self, stack_id: int, path: str | Path) -> Stack:
        """Puts the weights in ``path`` into Stack ``stack_id`` of the Rack."""
        stack = self._stack(stack_id)
        tensors, metadata = load_weights(path)
        if "stack" not in metadata:
            raise UserError(f"{path}: not a Stack; save_stack writes one")
        _copy_into(dict(stack.state_dict()), tensors, path)
        return stack

    def _stack(self, stack_id: int) -> Stack:
        for stack in self.rack.stacks:
            if stack.stack_id == stack_id:
                return stack
        raise ValueError(f"the Rack has no Stack {stack_id}; it has {[s.stack_id for s in self.rack.stacks]}")


@torch.no_grad()
def _copy_into(own: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], path: str | Path) -> None:
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise UserError(f"{path}: its weights do not fit this config; first difference: {odd[0]}")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, but this config needs {tuple(own[name].shape)}"
            )
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
