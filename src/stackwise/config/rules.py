"""The rules between sections: combinations that cannot be meant, each refused at the key to change."""

from __future__ import annotations

from itertools import pairwise

from stackwise.config.data import TokenizerConfig
from stackwise.config.growth import TRAINABLE_PRECISIONS
from stackwise.config.objectives import ClassificationConfig, DiffusionConfig
from stackwise.config.run import Settings
from stackwise.config.section import conflict


def _key_of(settings: dict[str, str], wanted: str) -> str:
    """The first key that has the value ``wanted``."""
    return next(key for key, value in settings.items() if value == wanted)


def check(config: Settings) -> None:
    """Raises ``conflict`` for the first rule that ``config`` breaks."""
    progressive, training = config.training.progressive, config.training
    for objective in training.objectives:
        mode = config.mode_of(objective)
        if objective == "clm" and mode == "bidirectional":
            raise conflict(
                "model.attention_preset",
                f"{config.model.attention_preset!r} is bidirectional and would see the tokens that clm predicts; "
                "set gpt_style, or training.progressive.training_objective: mlm or diffusion",
            )
        if objective in ("mlm", "diffusion") and mode == "causal":
            raise conflict(
                "model.attention_preset",
                f"{config.model.attention_preset!r} is causal and {objective} reads both sides; set bert_style, "
                "or training.progressive.training_objective: clm",
            )
    _check_diffusion(config)
    _check_masking(config)
    if training.objective != "classification" and training.classification != ClassificationConfig():
        raise conflict(
            "training.classification",
            f"is read by classification (training_objective is {training.objective})",
        )
    if training.objective == "classification" and progressive.cache_activations:
        raise conflict(
            "training.progressive.cache_activations",
            "true needs batches of a token store; classification takes them from a data loader",
        )
    tokenizer, family = config.data.tokenizer, config.model.tokenizer_embedding.family
    if family is not None and tokenizer.kind != "pretrained" and tokenizer != TokenizerConfig():
        raise conflict(
            "data.tokenizer.kind",
            f"{tokenizer.kind!r} does not fit the table of model.tokenizer_embedding.family, which comes with its "
            "own tokenizer; leave data.tokenizer out",
        )
    positions = config.model.learned_positions
    if positions is not None and training.seq_len > positions:
        raise conflict(
            "training.seq_len",
            f"{training.seq_len} is longer than the table of learned positions (model.learned_positions: {positions})",
        )
    blocks = config.model.architecture.blocks_per_stack
    if isinstance(blocks, tuple) and len(blocks) < config.target_stacks:
        raise conflict(
            "model.architecture.blocks_per_stack",
            f"has {len(blocks)} entries for {config.target_stacks} Stacks; give one a Stack",
        )
    _check_growth(config)
    if progressive.building_mode == "interleave" and config.model.initial is None:
        raise conflict(
            "training.progressive.building_mode",
            "'interleave' goes between the Stacks of a Rack that is there (model.initial, or train --from); "
            "allowed without one: append, prepend",
        )
    if progressive.optimizer_state == "copy" and progressive.new_stack_init != "copy":
        raise conflict(
            "training.progressive.optimizer_state",
            f"'copy' needs new_stack_init: copy (it is {progressive.new_stack_init})",
        )
    fractions = progressive.phase_fractions
    if training.strategy == "progressive" and fractions is not None:
        if len(fractions) != config.target_stacks:
            raise conflict(
                "training.progressive.phase_fractions",
                f"has {len(fractions)} entries for {config.target_stacks} Stacks; give one a Stack",
            )
        if abs(sum(fractions) + progressive.joint_fraction - 1.0) > 1e-6:
            raise conflict(
                "training.progressive.phase_fractions",
                f"and joint_fraction add up to {sum(fractions) + progressive.joint_fraction:g}, not 1",
            )


