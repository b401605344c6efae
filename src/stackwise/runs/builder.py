"""``ProgressiveRackBuilder``: adds Stacks to a Rack, freezes, saves and loads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from stackwise.config.base import StackWiseConfig
from stackwise.errors import UserError
from stackwise.growth.adapters import adapters_of, add_adapter, described, plain_rack, restore
from stackwise.growth.phases import Adapter, AdapterKind, Growth
from stackwise.growth.precision import PrecisionManager
from stackwise.growth.preparation import grow_rack, set_trainable
from stackwise.model.architecture import Rack, Stack, Stacks, create_rack_from_config, create_stack_from_config
from stackwise.model.lexical import resolve_family
from stackwise.model.weights import load_weights, save_weights
from stackwise.reading import parse_json
from stackwise.runs.initial import initial_checkpoint, initial_rack


class ProgressiveRackBuilder:
    """Builds a Rack Stack by Stack, from no Stack or from the Rack of the run that ``model.initial`` names.

    With ``training.qlora.enabled`` a Stack gets its adapter when it joins; with ``progressive_enabled`` each Stack of
    the trunk that it joins gets its second one.

    Args:
        config: ``model``, ``training.seed``, ``training.qlora`` and ``training.progressive.new_stack_init``.
        building_mode: ``append`` or ``prepend``; default: ``training.progressive.building_mode``.
        vocab_size: default: ``model.vocab_size``, then the initial Rack's.

    Raises:
        UserError: ``model.initial`` names no run, or one with another model.
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
        self.rack = self._initial_rack(vocab_size)

    def _initial_rack(self, vocab_size: int | None) -> Rack:
        checkpoint = initial_checkpoint(self.config)
        if checkpoint is None:
            return create_rack_from_config(self.config, n_stacks=0, vocab_size=vocab_size)
        rack = plain_rack(initial_rack(checkpoint, self.config, vocab_size or self.config.model.vocab_size))
        set_trainable(rack, rack.parts())
        for stack in rack.stacks if self.config.training.qlora.enabled else ():
            self._give_adapter(stack, "stack")
        return rack

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
        added, qlora = self._stack(new), self.config.training.qlora
        if qlora.enabled:
            self._give_adapter(added, "stack")
        for k in order if qlora.progressive_enabled else ():
            self._give_adapter(self._stack(k), "progressive")
        return added

    def _give_adapter(self, stack: Stack, kind: AdapterKind) -> None:
        """Gives ``stack`` an adapter of this kind, unless it has one."""
        qlora, total = self.config.training.qlora, self.config.target_stacks
        if qlora.varies and stack.stack_id >= total:
            raise UserError(
                f"training.progressive.target_stacks: {total}, but the Rack has a Stack {stack.stack_id}; "
                "training.qlora.rank_pattern and alpha_pattern count all Stacks, so set it higher"
            )
        rank, alpha = qlora.stack_adapter(stack.stack_id, total)
        if kind == "progressive":
            rank, alpha = qlora.progressive_rank, qlora.progressive_alpha
        add_adapter(stack, Adapter(stack.stack_id, kind, rank, alpha, qlora.dropout), self.config.training.seed)

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
        for stack in self.rack.stacks:
            self._give_adapter(stack, kind)

    def freeze_all_but_qlora(self) -> None:
        """Freezes everything but the adapters. ValueError when there are none."""
        adapters = adapters_of(self.rack)
        if not adapters:
            raise ValueError(
                "the Rack has no adapters yet; set training.qlora.enabled before Stacks are added, or add_adapters"
            )
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
