"""Block, Stack and Rack.

B batch, T tokens, C width (``d_model``), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stackwise.model.attention.core import CoreAttention
from stackwise.model.cache import KVCache, LayerCache, positions_of
from stackwise.model.embedding import Head, TokenEmbedding
from stackwise.model.feed_forward import create_feed_forward
from stackwise.model.norms import create_norm
from stackwise.model.spec import AttentionMode, BlockSpec, RackSpec
from stackwise.ops.rope import rope_rows, rope_table

RopeTables = Mapping[tuple[int, float], tuple[Tensor, Tensor]]


class Block(nn.Module):
    """One pre-norm transformer layer: x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self._spec = spec
        norm = (spec.norm, spec.d_model, spec.norm_eps, spec.norm_bias)
        self.attention_norm = create_norm(*norm) if spec.attention_norm else nn.Identity()
        self.attention = CoreAttention.from_spec(spec)
        self.ffn_norm = create_norm(*norm)
        self.ffn = create_feed_forward(spec.ffn, spec.d_model, spec.d_ff, spec.freeze_up_proj, spec.bias)
        self.dropout = spec.dropout

    @property
    def spec(self) -> BlockSpec:
        """What the Block is, in numbers."""
        return replace(self._spec, attention_mode=self.attention.attention_mode)

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
        spec: its shape; values are torch's until ``init_weights`` or a checkpoint sets them.
    """

    def __init__(self, spec: RackSpec) -> None:
        super().__init__()
        self._spec = spec
        self.vocab_size, self.d_model = spec.vocab_size, spec.d_model
        norm = (spec.norm, spec.d_model, spec.norm_eps, spec.norm_bias)
        self.embedding = TokenEmbedding(
            spec.vocab_size,
            spec.d_model,
            spec.dropout,
            spec.freeze_embeddings,
            spec.learned_positions,
            create_norm(*norm) if spec.embedding_norm else None,
            spec.embedding_dim,
            spec.adapter_hidden_dim,
        )
        self.stacks = Stacks(
            Stack(stack_id, [Block(block) for block in blocks]) for stack_id, blocks in zip(spec.stack_ids, spec.stacks)
        )
        self.norm = create_norm(*norm)
        self.head = (
            Head(
                spec.vocab_size,
                spec.d_model,
                tied=spec.tie_embeddings,
                transform=spec.mlm_head,
                norm=spec.norm,
                norm_eps=spec.norm_eps,
                norm_bias=spec.norm_bias,
                bias=spec.bias,
            )
            if spec.mlm_head or not spec.tie_embeddings
            else None
        )

    @property
    def spec(self) -> RackSpec:
        """What the Rack is, in numbers: with the Stacks that it has by now."""
        return self._spec.with_stacks(
            tuple(tuple(block.spec for block in stack.blocks) for stack in self.stacks),
            tuple(stack.stack_id for stack in self.stacks),
        )

    @property
    def tied(self) -> bool:
        """Whether the head uses the embedding's table."""
        return self._spec.tie_embeddings

    @property
    def head_weight(self) -> Tensor:
        """(V, C)."""
        if self.head is None or self.head.weight is None:
            return self.embedding.table()
        return self.head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """(V,), where the head has one."""
        return None if self.head is None else self.head.bias

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def parts(self) -> dict[str, nn.Module]:
        """What trains, freezes and is saved: ``embedding``, ``stack.<id>`` …, ``norm``, ``head`` (if it has any)."""
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

    def part_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(part, name within the part, tensor) of all that is saved: parameters, and the frequencies of kernels."""
        for part, module in self.parts().items():
            for name, tensor in module.state_dict(keep_vars=True).items():
                yield part, name, tensor

    def blocks(self) -> list[Block]:
        return [block for stack in self.stacks for block in stack.blocks]

    def set_attention_mode(self, mode: AttentionMode) -> None:
        """Makes every Block ``causal`` or ``bidirectional``; the weights fit both."""
        for block in self.blocks():
            block.attention.set_attention_mode(mode)

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
        return KVCache([block.attention.window for block in blocks], max_tokens)

    def _rope_tables(self, n_tokens: int, start: int, device: torch.device, positions: Tensor | None) -> RopeTables:
        keys = {block.attention.rope_key for block in self.blocks() if block.attention.rope_key is not None}
        if positions is None:
            return {key: rope_table(n_tokens, *key, device, start) for key in keys}
        return {key: rope_rows(rope_table(start + n_tokens, *key, device), positions) for key in keys}

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """(B, T) token ids → (B, T, C): what the head's matrix reads.

        Args:
            attention_mask: boolean (B, T), True where a token is real; positions are counted over real tokens.
            cache: what was read before, from ``make_cache``; ``input_ids`` are then the tokens that follow.
        """
        B, T = input_ids.shape
        start = 0 if cache is None else cache.length
        if cache is None:
            positions = None if attention_mask is None else positions_of(attention_mask)
        else:
            attention_mask = cache.extend_mask(attention_mask, B, T, input_ids.device)
            positions = None if attention_mask is None else positions_of(attention_mask)[:, -T:]
        rope = self._rope_tables(T, start, input_ids.device, positions)
        x = self.embedding(input_ids, positions, start)
        done = 0
        for stack in self.stacks:
            n = len(stack.blocks)
            x = stack(x, attention_mask, rope, None if cache is None else cache.layers[done : done + n])
            done += n
        x = self.norm(x)
        return x if self.head is None else self.head(x)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """(B, T) token ids → logits (B, T, V)."""
        return self.logits(self.hidden(input_ids, attention_mask, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, C), from ``hidden`` → (…, V)."""
        out = torch.matmul(hidden, self.head_weight.to(hidden.dtype).T)
        return out if self.head_bias is None else out + self.head_bias
