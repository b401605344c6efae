"""Training that starts from the Rack of another run: ``model.initial``, and ``stackwise train CONFIG --from RUN``.

``RUN@STEP`` names the checkpoint of a step of it, and ``RUN@best`` its best one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stackwise.config.base import StackWiseConfig, read_yaml
from stackwise.errors import UserError
from stackwise.model.architecture import Rack
from stackwise.store.changes import Changes
from stackwise.store.checkpoints import Checkpoint, CheckpointStore
from stackwise.store.identity import check_config
from stackwise.store.rundir import RunDir
from stackwise.store.state import StepName, load_checkpoint
from stackwise.store.structure import rack_of_checkpoint

_FREE = ("initial", "vocab_size", "dropout", "architecture", "tokenizer_embedding", "freeze_up_proj")
"""Settings of ``model`` in which a run may differ from the one it starts from."""
_FULL = {None, "gpt_style", "bert_style"}
"""Presets of full attention, whose weights are the same and fit every direction."""


def run_and_step(name: str | Path) -> tuple[Path, StepName | None]:
    """``RUN``, ``RUN@STEP`` or ``RUN@best`` as the run and the step; a run whose own name ends so is that run."""
    match = re.fullmatch(r"(.+)@(best|\d{1,18})", str(name), re.ASCII | re.DOTALL)
    if match is None or RunDir(name).config.exists():
        return Path(name), None
    return Path(match[1]), "best" if match[2] == "best" else int(match[2])


def resolve_initial(config: StackWiseConfig) -> StackWiseConfig:
    """``config`` with the number of the step in ``model.initial``, where that names the best one of its time."""
    initial = config.model.initial
    if initial is None or run_and_step(initial)[1] != "best":
        return config
    checkpoint = initial_checkpoint(config)
    assert checkpoint is not None
    return config.changed({"model.initial": f"{run_and_step(initial)[0]}@{checkpoint.step}"})


def settings_from_run(path: str | Path, initial: str | Path) -> dict[str, Any]:
    """The settings in ``path``, with the model and tokenizer of the run ``initial`` where it says nothing else."""
    run = RunDir.open(run_and_step(initial)[0])
    base = StackWiseConfig.from_yaml(run.config).to_dict()
    data = read_yaml(path)
    # Sections that are no mapping are left as they are: reading the config says what is wrong with them.
    model = data.get("model")
    if model is None or isinstance(model, dict):
        data["model"] = _merged(base["model"], {**(model or {}), "initial": str(initial)})
    section = data.get("data")
    if section is None or (isinstance(section, dict) and "tokenizer" not in section):
        data["data"] = {**(section or {}), "tokenizer": {"kind": "pretrained", "path": str(run.tokenizer)}}
    return data


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``changes``, section by section."""
    both = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        both[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def initial_checkpoint(config: StackWiseConfig) -> Checkpoint | None:
    """The checkpoint that ``model.initial`` names, the newest where it names no step; None without a run there.

    Raises:
        UserError: there is no run, it has no checkpoint, or its model is another one.
    """
    if config.model.initial is None:
        return None
    path, step = run_and_step(config.model.initial)
    run = RunDir.open(path)
    base = StackWiseConfig.from_yaml(run.config)
    for key in type(base.model).model_fields:
        there, here = getattr(base.model, key), getattr(config.model, key)
        if key not in _FREE and there != here and not (key == "attention_preset" and {there, here} <= _FULL):
            raise UserError(f"model.{key}: {here!r}, but the run that model.initial names has {there!r}")
    for key in ("family", "embedding_option", "adapter_hidden_dim", "embedding_dim"):
        there, here = getattr(base.model.tokenizer_embedding, key), getattr(config.model.tokenizer_embedding, key)
        if there != here:
            raise UserError(
                f"model.tokenizer_embedding.{key}: {here!r}, but the run that model.initial names has {there!r}"
            )
    if base.time_fields != config.time_fields:
        there, here = base.training.progressive.time_interpretation, config.training.progressive.time_interpretation
        raise UserError(
            f"training.progressive.time_interpretation: {here!r}, but the run that model.initial names has {there!r}, "
            "or another training.diffusion.time_embedding or time_dim"
        )
    store = CheckpointStore(run.checkpoints)
    if not store.has_any():
        raise UserError(f"model.initial: {config.model.initial!r} has no checkpoint yet")
    checkpoint = load_checkpoint(store, step)
    check_config(checkpoint, Changes.of(run).config_of(checkpoint.step, base), run.config)
    for k in checkpoint.state["stacks"]:
        there, here = base.model.architecture.blocks_of(k), config.model.architecture.blocks_of(k)
        if there != here:
            raise UserError(
                f"model.architecture.blocks_per_stack: {here} for Stack {k}, which has {there} Blocks in the run that "
                "model.initial names"
            )
    return checkpoint


def initial_rack(checkpoint: Checkpoint, config: StackWiseConfig, vocab_size: int | None) -> Rack:
    """The Rack that a run starts from, grown to ``vocab_size`` where the vocabulary has one token more, the mask.

    Args:
        vocab_size: ``None``: the checkpoint's own.
    """
    # Of a checkpoint without an embedding, rack_of_checkpoint says so.
    rows = len(checkpoint.part("embedding")["weight"]) if "embedding" in checkpoint.parts else vocab_size or 1
    if vocab_size is None or rows + 1 != vocab_size:
        return rack_of_checkpoint(checkpoint, config, vocab_size or rows)
    rack = rack_of_checkpoint(checkpoint, config, rows)
    rack.extend_vocabulary(1)
    return rack


def initial_stacks(config: StackWiseConfig) -> tuple[int, ...]:
    """Ids of the Stacks that are there before the first phase, left to right."""
    checkpoint = initial_checkpoint(config)
    return () if checkpoint is None else tuple(checkpoint.state["stacks"])
