"""The functions that make Stacks and Racks from configs and specs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stackwise.config.attention import AttentionMode, AttentionPreset
from stackwise.config.base import StackWiseConfig
from stackwise.model.block import Block, Blocks
from stackwise.model.initialisation import init_weights
from stackwise.model.lexical import LexicalKernelManager, resolve_family
from stackwise.model.rack import Rack
from stackwise.model.spec import BlockSpec, RackSpec
from stackwise.model.stack import Stack, Stacks

__all__ = [
    "Block",
    "BlockSpec",
    "Blocks",
    "Rack",
    "RackSpec",
    "Stack",
    "Stacks",
    "create_block_spec",
    "create_rack_from_config",
    "create_rack_from_spec",
    "create_rack_from_specs",
    "create_simple_rack",
    "create_stack_from_config",
    "create_stack_from_spec",
    "rack_spec_from_config",
]


def create_block_spec(
    d_model: int,
    d_ff: int,
    n_heads: int,
    n_kv_heads: int | None = None,
    attention_mode: AttentionMode | None = None,
    dropout: float = 0.0,
    freeze_up_proj: bool = False,
    use_rope: bool = True,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-5,
    *,
    attention_preset: AttentionPreset | None = None,
    attention_custom: Mapping[str, Any] | None = None,
    **variant: Any,
) -> dict[str, Any]:
    """A Block in plain numbers, for ``create_stack_from_spec`` and ``create_rack_from_specs``.

    Args:
        attention_mode: ``causal`` or ``bidirectional``; default: the preset's, and ``causal`` where it leaves it open.
        attention_preset, attention_custom: as in the section ``model`` of a config.
        variant: the other fields of ``BlockSpec`` and of its attention (norm, ffn, bias, window, latents, kernels),
            which win over the preset's.

    Raises:
        ConfigError: settings that do not go together.
    """
    numbers: dict[str, Any] = {
        "d_model": d_model, "d_ff": d_ff, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "dropout": dropout,
        "freeze_up_proj": freeze_up_proj, "use_rope": use_rope, "rope_theta": rope_theta, "norm_eps": norm_eps,
    }  # fmt: skip
    if attention_preset is None and attention_custom is None:
        numbers["n_kv_heads"] = n_heads if n_kv_heads is None else n_kv_heads
    else:
        attention = {"attention_preset": attention_preset, "attention_custom": dict(attention_custom or {})}
        # The objective custom allows either direction, and is causal where the preset leaves it open.
        training = {"progressive": {"training_objective": "custom"}}
        config = StackWiseConfig.from_dict({"model": {**numbers, **attention}, "training": training})
        numbers = BlockSpec(**config.block_fields()).to_dict()
    if attention_mode is not None:
        numbers["attention_mode"] = attention_mode
    return BlockSpec.from_dict({**numbers, **variant}).to_dict()


def _create_stack(stack_id: int, specs: Sequence[BlockSpec], rack_blocks: int, seed: int) -> Stack:
    stack = Stack(stack_id, [Block(spec) for spec in specs])
    init_weights(stack, n_blocks=rack_blocks, seed=seed, stream=stack_id + 1)
    return stack


def create_stack_from_spec(
    stack_id: int,
    n_blocks: int,
    block_spec: Mapping[str, Any] | BlockSpec,
    *,
    rack_blocks: int | None = None,
    seed: int = 0,
) -> Stack:
    """``n_blocks`` equal Blocks, initialised for a Rack of ``rack_blocks`` Blocks (default: this Stack alone)."""
    spec = block_spec if isinstance(block_spec, BlockSpec) else BlockSpec.from_dict(block_spec)
    return _create_stack(stack_id, [spec] * n_blocks, rack_blocks or n_blocks, seed)


def stack_spec_from_config(stack_id: int, config: StackWiseConfig) -> tuple[BlockSpec, ...]:
    """The Blocks of Stack ``stack_id``."""
    n_blocks = config.model.architecture.blocks_of(stack_id)
    return tuple(BlockSpec(**config.block_fields(stack_id, i)) for i in range(n_blocks))


def rack_spec_from_config(config: StackWiseConfig, stack_ids: Sequence[int], vocab_size: int) -> RackSpec:
    """The Rack that ``config`` describes with the Stacks ``stack_ids``, left to right."""
    stacks = tuple(stack_spec_from_config(k, config) for k in stack_ids)
    return RackSpec(**config.rack_fields(vocab_size)).with_stacks(stacks, tuple(stack_ids))


def create_stack_from_config(stack_id: int, config: StackWiseConfig | Mapping[str, Any]) -> Stack:
    """Stack ``stack_id`` of the Rack that ``config`` describes, at its random initialisation."""
    config = _as_config(config)
    rack_blocks = config.model.architecture.blocks_before(config.target_stacks)
    return _create_stack(stack_id, stack_spec_from_config(stack_id, config), rack_blocks, config.training.seed)


def create_rack_from_spec(spec: RackSpec, *, rack_blocks: int | None = None, seed: int = 0) -> Rack:
    """The Rack that ``spec`` describes, initialised for ``rack_blocks`` Blocks (default: those it has)."""
    total = rack_blocks or max(1, len(spec.blocks))
    rack = Rack(replace(spec, stacks=(), stack_ids=()))
    for name, part in rack.parts().items():
        init_weights(part, n_blocks=total, seed=seed, stream=0)
        assert not name.startswith("stack.")
    rack.stacks.extend(_create_stack(k, blocks, total, seed) for k, blocks in zip(spec.stack_ids, spec.stacks))
    return rack


def create_rack_from_specs(
    vocab_size: int,
    d_model: int,
    stack_specs: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    **settings: Any,
) -> Rack:
    """A Rack of unequal Stacks: each spec is ``{"stack_id", "n_blocks", "block_spec"}``.

    ``settings`` are the other fields of ``RackSpec``: tie_embeddings, dropout, norm …
    """
    stacks = tuple((BlockSpec.from_dict(s["block_spec"]),) * s["n_blocks"] for s in stack_specs)
    stack_ids = tuple(s["stack_id"] for s in stack_specs)
    return create_rack_from_spec(RackSpec(vocab_size, d_model, stacks, stack_ids, **settings), seed=seed)


def create_simple_rack(
    n_stacks: int,
    blocks_per_stack: int,
    d_model: int,
    d_ff: int,
    n_heads: int,
    vocab_size: int,
    *,
    n_kv_heads: int | None = None,
    attention_mode: AttentionMode = "causal",
    tie_embeddings: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
) -> Rack:
    """A Rack of equal Stacks."""
    spec = create_block_spec(d_model, d_ff, n_heads, n_kv_heads, attention_mode, dropout)
    stacks = [{"stack_id": i, "n_blocks": blocks_per_stack, "block_spec": spec} for i in range(n_stacks)]
    return create_rack_from_specs(
        vocab_size, d_model, stacks, tie_embeddings=tie_embeddings, dropout=dropout, seed=seed
    )


def create_rack_from_config(
    config: StackWiseConfig | Mapping[str, Any],
    n_stacks: int | None = None,
    vocab_size: int | None = None,
    *,
    load_family: bool = True,
) -> Rack:
    """The Rack that ``config`` (or its ``to_dict()``) describes.

    Args:
        n_stacks: Stacks to build; default: all of ``model.architecture.n_stacks``.
        vocab_size: default: ``model.vocab_size``, which must be set then, unless a family has one.
        load_family: take the table of ``model.tokenizer_embedding.family``, if the config names one; ``False``: only
            its shape, for a Rack whose values come from elsewhere.
    """
    config = _as_config(config)
    lexical = config.model.tokenizer_embedding
    if lexical.family is not None and lexical.embedding_dim is None:
        config = resolve_family(config)
    vocab_size = vocab_size if vocab_size is not None else config.model.vocab_size
    if vocab_size is None:
        raise ValueError("model.vocab_size is null and no tokenizer says it; set it, or pass vocab_size")
    stack_ids = range(config.model.architecture.n_stacks if n_stacks is None else n_stacks)
    rack = create_rack_from_spec(
        rack_spec_from_config(config, stack_ids, vocab_size),
        rack_blocks=config.model.architecture.blocks_before(config.target_stacks),
        seed=config.training.seed,
    )
    if load_family and lexical.family is not None and config.model.initial is None:
        LexicalKernelManager.from_config(config).load_into(rack)
    return rack


def _as_config(config: StackWiseConfig | Mapping[str, Any]) -> StackWiseConfig:
    return config if isinstance(config, StackWiseConfig) else StackWiseConfig.from_dict(dict(config))
