"""The config keys of StackWise's first public versions, and what stands for each today: one table.

``legacy`` uses it where a config is read, ``migration`` where a file is rewritten. What depends on several settings at
once is in ``migration``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Old(NamedTuple):
    """``key`` is now ``to``, or nothing is (``to`` empty).

    Attributes:
        values: an old value, and today's, where they differ.
        why: what to write instead, or why nothing is needed.
        needed: whether a file that sets it asks for something that it does not get any more.
        loads: whether a config with this key is still read, with a warning.
    """

    key: str
    to: str = ""
    values: Mapping[Any, Any] = {}
    why: str = ""
    needed: bool = False
    loads: bool = False

    def asks(self, value: Any) -> bool:
        """Whether ``value`` of a key that is ``needed`` asks for anything: an epoch, a group, a dampening."""
        return self.needed and (value is True or value not in (None, False, 0, 1, "", [], {}))


_PRECISIONS = {"fp32": "full", "fp16": "half", "nf_fp8": "fp8"}
_OPTIMIZERS = {"AdamW": "adamw", "Adamw": "adamw", "ADAMW": "adamw", "SGD": "sgd", "Sgd": "sgd"}
_WHERE_RUN = "everything of a run lies in the folder that --out names"
_DUMMY = "there is no made-up data: without data.source a run reads Python's own library sources"
_TOKENIZER = "the tokenizer has it"
_ONE_RATE = "all adapters train at training.optimizer.lr"
_BUDGET = "training.max_steps is the budget of the whole run"
_LOADER = "batches are made from (seed, step), in the order that the seed gives"
_TRACKING = "runs write metrics.jsonl; training.logging has the trackers"

_TENSORBOARD = {True: ["tensorboard"], False: []}
_SIZES = ("d_model", "n_heads", "n_kv_heads", "d_ff", "vocab_size")
_ADAPTERS = {
    "qlora_enabled": "enabled", "qlora_rank": "rank", "qlora_alpha": "alpha", "qlora_dropout": "dropout",
    "qlora_strategy": "strategy", "qlora_rank_pattern": "rank_pattern", "qlora_alpha_pattern": "alpha_pattern",
    "progressive_qlora": "progressive_enabled", "progressive_qlora_enabled": "progressive_enabled",
    "progressive_qlora_rank": "progressive_rank", "progressive_qlora_alpha": "progressive_alpha",
}  # fmt: skip
"""Keys of ``training.progressive`` and ``training`` that are now in ``training.qlora``."""
_TIME = {
    "time_step_masking": "training.progressive: {training_objective: diffusion, time_interpretation: depth}",
    "num_time_steps": "model.architecture.n_stacks, one Stack for each interval of noise levels",
    "time_step_mask_fractions": "training.diffusion.levels, a list of rates from 1 down to 0, or for mlm "
    "training.masking.stack_rates, one rate a Stack",
}
_TIME_PLACES = ("training", "training.progressive")

OLD_KEYS: tuple[Old, ...] = (
    *(Old(f"model.architecture.{name}", f"model.{name}") for name in _SIZES),
    *(Old(f"training.architecture.{name}", f"model.architecture.{name}") for name in ("n_stacks", "blocks_per_stack")),
    Old("model.special_mask_id", why=_TOKENIZER),
    Old("training.lr", "training.optimizer.lr"),
    Old("training.learning_rate", "training.optimizer.lr"),
    Old("training.weight_decay", "training.optimizer.weight_decay"),
    Old("training.betas", "training.optimizer.betas"),
    Old("training.eps", "training.optimizer.eps"),
    Old("training.optimizer.optimizer_type", "training.optimizer.optimizer_type", _OPTIMIZERS),
    Old("training.gradient_checkpointing", "training.activation_checkpointing"),
    Old("training.gradient_clip", "training.grad_clip"),
    Old("training.log_interval", "training.logging.every_steps"),
    Old("training.logging.tensorboard", "training.logging.trackers", _TENSORBOARD, loads=True),
    Old("training.save_interval", "training.checkpoint.every_steps"),
    Old("training.validation_interval", "training.evaluation.every_steps"),
    Old("training.progressive.new_stack_precision", "training.progressive.new_stack_precision", _PRECISIONS),
    Old("training.progressive.trunk_precision", "training.progressive.trunk_precision", _PRECISIONS),
    *(
        Old(f"{section}.{key}", f"training.qlora.{to}")
        for section in ("training.progressive", "training")
        for key, to in _ADAPTERS.items()
    ),
    *(
        Old(f"{section}.{key}", f"training.masking.{to}", loads=key.startswith("mask_fraction"))
        for section in ("training", "training.progressive", "model")
        for to, keys in (
            ("rate", ("mask_fraction_min", "min_mask_fraction")),
            ("max_rate", ("mask_fraction_max", "max_mask_fraction")),
        )
        for key in keys
    ),
    *(Old(f"{section}.{key}", why=f"write {to}", needed=True) for section in _TIME_PLACES for key, to in _TIME.items()),
    Old("training.cache_dir", why=_WHERE_RUN),
    Old("training.activation_cache_dir", why=_WHERE_RUN),
    Old("training.checkpoint_dir", why=_WHERE_RUN),
    Old("training.run_id", why=_WHERE_RUN),
    *(
        Old(f"training.{key}", why="checkpoints hold every Stack, and the whole Rack")
        for key in ("save_stacks", "save_rack", "save_fused_checkpoints", "save_activations")
    ),
    Old("training.cache_mode", why="training.progressive.cache_activations says whether there is a cache"),
    Old("training.layerwise_training", why="training.strategy says what trains at a time"),
    Old("training.total_blocks", why="model.architecture has the sizes"),
    Old("training.epochs_per_layer", why=_BUDGET, needed=True),
    Old("training.epochs_per_stack", why=_BUDGET, needed=True),
    Old("training.fine_tune_mode", why="training.progressive.training_objective is the objective of every phase"),
    Old("training.fusion_evaluation", why="every phase ends in a validation of the whole Rack"),
    Old("training.fusion_enabled", why="training.progressive.joint_fraction gives a final phase for everything"),
    Old("training.joint_tuning_steps", why="training.progressive.joint_fraction gives a final phase for everything"),
    Old("training.mask_schedule_type", why="rates spread evenly; training.masking.stack_rates sets each Stack's"),
    Old("training.mask_token_id", why=_TOKENIZER),
    Old("training.current_block_lr", why="all that trains does at training.optimizer.lr"),
    Old("training.mixed_precision", why="training.compute_dtype: auto multiplies in bfloat16 where that is fast"),
    Old("training.qlora.mixed_precision", why="training.progressive.trunk_precision stores the trunk in fewer bits"),
    *(
        Old(key, why=_ONE_RATE, needed=True)
        for key in ("training.qlora.lr", "training.progressive.qlora_lr", "training.qlora_lr")
    ),
    *(
        Old(
            key,
            why="write training.qlora: {strategy: variable, rank_pattern: [...], alpha_pattern: [...]}",
            needed=True,
        )
        for key in ("training.qlora.configs", "training.progressive.qlora_configs", "training.qlora_configs")
    ),
    Old("training.debug", why="errors say what is wrong in a line"),
    Old("training.log_level", why="errors say what is wrong in a line"),
    Old("training.progressive.max_stacks", why="target_stacks is the limit"),
    Old("training.progressive.time_per_stack", why="training.diffusion.levels bounds the noise of each Stack"),
    Old("training.use_wandb", why=_TRACKING, needed=True),
    *(Old(f"training.wandb_{key}", why=_TRACKING) for key in ("project", "entity", "run_name", "tags", "notes")),
    Old("training.optimizer.use_groups", why="there is one group of parameters"),
    Old("training.optimizer.groups", why="all parameters have one learning rate", needed=True),
    Old("training.optimizer.custom_params", why="training.optimizer lists all settings", needed=True),
    Old("training.optimizer.dampening", why="sgd has no dampening", needed=True),
    Old("training.optimizer.nesterov", why="sgd has plain momentum", needed=True),
    Old("data.use_dummy_data", why=_DUMMY, needed=True),
    Old("data.num_samples", why="all of the text is used"),
    Old("data.padding", why="sequences are cut from the text without padding"),
    *(Old(f"data.{key}", why=_LOADER) for key in ("num_workers", "pin_memory", "shuffle")),
)
