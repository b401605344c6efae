"""Block, Stack and Rack, and the functions that make them from configs and specs.

B batch, T tokens, C width (``d_model``), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stackwise.config.base import StackWiseConfig
from stackwise.model.attention.core import AttentionMode, CoreAttention
from stackwise.model.cache import KVCache, LayerCache
from stackwise.model.initialisation import init_weights
from stackwise.model.layers import RMSNorm, SwiGLUFFN, TokenEmbedding
from stackwise.ops.rope import rope_table

RopeTables = Mapping[tuple[int, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class BlockSpec:
    """Everything that shapes one Block, in numbers."""

    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    attention_mode: AttentionMode = "causal"
    dropout: float = 0.0
    freeze_up_proj: bool = False
    use_rope: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


class Block(nn.Module):
    """One pre-norm transformer layer: x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, attention: CoreAttention, ffn: nn.Module, d_model: int, norm_eps: float, dropout: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(d_model, eps=norm_eps)
        self.attention = attention
        self.ffn_norm = RMSNorm(d_model, eps=norm_eps)
        self.ffn = ffn
        self.dropout = dropout

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        rope: RopeTables | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        table = rope[self.attention.rope_key] if rope is not None and self.attention.rope_key else None
        update = self.attention(self.attention_norm(x), attention_mask, rope=table, cache=cache)
        x = x + F.dropout(update, self.dropout, self.training)
        return x + F.dropout(self.ffn(self.ffn_norm(x)), self.dropout, self.training)


class Blocks(nn.ModuleList):
    """A ``ModuleList`` that type checkers know to hold Blocks."""

    def __iter__(self) -> Iterator[Block]:
        return super().__iter__()  # type: ignore[return-value]