def _check_diffusion(config: Settings) -> None:
    """Noise levels, blocks and depth as time."""
    training, diffusion, progressive = config.training, config.training.diffusion, config.training.progressive
    time = progressive.time_interpretation
    if "diffusion" not in training.objectives:
        if training.evaluation.draws != 1:
            raise conflict(
                "training.evaluation.draws",
                f"{training.evaluation.draws} is read by diffusion (training_objective is {training.objective})",
            )
        for key, value in (("training.progressive.time_interpretation", time), ("training.diffusion", diffusion)):
            if value not in (None, DiffusionConfig()):
                shown = repr(value) if isinstance(value, str) else "has settings that differ from the default; it"
                raise conflict(key, f"{shown} is read by diffusion (training_objective is {training.objective})")
        return
    readers = {
        "depth_variant": "depth", "levels": "depth", "difficulty": "depth", "expert": "depth",
        "condition": "input", "time_embedding": "input", "time_dim": "input",
    }  # fmt: skip
    for key, reader in readers.items():
        if getattr(diffusion, key) != DiffusionConfig.model_fields[key].default and time != reader:
            raise conflict(
                f"training.diffusion.{key}",
                f"{getattr(diffusion, key)!r} is read when training.progressive.time_interpretation is {reader} "
                f"(it is {'null' if time is None else time})",
            )
    if time == "depth" and diffusion.depth_variant == "prefix" and diffusion.weighting != "stratified":
        raise conflict(
            "training.diffusion.weighting",
            f"{diffusion.weighting!r} is not read by depth_variant prefix, whose Stacks have one rate each",
        )
    if time == "depth" and diffusion.depth_variant == "prefix" and diffusion.weight_power != 1.0:
        raise conflict(
            "training.diffusion.weight_power",
            f"{diffusion.weight_power:g} is not read by depth_variant prefix, whose Stacks have one rate each",
        )
    if diffusion.weighting != "stratified" and diffusion.min_rate != DiffusionConfig().min_rate:
        raise conflict(
            "training.diffusion.min_rate",
            f"{diffusion.min_rate:g} is read when weighting is stratified (it is {diffusion.weighting})",
        )
    levels = diffusion.levels
    if isinstance(levels, tuple) and (
        len(levels) != config.target_stacks + 1
        or (levels[0], levels[-1]) != (1.0, 0.0)
        or any(a <= b for a, b in pairwise(levels))
    ):
        raise conflict(
            "training.diffusion.levels",
            f"{list(levels)} must fall from 1 to 0 in {config.target_stacks} steps, one for each Stack; where they "
            "stop above 0, the sum would not bound the likelihood",
        )
    if time is not None and len(training.objectives) > 1:
        other = next(name for name in training.objectives if name != "diffusion")
        raise conflict(
            "training.progressive.time_interpretation",
            f"{time!r} goes with diffusion in every phase; some train {other}",
        )
    block = diffusion.block_length
    if block is not None:
        if training.seq_len % block:
            raise conflict("training.diffusion.block_length", f"{block} does not divide seq_len ({training.seq_len})")
        if time is not None:
            raise conflict("training.diffusion.block_length", f"{block} goes with time_interpretation: null")
        if config.model.window is not None or config.model.attention_custom.kernel_meaning == "weight":
            raise conflict("training.diffusion.block_length", f"{block} goes with attention over all tokens")
    if time == "depth":
        _check_depth(config)


def _check_masking(config: Settings) -> None:
    """Masking rates of the Stacks."""
    rates, training = config.training.masking.stack_rates, config.training
    if rates is None:
        return
    key, progressive = "training.masking.stack_rates", training.progressive
    if training.objective != "mlm" or training.strategy != "progressive":
        raise conflict(
            key,
            f"{list(rates)} is read by mlm with strategy progressive (training_objective is {training.objective}, "
            f"strategy {training.strategy})",
        )
    if len(rates) != config.target_stacks:
        raise conflict(key, f"has {len(rates)} entries for {config.target_stacks} Stacks; give one a Stack")
    if progressive.cache_activations or progressive.building_mode == "interleave":
        what = "cache_activations" if progressive.cache_activations else "building_mode: interleave"
        raise conflict(key, f"{list(rates)} cannot go with {what}: each phase has masks of its own")


def _check_depth(config: Settings) -> None:
    """Which curricula train Stacks that share the noise levels."""
    progressive, variant = config.training.progressive, config.training.diffusion.depth_variant
    if config.training.strategy == "phases" or config.training.end_to_end_scope != "rackwise":
        raise conflict(
            "training.progressive.time_interpretation",
            "'depth' goes with strategy progressive or end_to_end (rackwise)",
        )
    expert = config.training.diffusion.expert
    if expert is not None:
        frozen = config.training.strategy == "progressive" and progressive.trunk_strategy == "frozen"
        if variant != "experts" or not frozen or expert >= config.target_stacks or progressive.joint_fraction:
            raise conflict(
                "training.diffusion.expert",
                f"{expert} needs depth_variant experts, strategy progressive, trunk_strategy frozen, no "
                f"joint_fraction, and one of the {config.target_stacks} Stacks, counted from 0",
            )
    if (config.model.initial is not None) != (expert is not None and expert > 0):
        what = "starts without model.initial" if expert in (None, 0) else "starts from a run of expert 0 (--from)"
        key = "training.progressive.time_interpretation" if expert is None else "training.diffusion.expert"
        raise conflict(key, f"{'depth' if expert is None else expert!r} {what}")
    if progressive.cache_activations:
        raise conflict(
            "training.progressive.cache_activations",
            "true cannot go with time_interpretation: depth, whose Stacks read tokens",
        )
    if config.training.strategy != "progressive":
        return
    wanted = "prepend" if variant == "suffix" else "append"
    if progressive.building_mode != wanted:
        raise conflict(
            "training.progressive.building_mode",
            f"{progressive.building_mode!r}, but depth_variant {variant} grows by {wanted}",
        )
    if progressive.trunk_strategy == "qlora":
        raise conflict(
            "training.progressive.trunk_strategy",
            "'qlora' does not go with time_interpretation: depth; allowed: frozen, trainable",
        )


