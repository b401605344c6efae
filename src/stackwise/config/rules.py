"""The rules between settings: which ones are only used beside another, and which combinations cannot be meant.

A rule inside one section stands with that section. ``check`` sees a whole config, and refuses at the key to change.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple, get_args

from stackwise.config.attention import KernelType
from stackwise.config.data import TokenizerConfig
from stackwise.config.messages import show
from stackwise.config.run import Settings
from stackwise.config.section import Section, conflict
from stackwise.kinds import CORPORA, OBJECTIVES, OPTIMIZERS, STORAGES, sequence_objectives


class OnlyUsed(NamedTuple):
    """``key`` keeps its default unless ``setting`` has one of ``values``; no values: any but null.

    Both are dotted paths of a config, or with ``[].`` of each entry of a list. ``setting`` may be a derived value.
    ``text`` stands where the plain sentence would not do: ``{values}`` in it are those, ``{found}`` what there is.
    """

    key: str
    setting: str
    values: tuple[Any, ...] = ()
    text: str = ""


def _using(setting: str) -> tuple[str, ...]:
    """The optimizers that use this setting of ``training.optimizer``."""
    return tuple(name for name, kind in OPTIMIZERS.items() if setting in kind.uses)


_LABELLED = tuple(name for name, kind in CORPORA.items() if kind.labelled)
_OPEN = ("efficient_gqa", "mla_attention", "kernel_attention", "mlgka", "custom")
_LATENT = ("mla_attention", "mlgka", "custom")
_KERNEL = ("kernel_attention", "mlgka", "custom")
_KERNELS = tuple(name for name in get_args(KernelType) if name != "linear")
_MLA = "is only used when attention_type is mla"
_ENTRY = "is only used in an entry with {values} (this entry has {found})"
_ONE_RATE = "has no effect when depth_variant is prefix, which gives each Stack a single masking rate"

ONLY_USED = (
    OnlyUsed("model.global_every", "model.window"),
    OnlyUsed("model.local_rope_theta", "model.window"),
    OnlyUsed("model.attention_custom.attention_type", "model.attention_preset", ("custom",)),
    OnlyUsed("model.attention_custom.attention_mode", "model.attention_preset", _OPEN),
    OnlyUsed("model.attention_custom.mla_rq", "model.attention_preset", _LATENT),
    OnlyUsed("model.attention_custom.mla_rq", "model.latents", text=_MLA),
    OnlyUsed("model.attention_custom.mla_rkv", "model.attention_preset", _LATENT),
    OnlyUsed("model.attention_custom.mla_rkv", "model.latents", text=_MLA),
    OnlyUsed("model.attention_custom.mla_latents", "model.attention_preset", _LATENT),
    OnlyUsed("model.attention_custom.mla_latents", "model.latents", text=_MLA),
    OnlyUsed("model.attention_custom.mla_rope_dim", "model.attention_preset", _LATENT),
    OnlyUsed("model.attention_custom.mla_rope_dim", "model.latents", text=_MLA),
    OnlyUsed("model.attention_custom.mla_rope_dim", "model.latents", ("shared",)),
    OnlyUsed("model.attention_custom.mla_rope_dim", "model.use_rope", (True,)),
    OnlyUsed("model.attention_custom.mla_v_head_dim", "model.attention_preset", _LATENT),
    OnlyUsed("model.attention_custom.mla_v_head_dim", "model.latents", text=_MLA),
    OnlyUsed("model.attention_custom.mla_v_head_dim", "model.latents", ("shared",)),
    OnlyUsed("model.attention_custom.kernel_type", "model.attention_preset", _KERNEL),
    OnlyUsed("model.attention_custom.kernel_dim", "model.attention_preset", _KERNEL),
    OnlyUsed("model.attention_custom.kernel_dim", "model.kernel_type", _KERNELS),
    OnlyUsed("model.attention_custom.kernel_dim", "model.attention_custom.kernel_meaning", ("logit",)),
    OnlyUsed("model.attention_custom.kernel_meaning", "model.attention_preset", _KERNEL),
    OnlyUsed("model.attention_custom.kernel_meaning", "model.kernel_type", _KERNELS),
    OnlyUsed("model.attention_custom.kernel_norm", "model.attention_preset", _KERNEL),
    OnlyUsed("model.attention_custom.kernel_bandwidth", "model.attention_preset", _KERNEL),
    OnlyUsed("model.attention_custom.kernel_bandwidth", "model.kernel_type", _KERNELS),
    OnlyUsed("model.attention_custom.learned_temperature", "model.attention_preset", _KERNEL),
    OnlyUsed("model.attention_custom.learned_temperature", "model.kernel_type", _KERNELS),
    OnlyUsed("model.attention_custom.learned_temperature", "model.attention_custom.kernel_meaning", ("logit",)),
    OnlyUsed("model.tokenizer_embedding.embedding_option", "model.tokenizer_embedding.family"),
    OnlyUsed("model.tokenizer_embedding.adapter_hidden_dim", "model.tokenizer_embedding.family"),
    OnlyUsed("model.tokenizer_embedding.embedding_dim", "model.tokenizer_embedding.family"),
    OnlyUsed("training.end_to_end_scope", "training.strategy", ("end_to_end",)),
    OnlyUsed("training.phases", "training.strategy", ("phases",)),
    OnlyUsed("training.phases[].at", "kind", ("add",), _ENTRY),
    OnlyUsed("training.phases[].init", "kind", ("add",), _ENTRY),
    OnlyUsed("training.phases[].trunk", "kind", ("add",), _ENTRY),
    OnlyUsed("training.phases[].precision", "kind", ("add",), _ENTRY),
    OnlyUsed("training.phases[].cycles", "kind", ("sweep",), _ENTRY),
    OnlyUsed("training.phases[].unit", "kind", ("sweep",), _ENTRY),
    OnlyUsed("training.phases[].group", "kind", ("sweep",), _ENTRY),
    OnlyUsed("training.phases[].group", "unit", ("stack",)),
    OnlyUsed("training.optimizer.betas", "training.optimizer.optimizer_type", _using("betas")),
    OnlyUsed("training.optimizer.eps", "training.optimizer.optimizer_type", _using("eps")),
    OnlyUsed("training.optimizer.moments", "training.optimizer.optimizer_type", _using("moments")),
    OnlyUsed("training.optimizer.momentum", "training.optimizer.optimizer_type", _using("momentum")),
    OnlyUsed("training.qlora.rank_pattern", "training.qlora.strategy", ("progressive", "variable")),
    OnlyUsed("training.qlora.alpha_pattern", "training.qlora.strategy", ("progressive", "variable")),
    OnlyUsed("training.masking.span_length", "training.masking.unit", ("span",)),
    OnlyUsed("training.masking.stack_rates", "training.objective", ("mlm",)),
    OnlyUsed("training.masking.stack_rates", "training.strategy", ("progressive",)),
    OnlyUsed("training.classification", "training.objective", ("classification",)),
    OnlyUsed("training.early_stopping", "training.evaluation.every_steps"),
    OnlyUsed("training.early_stopping.min_improvement", "training.early_stopping.patience"),
    OnlyUsed("training.early_stopping.ends", "training.early_stopping.patience"),
    OnlyUsed("training.evaluation.draws", "training.objectives", ("diffusion",)),
    OnlyUsed("training.progressive.time_interpretation", "training.objectives", ("diffusion",)),
    OnlyUsed("training.diffusion", "training.objectives", ("diffusion",)),
    OnlyUsed("training.diffusion.depth_variant", "training.progressive.time_interpretation", ("depth",)),
    OnlyUsed("training.diffusion.levels", "training.progressive.time_interpretation", ("depth",)),
    OnlyUsed("training.diffusion.difficulty", "training.progressive.time_interpretation", ("depth",)),
    OnlyUsed("training.diffusion.difficulty", "training.diffusion.levels", ("equal_difficulty",)),
    OnlyUsed("training.diffusion.expert", "training.progressive.time_interpretation", ("depth",)),
    OnlyUsed("training.diffusion.condition", "training.progressive.time_interpretation", ("input",)),
    OnlyUsed("training.diffusion.time_embedding", "training.progressive.time_interpretation", ("input",)),
    OnlyUsed("training.diffusion.time_dim", "training.progressive.time_interpretation", ("input",)),
    OnlyUsed("training.diffusion.weighting", "training.depth_variant", (None, "experts", "suffix"), _ONE_RATE),
    OnlyUsed("training.diffusion.weight_power", "training.depth_variant", (None, "experts", "suffix"), _ONE_RATE),
    OnlyUsed("training.diffusion.min_rate", "training.diffusion.weighting", ("stratified",)),
    OnlyUsed("data.path", "data.source", tuple(name for name, kind in CORPORA.items() if kind.path_takes)),
    OnlyUsed("data.validation_path", "data.source", _LABELLED),
    OnlyUsed("data.columns", "data.source", _LABELLED),
    OnlyUsed("training.classification.names", "data.source", _LABELLED),
    OnlyUsed("data.sources[].path", "source", tuple(name for name, kind in CORPORA.items() if kind.path_takes)),
    OnlyUsed("data.tokenizer.path", "data.tokenizer.kind", ("pretrained",)),
)

_DERIVED = {
    "training.objective": "the objective",
    "training.objectives": "the objective",
    "model.latents": "mla_latents",
}
"""What derived values are called in a message."""


def check(config: Settings) -> None:
    """Raises ``conflict`` for the first rule that ``config`` breaks."""
    for row in ONLY_USED:
        listed, each, key = row.key.rpartition("[].")
        if not each:
            _check_used(row, key, config, "")
            continue
        for i, entry in enumerate(_reader(listed)(config)):
            _check_used(row, key, entry, f"{listed}[{i}].")
    for rule in _RULES:
        rule(config)


_reader = functools.cache(attrgetter)
"""A config is checked each time that one is made, which is hundreds of times where settings that fit are searched."""


def _check_used(row: OnlyUsed, key: str, owner: Section, where: str) -> None:
    """Refuses ``key`` of ``owner``, which stands at ``where``, if it is set and not used."""
    parent, _, name = key.rpartition(".")
    section = _reader(parent)(owner) if parent else owner
    value = getattr(section, name)
    if value == type(section).model_fields[name].default:
        return
    found = _reader(row.setting)(owner)
    several = found if isinstance(found, tuple) else (found,)
    if any(one in row.values for one in several) if row.values else found is not None:
        return
    above, _, last = row.setting.rpartition(".")
    in_reach = not above or key.startswith(f"{above}.")  # beside the key or above it: the last name says which it is
    text = (row.text or "is only used when {setting} is {values} ({setting} is {found})").format(
        setting=_DERIVED.get(row.setting, last if in_reach else row.setting),
        values=_or(row.values) if row.values else "set",
        found=", ".join(map(_plain, several)),
    )
    whole = isinstance(value, Section) or row.key == "training.phases"
    raise conflict(where + key, text if whole else f"{show(value)} {text}")


def _plain(value: Any) -> str:
    """``value`` as YAML has it: names without quotes."""
    return value if isinstance(value, str) else show(value)


def _or(values: tuple[Any, ...]) -> str:
    *others, last = map(_plain, values)
    return f"{', '.join(others)} or {last}" if others else last


def _one_for_each_stack(key: str, entries: Any, n_stacks: int, at_least: bool = False) -> None:
    """Refuses a list at ``key`` that has not one entry a Stack."""
    if isinstance(entries, tuple) and (len(entries) < n_stacks if at_least else len(entries) != n_stacks):
        raise conflict(key, f"has {len(entries)} entries for {n_stacks} Stacks; list one entry for each Stack")


def _direction(config: Settings) -> None:
    preset = config.model.attention_preset
    for objective in config.training.objectives:
        mode, kind = config.mode_of(objective), OBJECTIVES[objective]
        if kind.either or mode == kind.attention:
            continue
        fitting = tuple(name for name, other in OBJECTIVES.items() if other.attention == mode and not other.either)
        if mode == "bidirectional":
            raise conflict(
                "model.attention_preset",
                f"{preset!r} is bidirectional, so attention would see the tokens that {objective} predicts; "
                f"set gpt_style, or training.progressive.training_objective: {_or(fitting)}",
            )
        raise conflict(
            "model.attention_preset",
            f"{preset!r} is causal, but {objective} needs bidirectional attention; set bert_style, "
            f"or training.progressive.training_objective: {_or(fitting)}",
        )


def _text(config: Settings) -> None:
    """The tokenizer beside a family's table, and the length of a sequence."""
    tokenizer, family = config.data.tokenizer, config.model.tokenizer_embedding.family
    if family is not None and tokenizer.kind != "pretrained" and tokenizer != TokenizerConfig():
        raise conflict(
            "data.tokenizer.kind",
            f"{tokenizer.kind!r} cannot be combined with model.tokenizer_embedding.family, which brings its own "
            "tokenizer; remove data.tokenizer",
        )
    positions, seq_len = config.model.learned_positions, config.training.seq_len
    if positions is not None and seq_len > positions:
        raise conflict(
            "training.seq_len",
            f"{seq_len} is above the number of learned positions (model.learned_positions is {positions})",
        )


