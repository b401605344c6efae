"""What several old settings say together: the rules of ``migration``, beside its table of single keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stackwise.config.legacy import blocks_in_stacks
from stackwise.config.messages import show
from stackwise.config.migration import TABLE, Migrated, Rule, Work, migrate_text
from stackwise.errors import ConfigError


def migrate_config(text: str, where: str) -> Migrated:
    """The config ``text`` in today's keys. ``Refused``, or another ``ConfigError``, names the file as ``where``."""
    return migrate_text(text, where, _BEFORE, _AFTER)


def _whole(work: Work, key: str) -> int | None:
    """The value of ``key`` where it is a whole number of at least 1, else a problem; None where it is not set."""
    value = work.left.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        work.problems.append(f"{key}: {show(value)} is not allowed; must be a whole number, at least 1")
        del work.left[key]
        return None
    return value


def _sizes(work: Work) -> None:
    """``n_blocks`` and ``n_layers`` counted the Blocks of the Rack; ``block_size`` those of a Stack."""
    for name in ("n_stacks", "blocks_per_stack"):
        if f"training.architecture.{name}" in work.left:
            work.move(f"training.architecture.{name}", f"model.architecture.{name}")
    stacks, blocks = "model.architecture.n_stacks", "model.architecture.blocks_per_stack"
    size, count = _whole(work, "training.block_size"), _whole(work, "training.total_blocks")
    for key in ("model.n_blocks", "model.architecture.n_blocks", "model.n_layers", "model.architecture.n_layers"):
        if key not in work.left:
            continue
        total = work.left[key]
        divides = isinstance(total, int) and size is not None and total % size == 0
        n_stacks = work.get(stacks, total // size if divides and work.get(blocks) is None else 1)
        try:
            per_stack = blocks_in_stacks(key, total, n_stacks, work.get(blocks))
        except ConfigError as error:
            work.problems.append(str(error))
            del work.left[key]
            continue
        if work.get(blocks) is None:
            work.move(key, blocks, per_stack)
            if work.get(stacks) is None:
                work.new[stacks] = n_stacks
        else:
            work.drop(key, f"{stacks} and {blocks} say it")
    if size is None:
        return
    if work.get(blocks) is None and work.get(stacks) is None and count is not None:
        work.move("training.block_size", blocks)
        work.move("training.total_blocks", stacks)
    else:
        work.drop("training.block_size", f"{blocks} says it", differs=work.get(blocks) not in (None, size))


def _strategy(work: Work) -> None:
    """``mode``, ``training_architecture`` and ``enabled`` said what ``strategy`` and ``end_to_end_scope`` say today."""
    strategy, scope = "training.strategy", "training.end_to_end_scope"
    allowed = {
        "training.training_architecture": {"blockwise": "blockwise", "stackwise": "stackwise", "rackwise": "rackwise"},
        "training.mode": {"layerwise": "blockwise", "blockwise": "stackwise", "fused": "progressive"},
    }
    for key, values in allowed.items():
        if key not in work.left:
            continue
        value = work.left[key]
        if value not in values:
            work.problems.append(f"{key}: {show(value)} is not allowed; allowed: {', '.join(values)}")
            del work.left[key]
        elif strategy in work.left or strategy in work.new:
            now = work.get(scope) if work.get(strategy) == "end_to_end" else work.get(strategy)
            work.drop(key, f"{strategy} says what trains", differs=now is not None and now != values[value])
        elif values[value] == "progressive":
            work.move(key, strategy, "progressive")
        else:
            work.move(key, scope, values[value])
            work.new[strategy] = "end_to_end"
    if "training.fusion_mode" in work.left:
        value = work.left["training.fusion_mode"]
        if value not in ("frozen", "trainable"):
            work.problems.append(f"training.fusion_mode: {show(value)} is not allowed; allowed: frozen, trainable")
            del work.left["training.fusion_mode"]
        elif work.get(strategy) == "progressive" and "training.progressive.trunk_strategy" not in work.left:
            work.move("training.fusion_mode", "training.progressive.trunk_strategy")
        else:
            work.drop("training.fusion_mode", "training.progressive.trunk_strategy says what the trunk does")
    enabled = "training.progressive.enabled"
    if enabled in work.left:
        off = work.left[enabled] is False
        if off and work.get(strategy) == "progressive":
            work.problems.append(f"{enabled}: false contradicts {strategy}: progressive; keep one")
            del work.left[enabled]
        elif off and work.get(strategy) is None:
            work.move(enabled, strategy, "end_to_end")
        else:
            work.drop(enabled, f"{strategy} says whether Stacks are grown")
    if work.get(strategy, "progressive") != "end_to_end" and scope in work.left:
        work.drop(scope, f"it is only used with {strategy}: end_to_end")


_DETAILS = ("attention_type", "attention_mode", "mla_rq", "mla_rkv", "kernel_type", "kernel_dim")


def _attention(work: Work) -> None:
    """Attention at the top of ``model``; and settings of a preset that ignores them."""
    top = {name: f"model.{name}" for name in _DETAILS if f"model.{name}" in work.left}
    custom = {name: f"model.attention_custom.{name}" for name in _DETAILS}
    preset = work.left.get("model.attention_preset")
    if preset not in (None, "custom"):
        for key in [*top.values(), *(key for key in custom.values() if key in work.left)]:
            work.drop(key, "it was only used with model.attention_preset: custom")
        return
    if top and preset is None and not any(key in work.left for key in custom.values()):
        kind, kernel = work.get("model.attention_type", "mha"), work.get("model.kernel_type", "linear")
        mode = work.get("model.attention_mode")
        if kind in ("mha", "gqa", "standard") and kernel in ("linear", "dot_product") and mode is not None:
            styles = {"causal": "gpt_style", "bidirectional": "bert_style"}
            if mode not in styles:
                work.problems.append(f"model.attention_mode: {show(mode)} is not allowed; allowed: {', '.join(styles)}")
                return
            work.move("model.attention_mode", "model.attention_preset", styles[mode])
            for key in (key for name, key in top.items() if name != "attention_mode"):
                work.drop(key, f"model.attention_preset: {styles[mode]} says it, or does not use it")
            return
        work.new["model.attention_preset"] = "custom"
    for name, key in top.items():
        work.move(key, custom[name])
    for key in custom.values():
        if key in work.left:
            work.move(key, key)
    _details(work, custom)


def _details(work: Work, custom: Mapping[str, str]) -> None:
    """Old spellings of ``attention_custom``, and what its type and kernel do not use."""
    new, kinds = work.new, {"gqa": "mha", "standard": "mha", "kernel": "mha"}
    for key, spellings in ((custom["attention_type"], kinds), (custom["kernel_type"], {"dot_product": "linear"})):
        if isinstance(new.get(key), str) and new[key] in spellings:
            was = new[key]
            new[key] = spellings[was]
            work.result.moved.append(f"{'.'.join(work.origins[key])}: {was} → {key}: {new[key]}")
    unused = [] if new.get(custom["attention_type"]) == "mla" else ["mla_rq", "mla_rkv"]
    unused += [] if new.get(custom["kernel_type"], "linear") != "linear" else ["kernel_dim"]
    for name in unused:
        if custom[name] in new:
            origin = ".".join(work.origins.pop(custom[name]))
            del new[custom[name]]
            work.drop_key(origin, "the type of attention and its kernel do not use it")


def _embedding(work: Work) -> None:
    """A family's table of tokens has its own number of them."""
    section = "model.tokenizer_embedding"
    family, tokens = work.left.get(f"{section}.family"), work.left.get("model.vocab_size")
    names = [key for key in work.left if key.startswith(f"{section}.")]
    if family is None:
        for key in names:
            if not key.endswith("freeze_embeddings"):
                work.drop(key, f"it is only used with {section}.family")
    elif tokens is not None:
        for key in names:
            why = (
                f"model.vocab_size ({show(tokens)}) gives a table of its own; without it, {section} gives the family's"
            )
            work.drop(key, why, differs=key.endswith("family"))


def _masks(work: Work) -> None:
    """Rates of masking and of time steps, which only objectives that mask have."""
    objective = work.left.get("training.progressive.training_objective", "mlm")
    sections = ("training", "training.progressive", "model")
    names = ("mask_fraction_min", "mask_fraction_max", "min_mask_fraction", "max_mask_fraction")
    if objective != "mlm":
        for key in (f"{section}.{name}" for section in sections for name in names):
            if key in work.left:
                work.drop(key, f"only mlm has rates of masking (the objective is {objective})")
    time = "training.progressive.time_interpretation"
    if objective != "diffusion":
        for name in ("time_interpretation", "time_embedding_dim", "time_encoding_type", "stack_time_mapping"):
            key = f"training.progressive.{name}"
            if key in work.left:
                work.drop(key, f"only diffusion has noise levels (the objective is {objective})")
    wanted = work.left.get("training.time_step_masking", work.left.get("training.progressive.time_step_masking"))
    for section in sections[:2]:
        for name in ("time_step_masking", "num_time_steps", "time_step_mask_fractions"):
            key = f"{section}.{name}"
            if key in work.left and (objective not in ("mlm", "diffusion") or wanted is False):
                off = "time_step_masking is false" if wanted is False else f"{objective} masks nothing"
                work.drop(key, off)
    told = {"depth": ("stack_time_mapping", "levels"), "input": ("time_encoding_type", "time_embedding")}
    for meaning, (name, to) in told.items():
        key = f"training.progressive.{name}"
        if key in work.left and work.left.get(time) == meaning and work.left[key] != "custom":
            work.move(key, f"training.diffusion.{to}")
        elif key in work.left:
            work.drop(key, f"training.diffusion.{to} says it", differs=work.left[key] == "custom")
    width = "training.progressive.time_embedding_dim"
    if width in work.left:
        if work.left.get(time) == "input":
            work.move(width, "training.diffusion.time_dim")
        else:
            work.drop(width, f"it is only used with {time}: input")


def _adapters(work: Work) -> None:
    """A rank and an alpha for each Stack (``configs``); what a strategy does not use."""
    places = ("training.qlora.configs", "training.progressive.qlora_configs", "training.qlora_configs")
    key = next((key for key in places if key in work.left), None)
    old = {name: key for key, name in _PLACES_OF_ADAPTERS.items() if key in work.left}
    strategy = work.get(old.get("strategy", ""), "simplified")
    if key is not None:
        configs = work.left[key]
        if strategy != "variable":
            work.drop(key, "it is only used with training.qlora.strategy: variable")
        elif not isinstance(configs, dict) or not all(isinstance(one, dict) for one in configs.values()):
            work.problems.append(f"{key}: {show(configs)} must give rank and alpha by the number of a Stack")
            del work.left[key]
        else:
            _per_stack(work, key, configs, old)
    if strategy == "simplified":
        for name in ("rank_pattern", "alpha_pattern"):
            if name in old:
                work.drop(old[name], "it is only used with training.qlora.strategy: progressive")


def _per_stack(work: Work, key: str, configs: Mapping[Any, Mapping[str, Any]], old: Mapping[str, str]) -> None:
    """``configs`` as the lists ``rank_pattern`` and ``alpha_pattern``."""
    n_stacks = work.get("training.progressive.target_stacks", work.get("model.architecture.n_stacks", 2))
    for name in ("rank_pattern", "alpha_pattern"):
        if name in old:
            work.drop(old[name], f"{key} lists the ranks")
    ranks = [configs.get(k, {}).get("rank", work.get(old.get("rank", ""), 16)) for k in range(n_stacks)]
    alphas = [configs.get(k, {}).get("alpha", work.get(old.get("alpha", ""), 32)) for k in range(n_stacks)]
    if any({"dropout", "lr"} & set(one) for one in configs.values()):
        work.result.differs.append(f"{key}: dropout and lr of single Stacks are left out: all Stacks share them")
    work.move(key, "training.qlora.rank_pattern", ranks)
    work.new["training.qlora.alpha_pattern"] = alphas


_PLACES_OF_ADAPTERS = {
    f"{section}{name}": name.removeprefix("qlora_")
    for section in ("training.qlora.", "training.", "training.progressive.")
    for name in ("strategy", "rank", "alpha", "rank_pattern", "alpha_pattern", "qlora_strategy", "qlora_rank",
                 "qlora_alpha", "qlora_rank_pattern", "qlora_alpha_pattern")
    if name.startswith("qlora_") != (section == "training.qlora.")
}  # fmt: skip
"""Where settings of adapters may stand; the last of two, in this order, is the one that the old builder read."""


def _of_two_places(work: Work) -> None:
    """Adapters under ``progressive`` and in ``qlora``: the builder read those under ``progressive``."""
    for key, old in TABLE.items():
        other = old.to
        if key.startswith("training.progressive.") and other.startswith("training.qlora.") and key in work.left:
            if other in work.left and work.left[other] != work.left[key]:
                work.drop(other, f"{key} was the one that was used")
            elif other in work.left:
                work.drop(other, f"{key} says the same")


def _storage(work: Work) -> None:
    """The quantised backbone is the trunk's storage."""
    on, kind = "training.quantization_enabled", "training.quantization_type"
    key, trunk = "training.progressive.trunk_precision", work.get("training.progressive.trunk_strategy", "frozen")
    used = work.left.get(on, True) is True and trunk in ("frozen", "qlora") and work.get("training.strategy") in (
        None, "progressive",
    )  # fmt: skip
    if kind in work.left:
        names = {"fp16": "half", "fp8": "fp8", "nf_fp8": "fp8", "fp32": "full"}
        value = work.left[kind]
        if not used:
            work.drop(kind, "only a frozen trunk is stored in fewer bits")
        elif value in names:
            work.move(kind, key, names[value])
        elif value == "fp4":
            work.drop(kind, f"write {key}: nf4 or nvfp4", differs=True)
        else:
            work.problems.append(f"{kind}: {show(value)} is not allowed; allowed: fp4, {', '.join(names)}")
            del work.left[kind]
    if on in work.left:
        work.drop(on, f"{key} says it")
    joins = "training.progressive.new_stack_precision"
    if work.left.get(joins) == "qlora":
        work.drop(joins, "it is no precision: training.qlora.enabled gives Stacks adapters", differs=True)


def _optimizer(work: Work) -> None:
    """What the optimizer does not use was ignored, and is refused today."""
    section = "training.optimizer."
    kind = str(work.get(f"{section}optimizer_type", "adamw")).lower()
    if f"{section}momentum" in work.left and kind != "sgd":
        work.drop(f"{section}momentum", f"{kind} does not use it")
    for name in ("betas", "eps"):
        for key in (f"{section}{name}", f"training.{name}"):
            if kind == "sgd" and key in work.left:
                work.drop(key, "sgd does not use it")
    if work.left.get(f"{section}use_groups") is False and f"{section}groups" in work.left:
        work.drop(f"{section}groups", "use_groups is false")


def _text(work: Work) -> None:
    """Where the text comes from, and how much of it a sequence has."""
    for key in ("data.dataset_path", "data.tokenizer_path"):
        if key in work.left and work.left[key] is None:
            work.drop(key, "it is null")
    path, dummy = work.left.get("data.dataset_path"), work.left.get("data.use_dummy_data")
    if path is not None and dummy is True:
        work.problems.append(f"data.dataset_path: {show(path)} contradicts data.use_dummy_data: true; keep one")
        del work.left["data.dataset_path"]
    elif path is not None:
        work.move("data.dataset_path", "data.path")
        work.new["data.source"] = "files"
    if "data.tokenizer_path" in work.left:
        work.move("data.tokenizer_path", "data.tokenizer.path")
        work.new["data.tokenizer.kind"] = "pretrained"
    length = "data.max_length"
    if length in work.left:
        there = work.left.get("training.seq_len")
        if there is None:
            work.move(length, "training.seq_len")
        else:
            work.drop(length, f"training.seq_len ({show(there)}) is the length", differs=there != work.left[length])


def _old_choices(work: Work) -> None:
    """Choices that the file leaves to old defaults which are others today."""
    grows = work.new.get("training.strategy", "progressive") == "progressive"
    trunk, objective = "training.progressive.trunk_strategy", "training.progressive.training_objective"
    if grows and trunk not in work.new:
        work.set(trunk, "frozen", "it was the default")
    custom = work.new.get("model.attention_custom.attention_mode")
    causal = work.new.get("model.attention_preset") == "gpt_style" or custom == "causal"
    if objective not in work.new and not causal:
        work.set(objective, "mlm", "it was the default")


def _what_goes_together(work: Work) -> None:
    """Settings that stood side by side without effect, and contradict each other today."""
    new = work.new
    grows = new.get("training.strategy", "progressive") == "progressive"
    trunk = new.get("training.progressive.trunk_strategy", "trainable")
    if grows and trunk in ("frozen", "qlora") and new.get("model.tie_embeddings") is True:
        why = "on a frozen trunk the head has a matrix of its own, because training it would change the embedding"
        work.set("model.tie_embeddings", False, why)
    cache = "training.progressive.cache_activations"
    kept = grows and trunk == "frozen" and new.get("training.progressive.building_mode", "append") == "append"
    if new.get(cache) is True and (not kept or new.get("training.progressive.time_interpretation") == "depth"):
        work.set(cache, False, "hidden states stay the same only while Stacks are appended to a frozen trunk")
    qlora = ("training.qlora.enabled", "training.qlora.progressive_enabled")
    if grows and trunk == "qlora" and not any(new.get(key) for key in qlora):
        work.set(qlora[0], True, "trunk_strategy: qlora trains the adapters of the trunk")


_BEFORE: tuple[Rule, ...] = (
    _sizes, _strategy, _attention, _embedding, _masks, _of_two_places, _adapters, _storage, _optimizer, _text,
)  # fmt: skip
_AFTER: tuple[Rule, ...] = (_old_choices, _what_goes_together)
