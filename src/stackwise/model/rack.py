"""Block, Stack and Rack.

B batch, T tokens, C width (``d_model``), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from stackwise.model.attention.core import CoreAttention
from stackwise.model.cache import KVCache, LayerCache, positions_of
from stackwise.model.embedding import Head, TokenEmbedding
from stackwise.model.feed_forward import create_feed_forward
from stackwise.model.norms import create_norm
from stackwise.model.spec import AttentionMode, BlockSpec, RackSpec
from stackwise.ops.rope import rope_rows, rope_table

ADAPTERS = ".adapters."
"""In the names of low-rank factors; they are parts of their own, ``adapters.<id>``, beside their Stack's."""

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
        update = self.attention(_for_products(self.attention_norm(x)), attention_mask, rope=table, cache=cache)
        x = x + F.dropout(update, self.dropout, self.training)
        return x + F.dropout(self.ffn(_for_products(self.ffn_norm(x))), self.dropout, self.training)


def _for_products(x: Tensor) -> Tensor:
    """``x`` in the dtype of matrix products, once: under autocast each of several would make and keep its own copy."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


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
        self.fetch: Callable[[], Mapping[str, Tensor]] | None = None
        """Gives the tensors of a Stack whose own are elsewhere (on the meta device), for as long as they are used."""

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        rope: RopeTables | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """(B, T, C) → (B, T, C). With ``activation_checkpointing`` the backward pass finds each Block's input only.

        A Stack that is elsewhere is fetched for the forward pass and again for the backward pass, which recomputes it.
        """
        if self.fetch is None:
            return self._run(x, attention_mask, rope, caches)
        if torch.is_grad_enabled() and caches is None:
            random = any(block.dropout > 0 for block in self.blocks) and self.training
            return checkpoint(
                self._run_fetched, x, attention_mask, rope, caches, use_reentrant=False, preserve_rng_state=random
            )
        return self._run_fetched(x, attention_mask, rope, caches)

    def own_tensors(self) -> dict[str, Tensor]:
        """Name → tensor of all that is the Stack's own: everything but its adapters."""
        named = self.state_dict(keep_vars=True).items()
        return {name: tensor.detach() for name, tensor in named if ADAPTERS not in name}

    def _run_fetched(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        rope: RopeTables | None,
        caches: Sequence[LayerCache] | None,
    ) -> Tensor:
        assert self.fetch is not None
        tensors = {f"stack.{name}": tensor for name, tensor in self.fetch().items()}
        return functional_call(_Run(self), tensors, (x, attention_mask, rope, caches))

    def _run(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        rope: RopeTables | None,
        caches: Sequence[LayerCache] | None,
    ) -> Tensor:
        for i, block in enumerate(self.blocks):
            # A Stack that was fetched is recomputed as a whole already.
            if self.activation_checkpointing and self.fetch is None and torch.is_grad_enabled() and caches is None:
                x = checkpoint(
                    block, x, attention_mask, rope, use_reentrant=False, preserve_rng_state=block.dropout > 0
                )
            else:
                x = block(x, attention_mask, rope, None if caches is None else caches[i])
        return x


class _Run(nn.Module):
    """Calls a Stack's own pass as a module, as ``functional_call`` needs it."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, *args: Any) -> Tensor:
        return self.stack._run(*args)


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
        """Where the Rack runs; the embedding may wait elsewhere."""
        return next(self.norm.parameters()).device

    def parts(self) -> dict[str, nn.Module]:
        """What trains, freezes and is saved: ``embedding``, ``stack.<id>`` …, ``norm``, ``head`` (if it has any).

        Adapters inside a Stack are parts of their own, ``adapters.<id>``, in ``part_parameters`` and ``part_tensors``.
        """
        named: dict[str, nn.Module] = {"embedding": self.embedding}
        named |= {f"stack.{stack.stack_id}": stack for stack in self.stacks}
        named["norm"] = self.norm
        if self.head is not None:
            named["head"] = self.head
        return named

    def part_module(self, part: str) -> nn.Module:
        """The module that holds the tensors of ``part``; of ``adapters.<id>`` it is their Stack."""
        return self.parts()[part.replace("adapters.", "stack.")]

    @staticmethod
    def part_of(part: str, name: str) -> str:
        """The part that a tensor called ``name`` in the module of ``part`` belongs to."""
        return f"adapters.{part.removeprefix('stack.')}" if ADAPTERS in name else part

    def part_parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(part, name within the part, parameter) of every parameter, once each."""
        for part, module in self.parts().items():
            for name, parameter in module.named_parameters():
                yield self.part_of(part, name), name, parameter

    def part_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(part, name within the part, tensor) of all that is saved: parameters, and the frequencies of kernels."""
        for part, module in self.parts().items():
            for name, tensor in module.state_dict(keep_vars=True).items():
                yield self.part_of(part, name), name, tensor

    def tensors_by_part(self) -> dict[str, dict[str, Tensor]]:
        """Part → name → tensor, of all that is saved."""
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in self.parts()}
        for part, name, tensor in self.part_tensors():
            parts.setdefault(part, {})[name] = tensor
        return parts

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

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        boundary: Tensor | None = None,
        enters: int = 0,
    ) -> Tensor:
        """(B, T) token ids → (B, T, C): what the head's matrix reads.

        Args:
            attention_mask: boolean (B, T), True where a token is real; positions are counted over real tokens.
            cache: what was read before, from ``make_cache``; ``input_ids`` are then the tokens that follow.
            boundary: (B, T, C), the hidden state of ``input_ids`` after ``enters`` Stacks, which then do not run.
        """
        if boundary is not None:
            x = self.advance(boundary, enters, len(self.stacks), attention_mask)
        elif cache is None:
            x = self.advance(self.embed(input_ids, attention_mask), 0, len(self.stacks), attention_mask)
        else:
            B, T = input_ids.shape
            start = cache.length
            attention_mask = cache.extend_mask(attention_mask, B, T, input_ids.device)
            positions = None if attention_mask is None else positions_of(attention_mask)[:, -T:]
            rope = self._rope_tables(T, start, input_ids.device, positions)
            x, done = self.embedding(input_ids, positions, start), 0
            for stack in self.stacks:
                n = len(stack.blocks)
                x = stack(x, attention_mask, rope, cache.layers[done : done + n])
                done += n
        x = self.norm(x)
        return x if self.head is None else self.head(x)

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) token ids → (B, T, C), boundary 0."""
        positions = None if attention_mask is None else positions_of(attention_mask)
        where = self.embedding.weight.device
        if where == self.device:
            return self.embedding(input_ids, positions, 0)
        return self.embedding(input_ids.to(where), None if positions is None else positions.to(where), 0).to(
            self.device
        )

    def advance(self, x: Tensor, start: int, stop: int, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T, C) at boundary ``start`` → (B, T, C) at boundary ``stop``: runs the Stacks between them."""
        positions = None if attention_mask is None else positions_of(attention_mask)
        rope = self._rope_tables(x.shape[1], 0, x.device, positions)
        for stack in list(self.stacks)[start:stop]:
            x = stack(x, attention_mask, rope)
        return x

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """(B, T) token ids → logits (B, T, V)."""
        return self.logits(self.hidden(input_ids, attention_mask, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, C), from ``hidden`` → (…, V)."""
        out = torch.matmul(hidden, self.head_weight.to(hidden.dtype).T)
        return out if self.head_bias is None else out + self.head_bias