def _labels(config: Settings) -> None:
    """Rows with labels, and the objectives that learn from them."""
    objective, source = config.training.objective, config.data.source
    if CORPORA[source].labelled and not OBJECTIVES[objective].of_sequences:
        raise conflict(
            "training.progressive.training_objective",
            f"{objective!r} learns from text, but data.source is {source}; set {_or(sequence_objectives())}, "
            "or data.source: files",
        )


def _update(config: Settings) -> None:
    """What the optimizer can do."""
    training = config.training
    if training.optimizer.in_backward and training.grad_clip is not None:
        raise conflict(
            "training.optimizer.in_backward",
            f"true cannot be combined with grad_clip ({training.grad_clip:g}), because the first update comes "
            "before the norm of all gradients is known; set grad_clip: null",
        )
    optimizer = training.optimizer.optimizer_type
    if training.progressive.new_stack_precision == "bfloat16" and not OPTIMIZERS[optimizer].rounds_at_random:
        raise conflict(
            "training.progressive.new_stack_precision",
            f"'bfloat16' requires optimizer_type: adamw, which rounds stochastically (optimizer_type is {optimizer})",
        )


def _noise(config: Settings) -> None:
    """Where the noise levels of Stacks meet, and blocks of tokens."""
    training, levels = config.training, config.training.diffusion.levels
    time = training.progressive.time_interpretation
    if isinstance(levels, tuple) and (
        len(levels) != config.target_stacks + 1
        or (levels[0], levels[-1]) != (1.0, 0.0)
        or any(a <= b for a, b in pairwise(levels))
    ):
        raise conflict(
            "training.diffusion.levels",
            f"{list(levels)} must be {config.target_stacks + 1} rates that fall from 1 to 0, one interval per Stack; "
            "otherwise the loss would not bound the likelihood",
        )
    if time is not None and len(training.objectives) > 1:
        other = next(name for name in training.objectives if name != "diffusion")
        raise conflict(
            "training.progressive.time_interpretation",
            f"{time!r} requires the objective diffusion in every phase, but some phases train {other}",
        )
    key, block = "training.diffusion.block_length", training.diffusion.block_length
    if block is None:
        return
    if training.seq_len % block:
        raise conflict(key, f"{block} does not divide seq_len ({training.seq_len})")
    if time is not None:
        raise conflict(key, f"{block} requires time_interpretation: null (time_interpretation is {time})")
    for setting, wanted, found in (
        ("model.window", "null", config.model.window),
        ("model.attention_custom.kernel_meaning", "logit", config.model.attention_custom.kernel_meaning),
    ):
        if found not in (None, "logit"):
            raise conflict(key, f"{block} requires {setting}: {wanted} ({setting} is {found})")