class Stack(nn.Module):
    """A run of Blocks: the unit of growth, freezing, checkpointing and caching.

    Args:
        stack_id: its name for life, whatever its position becomes.
        blocks: the Blocks, first to last.
    """

    def __init__(self, stack_id: int, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.stack_id = stack_id
        self.blocks = Blocks(blocks)
        self.activation_checkpointing = False

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        rope: RopeTables | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """(B, T, C) → (B, T, C). With ``activation_checkpointing`` the backward pass finds each Block's input only."""
        for i, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled() and caches is None:
                x = checkpoint(
                    block, x, attention_mask, rope, use_reentrant=False, preserve_rng_state=block.dropout > 0
                )
            else:
                x = block(x, attention_mask, rope, None if caches is None else caches[i])
        return x


class Stacks(nn.ModuleList):
    """A ``ModuleList`` that type checkers know to hold Stacks."""

    def __iter__(self) -> Iterator[Stack]:
        return super().__iter__()  # type: ignore[return-value]


class Rack(nn.Module):
    """The whole model: embedding → Stacks → final norm → head.

    Args:
        vocab_size: V.
        d_model: C.
        stacks: left to right; may be empty.
        tie_embeddings: the head uses the embedding's table.
        dropout: after the embedding.
        norm_eps: of the final norm.
        freeze_embeddings: the embedding's table never trains.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        stacks: Sequence[Stack] = (),
        *,
        tie_embeddings: bool = False,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
        freeze_embeddings: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size, self.d_model = vocab_size, d_model
        self.embedding = TokenEmbedding(vocab_size, d_model, dropout, freeze_embeddings)
        self.stacks = Stacks(stacks)
        self.norm = RMSNorm(d_model, eps=norm_eps)
        self.head = None if tie_embeddings else nn.Linear(d_model, vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, C)."""
        return self.embedding.weight if self.head is None else self.head.weight

    def parts(self) -> dict[str, nn.Module]:
        """What trains, freezes and is saved: ``embedding``, ``stack.<id>`` …, ``norm``, ``head`` (if untied)."""
        named: dict[str, nn.Module] = {"embedding": self.embedding}
        named |= {f"stack.{stack.stack_id}": stack for stack in self.stacks}
        named["norm"] = self.norm
        if self.head is not None:
            named["head"] = self.head
        return named

    def part_parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(part, name within the part, parameter) of every parameter, once each."""
        for part, module in self.parts().items():
            for name, parameter in module.named_parameters():
                yield part, name, parameter

    def blocks(self) -> list[Block]:
        return [block for stack in self.stacks for block in stack.blocks]

    @property
    def has_dropout(self) -> bool:
        """Whether training draws random numbers."""
        return self.embedding.dropout > 0 or any(b.dropout > 0 or b.attention.dropout > 0 for b in self.blocks())

    def checkpoint_activations(self, on: bool) -> None:
        """Keep only each Block's input for the backward pass, and recompute the rest there."""
        for stack in self.stacks:
            stack.activation_checkpointing = on

    def make_cache(self, max_tokens: int) -> KVCache:
        """An empty cache for ``max_tokens`` tokens. Only causal Racks can read one token after another."""
        blocks = self.blocks()
        if any(block.attention.attention_mode != "causal" for block in blocks):
            raise ValueError("a key/value cache needs causal attention in every Block")
        return KVCache(len(blocks), max_tokens)

    def _rope_tables(self, n_tokens: int, start: int, device: torch.device) -> RopeTables:
        keys = {block.attention.rope_key for block in self.blocks() if block.attention.rope_key is not None}
        return {key: rope_table(n_tokens, *key, device, start) for key in keys}

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """(B, T) token ids → (B, T, C): what the head reads.

        Args:
            attention_mask: boolean (B, T), True where a token is real.
            cache: what was read before, from ``make_cache``; ``input_ids`` are then the tokens that follow.
        """
        B, T = input_ids.shape
        rope = self._rope_tables(T, cache.length if cache else 0, input_ids.device)
        if cache is not None:
            attention_mask = cache.extend_mask(attention_mask, B, T, input_ids.device)
        x = self.embedding(input_ids)
        done = 0
        for stack in self.stacks:
            n = len(stack.blocks)
            x = stack(x, attention_mask, rope, None if cache is None else cache.layers[done : done + n])
            done += n
        return self.norm(x)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """(B, T) token ids → logits (B, T, V)."""
        return self.logits(self.hidden(input_ids, attention_mask, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, C), from ``hidden`` → (…, V)."""
        return torch.matmul(hidden, self.head_weight.to(hidden.dtype).T)


def create_block_spec(
    d_model: int,
    d_ff: int,
    n_heads: int,
    n_kv_heads: int | None = None,
    attention_mode: AttentionMode = "causal",
    dropout: float = 0.0,
    freeze_up_proj: bool = False,
    use_rope: bool = True,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-5,
) -> dict[str, Any]:
    """A Block in plain numbers, for ``create_stack_from_spec`` and ``create_rack_from_specs``."""
    return asdict(
        BlockSpec(
            d_model, d_ff, n_heads, n_heads if n_kv_heads is None else n_kv_heads,
            attention_mode, dropout, freeze_up_proj, use_rope, rope_theta, norm_eps,
        )
    )  # fmt: skip


def block_spec_from_config(config: StackWiseConfig) -> BlockSpec:
    """The Block that ``config.model`` describes."""
    model = config.model
    return BlockSpec(
        d_model=model.d_model,
        d_ff=model.ff_width,
        n_heads=model.n_heads,
        n_kv_heads=model.kv_heads,
        attention_mode=config.attention_mode,
        dropout=model.dropout,
        freeze_up_proj=model.freeze_up_proj,
        use_rope=model.use_rope,
        rope_theta=model.rope_theta,
        norm_eps=model.norm_eps,
    )


def _create_block(spec: BlockSpec) -> Block:
    attention = CoreAttention(
        spec.d_model,
        spec.n_heads,
        spec.n_kv_heads,
        dropout=spec.dropout,
        attention_mode=spec.attention_mode,
        use_rope=spec.use_rope,
        rope_theta=spec.rope_theta,
    )
    ffn = SwiGLUFFN(spec.d_model, spec.d_ff, spec.freeze_up_proj)
    return Block(attention, ffn, spec.d_model, spec.norm_eps, spec.dropout)


def create_stack_from_spec(
    stack_id: int,
    n_blocks: int,
    block_spec: Mapping[str, Any] | BlockSpec,
    *,
    rack_blocks: int | None = None,
    seed: int = 0,
) -> Stack:
    """``n_blocks`` equal Blocks, initialised for a Rack of ``rack_blocks`` Blocks (default: this Stack alone)."""
    spec = block_spec if isinstance(block_spec, BlockSpec) else BlockSpec(**block_spec)
    stack = Stack(stack_id, [_create_block(spec) for _ in range(n_blocks)])
    init_weights(stack, n_blocks=rack_blocks or n_blocks, seed=seed, stream=stack_id + 1)
    return stack


def create_stack_from_config(stack_id: int, config: StackWiseConfig | Mapping[str, Any]) -> Stack:
    """Stack ``stack_id`` of the Rack that ``config`` describes, at its random initialisation."""
    config = _as_config(config)
    n_blocks = config.model.architecture.blocks_per_stack
    return create_stack_from_spec(
        stack_id,
        n_blocks,
        block_spec_from_config(config),
        rack_blocks=config.target_stacks * n_blocks,
        seed=config.training.seed,
    )


def create_rack_from_specs(
    vocab_size: int,
    d_model: int,
    stack_specs: Sequence[Mapping[str, Any]],
    *,
    tie_embeddings: bool = False,
    dropout: float = 0.0,
    norm_eps: float = 1e-5,
    freeze_embeddings: bool = False,
    seed: int = 0,
) -> Rack:
    """A Rack of unequal Stacks: each spec is ``{"stack_id", "n_blocks", "block_spec"}``."""
    total = sum(spec["n_blocks"] for spec in stack_specs)
    widths = {BlockSpec(**spec["block_spec"]).d_model for spec in stack_specs}
    if widths - {d_model}:
        raise ValueError(f"every block_spec must have d_model {d_model}, the Rack's; found {sorted(widths)}")
    stacks = [
        create_stack_from_spec(s["stack_id"], s["n_blocks"], s["block_spec"], rack_blocks=total, seed=seed)
        for s in stack_specs
    ]
    rack = Rack(
        vocab_size,
        d_model,
        stacks,
        tie_embeddings=tie_embeddings,
        dropout=dropout,
        norm_eps=norm_eps,
        freeze_embeddings=freeze_embeddings,
    )
    for part in ("embedding", "norm", "head"):
        if part in rack.parts():
            init_weights(rack.parts()[part], n_blocks=total, seed=seed, stream=0)
    return rack


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
    config: StackWiseConfig | Mapping[str, Any], n_stacks: int | None = None, vocab_size: int | None = None
) -> Rack:
    """The Rack that ``config`` (or its ``to_dict()``) describes.

    Args:
        n_stacks: Stacks to build; default: all of ``model.architecture.n_stacks``.
        vocab_size: default: ``model.vocab_size``, which must be set then.
    """
    config = _as_config(config)
    model = config.model
    vocab_size = vocab_size if vocab_size is not None else model.vocab_size
    if vocab_size is None:
        raise ValueError("model.vocab_size is null and no tokenizer says it; set it, or pass vocab_size")
    spec = asdict(block_spec_from_config(config))
    n_blocks = model.architecture.blocks_per_stack
    rack = create_rack_from_specs(
        vocab_size,
        model.d_model,
        [],
        tie_embeddings=model.tie_embeddings,
        dropout=model.dropout,
        norm_eps=model.norm_eps,
        freeze_embeddings=model.tokenizer_embedding.freeze_embeddings,
        seed=config.training.seed,
    )
    for stack_id in range(model.architecture.n_stacks if n_stacks is None else n_stacks):
        rack.stacks.append(
            create_stack_from_spec(
                stack_id, n_blocks, spec, rack_blocks=config.target_stacks * n_blocks, seed=config.training.seed
            )
        )
    return rack


def _as_config(config: StackWiseConfig | Mapping[str, Any]) -> StackWiseConfig:
    return config if isinstance(config, StackWiseConfig) else StackWiseConfig.from_dict(dict(config))
