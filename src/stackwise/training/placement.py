"""Where each Stack of a Rack is during a phase: on the device, in this machine's memory, or in the checkpoint store."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from stackwise.growth.phases import Phase
from stackwise.growth.precision import PrecisionManager
from stackwise.model.linear import linears
from stackwise.model.rack import Rack
from stackwise.model.stack import Stack
from stackwise.store.checkpoints import Checkpoint, CheckpointStore
from stackwise.store.objects import weights_sha256
from stackwise.training.offload import Offload, Source, all_tensors


class Placement:
    """Moves the Stacks of ``rack`` between ``device`` and where they wait.

    Args:
        where: ``training.offload``.
        store: of checkpoints, where offloaded Stacks wait, unless ``where`` is ``host``; ``None``: in memory.
    """

    def __init__(
        self, rack: Rack, device: torch.device, where: Literal["none", "host", "disk"], store: CheckpointStore | None
    ) -> None:
        self.rack, self.device, self.offload = rack, device, Offload(device)
        self._where = where
        self._store = None if where == "host" else store

    def recall(self, phase: Phase) -> None:
        """Brings back the Stacks that train in ``phase``, or change their storage, or are copied."""
        wanted = phase.trained_stacks | {new.source for new in phase.growth}
        for stack in self.rack.stacks:
            stored = PrecisionManager().precision_of(stack)
            if stack.stack_id in wanted or stored != phase.precision_of(stack.stack_id):
                self.offload.bring(stack)

    def place(self, phase: Phase) -> None:
        """Puts the Rack on the device, but offloads the Stacks that ``phase`` does not need there."""
        offloaded = phase.offloaded(self._where)
        if self._store is None and self.device.type == "cpu":
            offloaded = set()  # this machine's memory is the device's
        for name, module in self.rack.parts().items():
            if not isinstance(module, Stack):
                waits = name == "embedding" and phase.cached and not self.rack.tied
                module.to("cpu" if waits else self.device)
                continue
            if module.stack_id not in offloaded:
                self.offload.bring(module)
                module.to(self.device)
                continue
            for _, layer in linears(module):
                layer.adapters.to(self.device)
            if module.stack_id not in self.offload.offloaded:
                self.offload.send(module, self._source_of(module))

    def _source_of(self, stack: Stack) -> Source:
        """Writes the tensors of ``stack`` where they wait, and says how they come back."""
        part, tensors = f"stack.{stack.stack_id}", stack.own_tensors()
        if self._store is not None:
            self._store.deposit(part, tensors)
            return partial(self._store.withdraw, part)
        waiting = {name: tensor.cpu() for name, tensor in tensors.items()}
        if self.device.type == "cuda":
            waiting = {name: tensor.pin_memory() for name, tensor in waiting.items()}
        return lambda: waiting

    def adopt(self, checkpoint: Checkpoint, store: CheckpointStore) -> None:
        """Stacks on the meta device wait in ``store``, where ``checkpoint`` has their weights."""
        for stack in self.rack.stacks:
            if any(p.is_meta for p in stack.parameters()):
                part = f"stack.{stack.stack_id}"
                store.adopt(checkpoint, part)
                self.offload.send(stack, partial(store.withdraw, part))

    def reunite(self) -> None:
        """Puts the whole Rack on the device."""
        for stack in self.rack.stacks:
            self.offload.bring(stack)
        self.rack.to(self.device)

    def hash_of(self, stack: Stack) -> str:
        """Of the weights of ``stack``, without its adapters."""
        if self._store is not None and stack.stack_id in self.offload.offloaded:
            return self._store.hash_of(f"stack.{stack.stack_id}")
        return weights_sha256(stack.own_tensors().items())

    def parts(self) -> tuple[dict[str, dict[str, Tensor]], set[str]]:
        """The tensors of each part for a checkpoint, and the parts that are in its store already."""
        offloaded = {f"stack.{k}" for k in self.offload.offloaded}
        deposited = offloaded if self._store is not None else set()
        parts: dict[str, dict[str, Tensor]] = {}
        for part, name, tensor in self.rack.part_tensors() if deposited else all_tensors(self.rack, self.offload):
            if part not in deposited:
                parts.setdefault(part, {})[name] = tensor.detach()
        return parts, deposited

    def weights_sha256(self) -> str:
        """Of all weights, those of offloaded Stacks too."""
        return weights_sha256((f"{part}/{name}", t.detach()) for part, name, t in all_tensors(self.rack, self.offload))