def _depth(config: Settings) -> None:
    """Which curricula train Stacks that share the noise levels."""
    training, progressive, variant = config.training, config.training.progressive, config.training.depth_variant
    if variant is None:
        return
    if training.strategy == "phases" or training.end_to_end_scope != "rackwise":
        raise conflict(
            "training.progressive.time_interpretation",
            "'depth' requires strategy: progressive, or end_to_end with end_to_end_scope: rackwise",
        )
    _expert(config)
    if progressive.cache_activations:
        raise conflict(
            "training.progressive.cache_activations",
            "true cannot be combined with time_interpretation: depth, which feeds tokens to every Stack",
        )
    if training.strategy != "progressive":
        return
    wanted = "prepend" if variant == "suffix" else "append"
    if progressive.building_mode != wanted:
        raise conflict(
            "training.progressive.building_mode",
            f"{progressive.building_mode!r} cannot be combined with depth_variant: {variant}; allowed: {wanted}",
        )
    if progressive.trunk_strategy == "qlora":
        raise conflict(
            "training.progressive.trunk_strategy",
            "'qlora' cannot be combined with time_interpretation: depth; allowed: frozen, trainable",
        )


def _expert(config: Settings) -> None:
    """One expert in a process of its own, and the run that it starts from."""
    training, expert = config.training, config.training.diffusion.expert
    if expert is not None:
        frozen = training.strategy == "progressive" and training.progressive.trunk_strategy == "frozen"
        fits = training.depth_variant == "experts" and frozen and expert < config.target_stacks
        if not fits or training.progressive.joint_fraction:
            raise conflict(
                "training.diffusion.expert",
                f"{expert} requires depth_variant: experts, strategy: progressive, trunk_strategy: frozen, "
                f"joint_fraction: 0, and a Stack id from 0 to {config.target_stacks - 1}",
            )
    if (config.model.initial is not None) != (expert is not None and expert > 0):
        alone = "cannot be combined with model.initial (train --from): training starts from initial weights"
        what = alone if expert in (None, 0) else "requires a run of expert 0 to start from (train --from RUN)"
        key = "training.progressive.time_interpretation" if expert is None else "training.diffusion.expert"
        raise conflict(key, f"{'depth' if expert is None else expert!r} {what}")


