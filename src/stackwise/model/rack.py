"""Rack: the whole model.

B batch, T tokens, C width (``d_model``), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from stackwise.model.block import Block, RopeTables
from stackwise.model.cache import KVCache, positions_of
from stackwise.model.embedding import Head, TimeEmbedding, TokenEmbedding
from stackwise.model.norms import create_norm
from stackwise.model.spec import AttentionMode, RackSpec
from stackwise.model.stack import ADAPTERS, Stack, Stacks
from stackwise.ops.rope import rope_rows, rope_table


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
            None if spec.time_embedding is None else TimeEmbedding(spec.time_embedding, spec.time_dim or 0),
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

    def checkpoint_activations(self, on: bool) -> None:
        """Keep only each Block's input for the backward pass, and recompute the rest there."""
        for stack in self.stacks:
            stack.activation_checkpointing = on

    def make_cache(self, max_tokens: int) -> KVCache:
        """An empty cache for ``max_tokens`` tokens.

        Where attention is causal it reads one token after another; where it is bidirectional, one block of tokens after
        another, whose tokens see each other.
        """
        blocks = self.blocks()
        modes = {block.attention.attention_mode for block in blocks}
        if len(modes) > 1 or (modes == {"bidirectional"} and any(block.attention.window for block in blocks)):
            raise ValueError(
                "a key/value cache needs causal attention in every Block, or bidirectional without windows"
            )
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
        *,
        runs: tuple[int, int] | None = None,
        time: Tensor | None = None,
        seen: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """(B, T) token ids → (B, T, C): what the head's matrix reads.

        Args:
            attention_mask: boolean (B, T), True where a token is real; positions are counted over real tokens.
            cache: what was read before, from ``make_cache``; ``input_ids`` are then the tokens that follow.
            boundary: (B, T, C), the hidden state of ``input_ids`` after ``enters`` Stacks, which then do not run.
            runs: (start, stop): only the Stacks at these places run, between embedding and norm. Default all.
            time: (B,) noise levels in [0, 1], for Blocks that are conditioned on them.
            seen: (T, T) boolean, which tokens each one sees, in place of the Blocks' attention mode.
            positions: (B or 1, T) int64, in place of counting.
        """
        if cache is not None:
            return self.finish(self._read(input_ids, attention_mask, cache, time))
        start, stop = runs or (enters, len(self.stacks))
        return self.finish(
            self.advance(
                self.embed(input_ids, attention_mask, positions) if boundary is None else boundary,
                start,
                stop,
                attention_mask,
                time=time,
                seen=seen,
                positions=positions,
            )
        )

    def _read(self, input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache, time: Tensor | None) -> Tensor:
        """The hidden state of tokens that follow those in ``cache``, after the last Stack."""
        B, T = input_ids.shape
        start = cache.length
        attention_mask = cache.extend_mask(attention_mask, B, T, input_ids.device)
        positions = None if attention_mask is None else positions_of(attention_mask)[:, -T:]
        rope = self._rope_tables(T, start, input_ids.device, positions)
        x, done = self.embedding(input_ids, positions, start), 0
        condition = self.condition(time)
        for stack in self.stacks:
            n = len(stack.blocks)
            x = stack(x, attention_mask, rope, cache.layers[done : done + n], None, condition)
            done += n
        return x

    def finish(self, x: Tensor) -> Tensor:
        """(B, T, C) after the last Stack → what the head's matrix reads."""
        x = self.norm(x)
        return x if self.head is None else self.head(x)

    def condition(self, time: Tensor | None) -> Tensor | None:
        """(B,) noise levels → (B, time_dim): what Blocks are conditioned on, where they are."""
        return None if time is None or self.embedding.time is None else self.embedding.time(time)

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """(B, T) token ids → (B, T, C), boundary 0."""
        if positions is None and attention_mask is not None:
            positions = positions_of(attention_mask)
        where = self.embedding.weight.device
        if where == self.device:
            return self.embedding(input_ids, positions, 0)
        return self.embedding(input_ids.to(where), None if positions is None else positions.to(where), 0).to(
            self.device
        )

    def advance(
        self,
        x: Tensor,
        start: int,
        stop: int,
        attention_mask: Tensor | None = None,
        *,
        time: Tensor | None = None,
        seen: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) at boundary ``start`` → (B, T, C) at boundary ``stop``: runs the Stacks between them."""
        if positions is None and attention_mask is not None:
            positions = positions_of(attention_mask)
        rope = self._rope_tables(x.shape[1], 0, x.device, positions)
        condition = self.condition(time)
        for stack in list(self.stacks)[start:stop]:
            x = stack(x, attention_mask, rope, None, seen, condition)
        return x

    def unroll(
        self, stages: Sequence[Tensor], attention_mask: Tensor | None = None, *, time: Tensor | None = None
    ) -> list[Tensor]:
        """One pass in which Stack k reads the tokens of its own stage beside what Stack k − 1 made of the one before.

        h_k = stack_k(h_{k−1} + embed(z_k)), h_{−1} = 0.

        Args:
            stages: z_0, z_1, …: (B, T) token ids for each of the first Stacks.
            time: (stages, B) noise levels, for Blocks that are conditioned on them.

        Returns: h_k (B, T, C) of each stage; ``finish`` makes of each what the head's matrix reads.
        """
        found: list[Tensor] = []
        for k, input_ids in enumerate(stages):
            x = self.embed(input_ids, attention_mask)
            x = x if not found else found[-1] + x
            found.append(self.advance(x, k, k + 1, attention_mask, time=None if time is None else time[k]))
        return found

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """(B, T) token ids → logits (B, T, V)."""
        return self.logits(self.hidden(input_ids, attention_mask, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, C), from ``hidden`` → (…, V)."""
        out = torch.matmul(hidden, self.head_weight.to(hidden.dtype).T)
        return out if self.head_bias is None else out + self.head_bias