def _check_growth(config: Settings) -> None:
    """What becomes of the trunk: strategies, storage, adapters, cache."""
    training, progressive, qlora = config.training, config.training.progressive, config.training.qlora
    if (training.strategy == "phases") != bool(training.phases):
        if training.phases:
            raise conflict("training.phases", f"is read when strategy is phases (it is {training.strategy})")
        raise conflict("training.phases", "must list the phases when strategy is phases")
    if training.end_to_end_scope != "rackwise" and training.strategy != "end_to_end":
        raise conflict(
            "training.end_to_end_scope",
            f"{training.end_to_end_scope!r} is read when strategy is end_to_end (it is {training.strategy})",
        )
    trunks = config.trunks()
    for i, entry in enumerate(training.phases):
        strategy = entry.trunk or progressive.trunk_strategy
        if strategy == "trainable" and entry.precision not in (None, "full"):
            raise conflict(
                f"training.phases[{i}].precision",
                f"{entry.precision!r} is of a frozen trunk, but the trunk is trainable; "
                "set trunk: frozen or qlora, or precision: full",
            )
    strategies = set(trunks.values())
    if "qlora" in strategies and not (qlora.enabled or qlora.progressive_enabled):
        raise conflict(
            _key_of(trunks, "qlora"),
            "'qlora' trains adapters, and there are none; set training.qlora.enabled or "
            "training.qlora.progressive_enabled to true",
        )
    if strategies == {"trainable"} and progressive.trunk_precision != "full":
        raise conflict(
            "training.progressive.trunk_precision",
            f"{progressive.trunk_precision!r} is of a frozen trunk, but trunk_strategy is trainable; "
            "set trunk_strategy: frozen or qlora, or trunk_precision: full",
        )
    if progressive.new_stack_precision not in TRAINABLE_PRECISIONS and not qlora.enabled:
        raise conflict(
            "training.progressive.new_stack_precision",
            f"{progressive.new_stack_precision!r} cannot train; allowed: {', '.join(TRAINABLE_PRECISIONS)}, or "
            "set training.qlora.enabled: true, whose adapters train",
        )
    still = strategies - {"trainable"}
    if still and config.model.tie_embeddings and config.model.initial is None:
        kind = min(still)
        raise conflict(
            "model.tie_embeddings",
            f"true cannot go with {_key_of(trunks, kind)}: {kind}, since "
            "training the head would change what the trunk reads; set it to false, or the trunk to trainable",
        )
    if progressive.cache_activations:
        if len(training.objectives) > 1:
            raise conflict(
                "training.progressive.cache_activations",
                f"true keeps the inputs of one objective; the phases have {', '.join(training.objectives)}",
            )
        append = training.strategy == "progressive" and progressive.building_mode == "append"
        if training.strategy == "phases":
            append = bool(trunks) and all(entry.at == "right" for entry in training.phases)
        if strategies - {"frozen"} or not append:
            raise conflict(
                "training.progressive.cache_activations",
                "true needs Stacks appended to a frozen trunk: what is cached would change with a trunk that "
                "trains, or with Stacks that join before it; set trunk_strategy: frozen and building_mode: append",
            )
    if training.offload != "none" and not config.freezes_stacks:
        grows = training.strategy == "progressive" and trunks
        why = "but trunk_strategy is trainable" if grows else "and no phase freezes any"
        raise conflict("training.offload", f"{training.offload!r} is of frozen Stacks, {why}")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(qlora, key)
        if not isinstance(pattern, str) and len(pattern) < config.target_stacks:
            raise conflict(
                f"training.qlora.{key}",
                f"has {len(pattern)} entries for {config.target_stacks} Stacks; give one a Stack",
            )