def _masking(config: Settings) -> None:
    """Masking rates of the Stacks."""
    key, rates = "training.masking.stack_rates", config.training.masking.stack_rates
    progressive = config.training.progressive
    if rates is None:
        return
    _one_for_each_stack(key, rates, config.target_stacks)
    if progressive.cache_activations or progressive.building_mode == "interleave":
        what = "cache_activations: true" if progressive.cache_activations else "building_mode: interleave"
        raise conflict(key, f"{list(rates)} cannot be combined with {what}; remove stack_rates")


def _growth(config: Settings) -> None:
    """The Stacks that join: how many, where, from what, for how long."""
    training, progressive = config.training, config.training.progressive
    if training.strategy == "phases" and not training.phases:
        raise conflict("training.phases", "must list at least one phase when strategy is phases")
    _one_for_each_stack(
        "model.architecture.blocks_per_stack", config.model.architecture.blocks_per_stack, config.target_stacks, True
    )
    if progressive.building_mode == "interleave" and config.model.initial is None:
        raise conflict(
            "training.progressive.building_mode",
            "'interleave' adds Stacks between those of another run; set model.initial (train --from RUN), or use "
            "append or prepend",
        )
    if progressive.optimizer_state == "copy" and progressive.new_stack_init != "copy":
        raise conflict(
            "training.progressive.optimizer_state",
            f"'copy' requires new_stack_init: copy (new_stack_init is {progressive.new_stack_init})",
        )
    fractions = progressive.phase_fractions
    if training.strategy == "progressive" and fractions is not None:
        _one_for_each_stack("training.progressive.phase_fractions", fractions, config.target_stacks)
        if abs(sum(fractions) + progressive.joint_fraction - 1.0) > 1e-6:
            raise conflict(
                "training.progressive.phase_fractions",
                f"{list(fractions)} and joint_fraction ({progressive.joint_fraction:g}) sum to "
                f"{sum(fractions) + progressive.joint_fraction:g}; the sum must be 1",
            )


