"""Whose a checkpoint is: the settings, the text and the tokenizer of its run, compared before it is used.

``config.yaml``, the text behind ``data.path`` and the tokenizer's folder can be changed after training, or come from
another run; weights whose shapes happen to fit would then be scored, and trained on, as something they are not.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from stackwise.config.base import StackWiseConfig, dotted, why_fixed
from stackwise.data.labelled import LabelledData
from stackwise.data.store import PreparedData
from stackwise.data.tokenizers import Tokenizer
from stackwise.errors import UserError
from stackwise.kinds import CORPORA
from stackwise.store.checkpoints import Checkpoint
from stackwise.store.rundir import RunDir

_FREE = ("device", "cpu_allocator", "logging", "checkpoint")
"""Settings of ``training`` that decide nothing of what is computed."""


def run_fingerprint(config: StackWiseConfig, data: PreparedData | LabelledData) -> str:
    """A hash of the data, its bytes included, and of every setting that decides what the run computes throughout."""
    settings = {key: value for key, value in _settings(config).items() if why_fixed(key) is not None}
    return hashlib.sha256(json.dumps([settings, data.key, data.sha256], sort_keys=True).encode()).hexdigest()


def identity(
    config: StackWiseConfig, tokenizer: Tokenizer | None, data: PreparedData | LabelledData | None
) -> dict[str, Any]:
    """What a checkpoint keeps of its run, as JSON; ``data`` is None for weights that were not trained here."""
    text = None if data is None else {"key": data.key, "sha256": data.sha256}
    return {"config": _settings(config), "tokenizer": tokenizer and tokenizer.fingerprint, "data": text}


def check_config(checkpoint: Checkpoint, config: StackWiseConfig, file: Path) -> None:
    """UserError that names the first setting in which ``config``, read from ``file``, is not the checkpoint's.

    Settings that only one of the two has are those of another version, and have their defaults.
    """
    saved = checkpoint.state.get("config")
    if saved is None:
        return
    here = _settings(config)
    for key in sorted(saved.keys() & here.keys()):
        if saved[key] != here[key]:
            change = "" if why_fixed(key) is not None else f" (stackwise resume {file.parent} {key}=… changes it)"
            raise UserError(
                f"{file}: {key} is {here[key]!r}, but the checkpoint of step {checkpoint.step} was trained with "
                f"{saved[key]!r}: this config.yaml does not belong to it; put the run's own one back{change}"
            )


def check_same_run(run: RunDir, config: StackWiseConfig) -> None:
    """UserError that names the first setting in which ``config`` means something else than that of ``run``."""
    there, here = _meant(StackWiseConfig.from_yaml(run.config)), _meant(config)
    for key in sorted(there):
        if there[key] != here[key]:
            raise UserError(
                f"{run.path}: the run there has {key} = {there[key]!r}, but you give {here[key]!r}; give the same, or "
                "another folder"
            )


def check_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer, folder: Path) -> None:
    """UserError when ``tokenizer``, read from ``folder``, is not the one that the checkpoint was trained with."""
    if checkpoint.state.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(
            f"{folder}: this is not the tokenizer that the checkpoint of step {checkpoint.step} was trained with; "
            "put the run's own one back"
        )


def check_data(checkpoint: Checkpoint, config: StackWiseConfig, key: str, sha256: str | None = None) -> None:
    """UserError when the text is no longer the one that the checkpoint was trained on.

    A checkpoint from before the store hashed its arrays is compared by what determines them.

    Args:
        key, sha256: of the text (``PreparedData``); ``None`` where its arrays are not known yet.
    """
    state = checkpoint.state
    if "data" not in state:
        if state["fingerprint"] != _fingerprint(config, key):
            raise UserError(
                f"the checkpoint of step {checkpoint.step} was saved by an earlier version, or config.yaml or the text "
                "behind data.path was changed since: start a new run"
            )
    elif state["data"] != {"key": key, "sha256": state["data"]["sha256"] if sha256 is None else sha256}:
        raise UserError(
            f"the text behind data.path is not the one that the checkpoint of step {checkpoint.step} was trained on, "
            "or it is split or tokenized in another way: put it back, or start a new run"
        )


def _settings(config: StackWiseConfig) -> dict[str, Any]:
    """The settings of model and training with dotted keys, lists whole; the text is known by its content."""
    return {key: value for key, value in _all_settings(config).items() if not key.startswith("data.")}


def _all_settings(config: StackWiseConfig) -> dict[str, Any]:
    settings = config.to_dict()
    for key in _FREE:
        settings["training"].pop(key)
    del settings["data"]["cache_dir"]
    return dotted(settings)


def _meant(config: StackWiseConfig) -> dict[str, Any]:
    """``_all_settings`` in one spelling: what is left to its default has its value, paths are absolute."""
    model, training, paths = config.model, config.training, config.data.path
    stacks, (unit, amount) = range(config.target_stacks), training.budget
    if CORPORA[config.data.source].path_takes == "paths":
        paths = tuple(os.path.abspath(path) for path in ([paths] if isinstance(paths, str) else paths or ()))
    return _all_settings(config) | {
        "model.head_dim": model.head_size,
        "model.n_kv_heads": model.kv_heads,
        "model.d_ff": model.ff_width,
        "model.norm_bias": model.norm_has_bias,
        "model.initial": model.initial and os.path.abspath(model.initial),
        "model.architecture.blocks_per_stack": [model.architecture.blocks_of(k) for k in stacks],
        "training.progressive.target_stacks": len(stacks),
        "training.micro_batch_size": training.micro_batch_size or training.batch_size,
        f"training.max_{unit}": amount,
        "data.path": paths,
    }


def _fingerprint(config: StackWiseConfig, data: object) -> str:
    settings = config.to_dict()
    for key in _FREE:
        settings["training"].pop(key)
    settings["data"] = data
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
