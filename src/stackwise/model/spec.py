"""What shapes a model, in plain numbers: frozen, comparable, and JSON both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self

from stackwise.config.attention import AttentionSpec

NormKind = Literal["rmsnorm", "layernorm"]
FeedForwardKind = Literal["swiglu", "geglu", "gelu", "gelu_tanh"]
TimeEmbeddingKind = Literal["sinusoidal", "learned"]


@dataclass(frozen=True)
class BlockSpec:
    """Everything that shapes one Block. Width, dropout, biases and the norms' epsilon are those of its attention.

    Attributes:
        attention: the attention layer.
        d_ff: width of the feed-forward.
        freeze_up_proj: the feed-forward's up-projections never train.
        norm, norm_bias: both norms of the Block; RMSNorm has no bias.
        attention_norm: ``False``: attention reads the residual stream as it is (the first layer of ModernBERT, whose
            embedding is normalised already).
        ffn: swiglu and geglu are gated; gelu (exact) and gelu_tanh (GPT-2's approximation) are two matrices.
        time_dim: width of the condition that scales and shifts what the norms return; ``None``: no condition.
    """

    attention: AttentionSpec
    d_ff: int
    freeze_up_proj: bool = False
    norm: NormKind = "rmsnorm"
    norm_bias: bool = False
    attention_norm: bool = True
    ffn: FeedForwardKind = "swiglu"
    time_dim: int | None = None

    @property
    def d_model(self) -> int:
        return self.attention.d_model

    def to_dict(self) -> dict[str, Any]:
        """All fields side by side, those of attention too; ``from_dict`` reads them back exactly."""
        data = asdict(self)
        attention = data.pop("attention")
        if attention["attention_type"] is None:  # as in folders that were written before there were others
            del attention["attention_type"]
        return {**attention, **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """TypeError for a name that neither a Block nor attention has."""
        own = {name: data[name] for name in _OWN if name in data}
        return cls(AttentionSpec(**{name: value for name, value in data.items() if name not in _OWN}), **own)


_OWN = frozenset(field.name for field in fields(BlockSpec)) - {"attention"}


@dataclass(frozen=True)
class RackSpec:
    """Everything that shapes a Rack.

    Attributes:
        vocab_size: V; d_model: C.
        stacks: the Blocks of each Stack, left to right; ``stack_ids`` names them in the same order.
        tie_embeddings: the head uses the embedding's table.
        dropout: after the embedding.
        norm, norm_eps, norm_bias: of the final norm, the embedding's and the head's.
        bias: of the head's ``dense``.
        freeze_embeddings: the token table never trains.
        learned_positions: rows of a learned table of positions (the longest sequence); ``None``: none.
        embedding_norm: a norm after the embedding.
        mlm_head: norm(gelu(dense(x))) before the head, and a bias on its logits (BERT, 1810.04805).
        embedding_dim: width of the token table; ``None``: C. An adapter makes it C where it is not.
        adapter_hidden_dim: hidden width of that adapter; ``None``: C, and no adapter where none is needed.
        time_embedding: how the noise level becomes a condition of width ``time_dim``; ``None``: it is no input.
    """

    vocab_size: int
    d_model: int
    stacks: tuple[tuple[BlockSpec, ...], ...] = ()
    stack_ids: tuple[int, ...] = ()
    tie_embeddings: bool = False
    dropout: float = 0.0
    norm: NormKind = "rmsnorm"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    bias: bool = False
    freeze_embeddings: bool = False
    learned_positions: int | None = None
    embedding_norm: bool = False
    mlm_head: bool = False
    embedding_dim: int | None = None
    adapter_hidden_dim: int | None = None
    time_embedding: TimeEmbeddingKind | None = None
    time_dim: int | None = None

    def __post_init__(self) -> None:
        if len(self.stacks) != len(self.stack_ids) or len(set(self.stack_ids)) != len(self.stack_ids):
            raise ValueError(f"{len(self.stacks)} Stacks need as many different ids, not {list(self.stack_ids)}")
        widths = {block.d_model for stack in self.stacks for block in stack} - {self.d_model}
        if widths:
            raise ValueError(f"every Block must have d_model {self.d_model}, the Rack's; found {sorted(widths)}")
        wanted = self.time_dim if self.time_embedding is not None else None
        if any(block.time_dim != wanted for block in self.blocks):
            raise ValueError(f"every Block must have time_dim {wanted}, the Rack's")

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """All Blocks, left to right."""
        return tuple(block for stack in self.stacks for block in stack)

    def with_stacks(self, stacks: tuple[tuple[BlockSpec, ...], ...], stack_ids: tuple[int, ...]) -> Self:
        return replace(self, stacks=stacks, stack_ids=stack_ids)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers; ``from_dict`` reads them back exactly."""
        data = asdict(self)
        data["stacks"] = [[block.to_dict() for block in stack] for stack in self.stacks]
        data["stack_ids"] = list(self.stack_ids)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        stacks = tuple(tuple(BlockSpec.from_dict(block) for block in stack) for stack in data["stacks"])
        return cls(**{**data, "stacks": stacks, "stack_ids": tuple(data["stack_ids"])})