def _storage(config: Settings) -> None:
    """How weights are stored, of the trunk and of what joins it."""
    progressive = config.training.progressive
    for i, entry in enumerate(config.training.phases):
        trains = (entry.trunk or progressive.trunk_strategy) == "trainable"
        if trains and entry.precision not in (None, "full"):
            raise conflict(
                f"training.phases[{i}].precision",
                f"{entry.precision!r} applies only to a frozen trunk, but this entry's trunk is trainable; "
                "set trunk: frozen or qlora, or precision: full",
            )
    if set(config.trunks().values()) == {"trainable"} and progressive.trunk_precision != "full":
        raise conflict(
            "training.progressive.trunk_precision",
            f"{progressive.trunk_precision!r} applies only to a frozen trunk, but trunk_strategy is trainable; "
            "set trunk_strategy: frozen or qlora, or trunk_precision: full",
        )
    trainable = tuple(name for name, kind in STORAGES.items() if kind.trains)
    if progressive.new_stack_precision not in trainable and not config.training.qlora.enabled:
        raise conflict(
            "training.progressive.new_stack_precision",
            f"{progressive.new_stack_precision!r} weights cannot be trained; set {_or(trainable)}, or set "
            "training.qlora.enabled: true to train adapters beside them",
        )


def _trunk(config: Settings) -> None:
    """What the trunk does when Stacks join it: adapters, a shared head, Stacks off the device."""
    training, qlora, trunks = config.training, config.training.qlora, config.trunks()
    of_strategy = {strategy: key for key, strategy in reversed(trunks.items())}  # the first key of each
    if "qlora" in of_strategy and not (qlora.enabled or qlora.progressive_enabled):
        raise conflict(
            of_strategy["qlora"],
            "'qlora' trains the trunk's adapters, but adapters are not enabled; set training.qlora.enabled or "
            "training.qlora.progressive_enabled to true",
        )
    still = of_strategy.keys() - {"trainable"}
    if still and config.model.tie_embeddings and config.model.initial is None:
        kind = min(still)
        raise conflict(
            "model.tie_embeddings",
            f"true cannot be combined with {of_strategy[kind]}: {kind}, because training the head would change the "
            "embedding that the trunk reads; set tie_embeddings: false, or make the trunk trainable",
        )
    for i, entry in enumerate(training.phases):
        if entry.trains == "adapters" and not (qlora.enabled or qlora.progressive_enabled):
            raise conflict(
                f"training.phases[{i}].trains",
                "'adapters' trains adapters, but they are not enabled; set training.qlora.enabled: true",
            )
    if training.offload != "none" and not config.freezes_stacks:
        grows = training.strategy == "progressive" and trunks
        why = "trunk_strategy is trainable" if grows else "no phase freezes any"
        raise conflict("training.offload", f"{training.offload!r} applies only to frozen Stacks, but {why}")
    for key in ("rank_pattern", "alpha_pattern"):
        _one_for_each_stack(f"training.qlora.{key}", getattr(qlora, key), config.target_stacks, True)


