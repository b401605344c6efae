"""What a checkpoint says of the Rack whose weights it holds, and that Rack again."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from stackwise.config.base import StackWiseConfig
from stackwise.errors import UserError
from stackwise.growth.adapters import described, restore
from stackwise.growth.precision import PrecisionManager
from stackwise.model.architecture import Rack, rack_spec_from_config
from stackwise.model.weights import fill_tensors
from stackwise.store.checkpoints import Checkpoint


def structure(rack: Rack) -> dict[str, Any]:
    """What a checkpoint says of a Rack beside its config: the order of its Stacks, their storage and adapters."""
    return {
        "stacks": [stack.stack_id for stack in rack.stacks],
        "precision": PrecisionManager().described(rack),
        "adapters": described(rack),
    }


def rack_of_checkpoint(
    checkpoint: Checkpoint, config: StackWiseConfig, vocab_size: int, offloaded: Collection[int] = ()
) -> Rack:
    """The Rack of a checkpoint, with its weights.

    Args:
        offloaded: ids of Stacks that stay on the meta device; their adapters are read all the same.

    Raises:
        UserError: a tensor is missing or has another shape or dtype than the config's.
    """
    with torch.device("meta"):
        rack = Rack(rack_spec_from_config(config, checkpoint.state["stacks"], vocab_size))
        _store_and_adapt(rack, checkpoint)
    _fill(rack, checkpoint, offloaded)
    return rack


def fill_rack(rack: Rack, checkpoint: Checkpoint) -> None:
    """Gives ``rack`` the storage, the adapters and the weights of ``checkpoint``; raises as ``rack_of_checkpoint``."""
    if [stack.stack_id for stack in rack.stacks] != checkpoint.state["stacks"]:
        raise UserError(
            f"the checkpoint holds the Stacks {checkpoint.state['stacks']}, but the Rack has "
            f"{[stack.stack_id for stack in rack.stacks]}"
        )
    _store_and_adapt(rack, checkpoint)
    _fill(rack, checkpoint, ())


def _store_and_adapt(rack: Rack, checkpoint: Checkpoint) -> None:
    PrecisionManager().restore(rack, checkpoint.state.get("precision", {}))
    restore(rack, checkpoint.state.get("adapters", []))


def _fill(rack: Rack, checkpoint: Checkpoint, offloaded: Collection[int]) -> None:
    unread = {f"stack.{k}" for k in offloaded}
    for part, wanted in rack.tensors_by_part().items():
        if part in unread:
            continue
        tensors = checkpoint.part(part) if part in checkpoint.parts else {}
        for name, tensor in wanted.items():
            found = tensors.get(name)
            if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
                there = "nothing" if found is None else f"{tuple(found.shape)} {found.dtype}"
                raise UserError(
                    f"the checkpoint does not fit the config: {part}/{name} is {tuple(tensor.shape)} {tensor.dtype}, "
                    f"the checkpoint holds {there}"
                )
        fill_tensors(rack.part_module(part), {name: tensors[name] for name in wanted})
