"""Training that starts from the Rack of another run: ``model.initial``, and ``stackwise train CONFIG --from RUN``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from stackwise.config.base import StackWiseConfig, read_yaml
from stackwise.errors import UserError
from stackwise.model.architecture import Rack
from stackwise.training.checkpoints import Checkpoint, CheckpointStore
from stackwise.training.rundir import RunDir

_FREE = ("initial", "vocab_size", "dropout", "architecture", "tokenizer_embedding", "freeze_up_proj")
"""Settings of ``model`` in which a run may differ from the one it starts from."""


def config_from_run(path: str | Path, initial: str | Path, overrides: Iterable[str] = ()) -> StackWiseConfig:
    """The config in ``path`` with the model and the tokenizer of the run ``initial`` where it says nothing else."""
    run = RunDir.open(initial)
    base = StackWiseConfig.from_yaml(run.config).to_dict()
    data = read_yaml(path)
    # Sections that are no mapping are left as they are: reading the config says what is wrong with them.
    model = data.get("model")
    if model is None or isinstance(model, dict):
        data["model"] = _merged(base["model"], {**(model or {}), "initial": str(initial)})
    section = data.get("data")
    if section is None or (isinstance(section, dict) and "tokenizer" not in section):
        data["data"] = {**(section or {}), "tokenizer": {"kind": "pretrained", "path": str(run.tokenizer)}}
    return StackWiseConfig.from_dict(data, overrides, str(path))


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``changes``, section by section."""
    both = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        both[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def initial_checkpoint(config: StackWiseConfig) -> Checkpoint | None:
    """The newest checkpoint of ``model.initial``, if the config names a run there.

    Raises:
        UserError: there is no run, it has no checkpoint, or its model is another one.
    """
    if config.model.initial is None:
        return None
    run = RunDir.open(config.model.initial)
    base = StackWiseConfig.from_yaml(run.config)
    for key in type(base.model).model_fields:
        there, here = getattr(base.model, key), getattr(config.model, key)
        if key not in _FREE and there != here:
            raise UserError(f"model.{key}: {here!r}, but the run that model.initial names has {there!r}")
    for key in ("family", "embedding_option", "adapter_hidden_dim", "embedding_dim"):
        there, here = getattr(base.model.tokenizer_embedding, key), getattr(config.model.tokenizer_embedding, key)
        if there != here:
            raise UserError(
                f"model.tokenizer_embedding.{key}: {here!r}, but the run that model.initial names has {there!r}"
            )
    store = CheckpointStore(run.checkpoints)
    if not store.has_any():
        raise UserError(f"model.initial: {config.model.initial!r} has no checkpoint yet")
    checkpoint = store.load()
    for k in checkpoint.state["stacks"]:
        there, here = base.model.architecture.blocks_of(k), config.model.architecture.blocks_of(k)
        if there != here:
            raise UserError(
                f"model.architecture.blocks_per_stack: {here} for Stack {k}, which has {there} Blocks in the run that "
                "model.initial names"
            )
    return checkpoint


def initial_stacks(config: StackWiseConfig) -> tuple[int, ...]:
    """Ids of the Stacks that are there before the first phase, left to right."""
    checkpoint = initial_checkpoint(config)
    return () if checkpoint is None else tuple(checkpoint.state["stacks"])


def load_rack_weights(rack: Rack, checkpoint: Checkpoint) -> None:
    """Copies a checkpoint's weights into a Rack that has the same parts.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    with torch.no_grad():
        for part, module in rack.parts().items():
            tensors = checkpoint.part(part)
            for name, tensor in module.state_dict(keep_vars=True).items():
                if name not in tensors or tensors[name].shape != tensor.shape:
                    there = tuple(tensors[name].shape) if name in tensors else "nothing"
                    raise UserError(
                        f"the checkpoint does not fit the config: {part}/{name} has the shape {tuple(tensor.shape)}, "
                        f"the checkpoint holds {there}"
                    )
                tensor.copy_(tensors[name])