def _cache(config: Settings) -> None:
    """What a cache of hidden states needs, to stay right."""
    training, trunks = config.training, config.trunks()
    if not training.progressive.cache_activations:
        return
    key = "training.progressive.cache_activations"
    if OBJECTIVES[training.objective].of_sequences:
        raise conflict(
            key, f"true requires windows of text, which are all full, but {training.objective} takes rows with padding"
        )
    if training.diffusion.block_length not in (None, training.seq_len):
        raise conflict(
            key,
            "true cannot be combined with diffusion.block_length, because each pass also reads the tokens without "
            "noise; set cache_activations: false",
        )
    if len(training.objectives) > 1:
        raise conflict(
            key, f"true requires one objective in all phases; the phases train {', '.join(training.objectives)}"
        )
    append = training.strategy == "progressive" and training.progressive.building_mode == "append"
    if training.strategy == "phases":
        append = bool(trunks) and all(entry.at == "right" for entry in training.phases)
    if set(trunks.values()) - {"frozen"} or not append:
        raise conflict(
            key,
            "true requires a frozen trunk with Stacks appended to it, because otherwise the cached hidden states would "
            "change; set trunk_strategy: frozen and building_mode: append",
        )


_RULES = (_direction, _labels, _update, _noise, _depth, _masking, _text, _growth, _storage, _trunk, _cache)
