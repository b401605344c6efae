"""The config of a run that goes on from another one with labelled texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from stackwise.config.base import StackWiseConfig, apply_overrides
from stackwise.data.labelled import prepare_labelled, training_names
from stackwise.data.tokenizers import load_tokenizer
from stackwise.errors import UserError
from stackwise.kinds import OBJECTIVES
from stackwise.store.rundir import RunDir
from stackwise.training.progress import Reporter

TrunkName = Literal["trainable", "lora", "frozen"]

LR_TIMES_WIDTH = 2e-5 * 768
"""The learning rate of BERT-base (1810.04805 §A.3) times its width: narrower models take larger steps."""

_FASTER = {"trainable": 1.0, "lora": 10.0, "frozen": 50.0}
"""Learning rates as a multiple of that of a trainable trunk: what is new starts far from where it should be."""

_BATCH_SIZE = 32
_WARMUP = 0.1
"""Share of the steps."""

_ROUND = 8
"""``seq_len`` is a multiple of this."""


def finetune_config(
    run: str | Path,
    train: Sequence[str | Path],
    validation: Sequence[str | Path],
    *,
    objective: str = "classification",
    trunk: TrunkName = "trainable",
    epochs: float = 3.0,
    overrides: Iterable[str] = (),
    reporter: Reporter,
) -> StackWiseConfig:
    """The config that trains the model of ``run`` further on the rows of ``train``.

    Args:
        validation: files of validation rows; none: a tenth of the training rows.
        objective: classification or regression.
        trunk: what trains below the head: all, LoRA adapters, nothing.
        epochs: passes over the training rows.
        overrides: ``key.path=value`` settings, which have the last word.

    Raises:
        UserError: the run or the files cannot be used.
    """
    directory = RunDir.open(run)
    base = StackWiseConfig.from_yaml(directory.config)
    tokenizer = load_tokenizer(directory.tokenizer)
    settings = _settings(base, directory, objective, trunk)
    settings["data"] |= {"path": [str(path) for path in train]}
    if validation:
        settings["data"]["validation_path"] = [str(path) for path in validation]
    # What the files say comes below the overrides, but the overrides say how to read the files.
    config = StackWiseConfig.from_dict(settings, overrides)
    names, training = None, settings["training"]
    if OBJECTIVES[config.training.objective].labels == "classes":
        names = training_names(config.data)
        _refuse_numbers(names)
        if len(names) < 2:
            raise UserError(f"--train: all rows have the class {names[0]!r}; there must be two classes at least")
        training["classification"] = {"classes": len(names), "names": list(names)}
    rows = prepare_labelled(
        config.data, base.training.seq_len, names=names, progress=reporter.work, tokenizer=tokenizer
    )
    longest = max(int((side.starts[1:] - side.starts[:-1]).max()) for side in (rows.train, rows.validation))
    batch_size = config.training.batch_size
    steps = max(1, math.ceil(epochs * len(rows.train) / batch_size))
    training |= {"seq_len": min(base.training.seq_len, -(-longest // _ROUND) * _ROUND), "max_steps": steps}
    training["schedule"]["warmup_steps"] = round(_WARMUP * steps)
    training["schedule"]["decay_fraction"] = 1.0 - _WARMUP
    every_epoch = max(1, math.ceil(len(rows.train) / batch_size))
    training["evaluation"] = {"every_steps": every_epoch, "max_tokens": None}
    return StackWiseConfig.from_dict(apply_overrides(settings, overrides))


def _settings(base: StackWiseConfig, directory: RunDir, objective: str, trunk: TrunkName) -> dict[str, Any]:
    """What does not depend on the rows."""
    model = base.to_dict()["model"] | {"initial": str(directory.path), "dropout": 0.1}
    # Attention that is free to would take the direction of the other objective.
    match model["attention_preset"]:
        case None:
            model["attention_preset"] = "gpt_style" if base.attention_mode == "causal" else "bert_style"
        case "gpt_style" | "bert_style":
            pass
        case _:
            model["attention_custom"] = {**model["attention_custom"], "attention_mode": base.attention_mode}
    if trunk == "frozen" and not base.model.has_head:
        raise UserError(
            "--trunk: 'frozen' trains the head alone, but this model's head is its embedding (model.tie_embeddings), "
            "which the trunk reads; use lora or trainable"
        )
    training: dict[str, Any] = {
        "strategy": "end_to_end",
        "batch_size": _BATCH_SIZE,
        "seq_len": base.training.seq_len,
        "device": base.training.device,
        "compute_dtype": base.training.compute_dtype,
        "seed": base.training.seed,
        "keep_best": True,
        "optimizer": {
            "lr": float(f"{_FASTER[trunk] * LR_TIMES_WIDTH / base.model.d_model:.1e}"),
            "weight_decay": 0.01,
            "betas": [0.9, 0.999],
        },
        "schedule": {"kind": "wsd", "min_lr_ratio": 0.0},
        "progressive": {"training_objective": objective},
    }
    if trunk != "trainable":
        entry = {"trains": "adapters" if trunk == "lora" else []}
        training |= {"strategy": "phases", "phases": [entry]}
    if trunk == "lora":
        training["qlora"] = {"enabled": True}
    tokenizer = {"kind": "pretrained", "path": str(directory.tokenizer)}
    return {"model": model, "training": training, "data": {"source": "labelled", "tokenizer": tokenizer}}


def _refuse_numbers(names: Iterable[str]) -> None:
    """UserError where the classes are numbers that are not whole: those are no classes."""
    try:
        fraction = next((name for name in names if not float(name).is_integer()), None)
    except ValueError:
        return
    if fraction is not None:
        raise UserError(f"--train: a label is {fraction}, a number and no class; use --objective regression")
