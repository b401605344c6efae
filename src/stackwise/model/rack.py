"""Rack: the whole model.

B batch, T tokens, C width (``d_model``), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from stackwise.config.attention import AttentionMode
from stackwise.model.block import Block, Context, RopeTables
from stackwise.model.cache import KVCache, positions_of
from stackwise.model.embedding import Head, TimeEmbedding, TokenEmbedding
from stackwise.model.norms import create_norm
from stackwise.model.reading import Reading
from stackwise.model.spec import RackSpec
from stackwise.model.stack import ADAPTERS, Stack, Stacks
from stackwise.ops.attention import block_causal, noised_and_clean
from stackwise.ops.losses import linear_cross_entropy, linear_cross_entropy_terms
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

    @torch.no_grad()
    def extend_vocabulary(self, n: int) -> None:
        """Adds ``n`` tokens, whose rows in the embedding and the head are the mean of the rows before."""

        def longer(weight: Tensor) -> nn.Parameter:
            mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
            rows = torch.cat((weight, mean.expand(n, *weight.shape[1:])))
            return nn.Parameter(rows, requires_grad=weight.requires_grad)

        self.embedding.weight = longer(self.embedding.weight)
        self.embedding.num_embeddings += n
        if self.head is not None:
            self.head.weight = None if self.head.weight is None else longer(self.head.weight)
            self.head.bias = None if self.head.bias is None else longer(self.head.bias)
        self.vocab_size += n
        self._spec = replace(self._spec, vocab_size=self.vocab_size)

    def forward(self, input_ids: Tensor | Reading, attention_mask: Tensor | None = None) -> Tensor | list[Tensor]:
        """(B, T) token ids → logits (B, T, V); or a ``Reading`` → the hidden state that it asks for.

        Whatever is computed with a Rack passes here, so that hooks, compilers and wrappers see it. ``logits`` and the
        two cross-entropies make of the hidden state what a head is for.

        Args:
            attention_mask: boolean (B, T), True where a token is real; positions are counted over real tokens.
        """
        if not isinstance(input_ids, Reading):
            return self.logits(self._pass(Reading(input_ids, attention_mask)))
        if input_ids.routes:
            return self._routed(input_ids)
        return self._staged(input_ids) if input_ids.stages else self._pass(input_ids)

    def _pass(self, reading: Reading) -> Tensor:
        """(B, T, C): the embedding, the Stacks that run, and the final norm, of a reading without routes or stages."""
        B, T = reading.shape
        ids, mask, cache = reading.ids, reading.attention_mask, reading.cache
        past, seen = 0, None
        if cache is not None:
            if ids is None or reading.block_length is not None:
                raise ValueError("a key/value cache needs token ids and no block_length")
            past, mask = cache.length, cache.extend_mask(mask, B, T, ids.device)
        positions = None if mask is None else positions_of(mask)[:, -T:]
        if reading.clean is not None:
            assert ids is not None and reading.block_length is not None
            seen = noised_and_clean(T, reading.block_length, self.device)
            positions = torch.arange(T, device=self.device)[None] if positions is None else positions
            ids, positions = torch.cat((ids, reading.clean), dim=1), positions.repeat(1, 2)
            mask = None if mask is None else mask.repeat(1, 2)
        elif reading.block_length is not None:
            seen = block_causal(T, reading.block_length, self.device)
        x = self._enter(ids, reading.boundary, positions, past)
        stacks = list(self.stacks)
        place = sum(len(stack.blocks) for stack in stacks[: reading.start])
        if running := stacks[reading.start : reading.stop]:
            context = Context(
                mask,
                self._rope_tables(x.shape[1], past, x.device, positions),
                seen,
                None if reading.time is None or self.embedding.time is None else self.embedding.time(reading.time),
                () if cache is None else tuple(cache.layers),
            )
            for stack in running:
                x = stack(x, context.of_blocks(place, len(stack.blocks)))
                place += len(stack.blocks)
        if reading.finished:
            x = self._finish(x)
        return x if reading.clean is None else x[:, :T]

    def _routed(self, reading: Reading) -> Tensor:
        """Each row through its own Stacks."""
        parts, order = [], []
        for route in reading.routes:
            index = torch.tensor(route.rows, device=self.device)
            parts.append(self._pass(replace(reading.rows(index), start=route.start, stop=route.stop)))
            order.append(index)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def _staged(self, reading: Reading) -> list[Tensor]:
        """h_k = stack_k(h_{k−1} + embed(z_k)), h_{−1} = 0, for the stages z_k = ``ids[:, k]``."""
        assert reading.ids is not None
        found: list[Tensor] = []
        for k, ids in enumerate(reading.ids.unbind(1)):
            stage = replace(
                reading,
                ids=ids,
                boundary=found[-1] if found else None,
                start=k,
                stop=k + 1,
                time=None if reading.time is None else reading.time[:, k],
                finished=False,
            )
            found.append(self._pass(stage))
        return [self._finish(found[k]) if reading.finished else found[k] for k in reading.stages]

    def _enter(self, ids: Tensor | None, boundary: Tensor | None, positions: Tensor | None, start: int) -> Tensor:
        """(B, T, C) before the first Stack that runs; ids are embedded where the embedding waits."""
        if ids is None:
            assert boundary is not None
            return boundary
        where = self.embedding.weight.device
        if where == self.device:
            x = self.embedding(ids, positions, start)
        else:
            x = self.embedding(ids.to(where), None if positions is None else positions.to(where), start).to(self.device)
        return x if boundary is None else x + boundary

    def _rope_tables(self, n_tokens: int, start: int, device: torch.device, positions: Tensor | None) -> RopeTables:
        keys = {block.attention.rope_key for block in self.blocks() if block.attention.rope_key is not None}
        if positions is None:
            return {key: rope_table(n_tokens, *key, device, start) for key in keys}
        return {key: rope_rows(rope_table(start + n_tokens, *key, device), positions) for key in keys}

    def _finish(self, x: Tensor) -> Tensor:
        """(B, T, C) after the last Stack → what the head's matrix reads."""
        x = self.norm(x)
        return x if self.head is None else self.head(x)

    def _head(self, classes: int | None) -> tuple[Tensor, Tensor | None]:
        """The matrix (V, C) of the head and its bias (V,), if it has one; with ``classes``, only that many rows."""
        own = None if self.head is None else self.head.weight
        weight: Tensor = self.embedding.table() if own is None else own
        bias: Tensor | None = None if self.head is None else self.head.bias
        if classes is None:
            return weight, bias
        return weight[:classes], None if bias is None else bias[:classes]

    def logits(self, hidden: Tensor, *, classes: int | None = None) -> Tensor:
        """(…, C), what ``forward`` gives for a ``Reading`` → (…, V), or (…, N) of the head's first N rows."""
        weight, bias = self._head(classes)
        out = torch.matmul(hidden, weight.to(hidden.dtype).T)
        return out if bias is None else out + bias

    def cross_entropy(
        self,
        hidden: Tensor,
        targets: Tensor,
        scale: float = 1.0,
        *,
        weights: Tensor | None = None,
        excluded: int | None = None,
        classes: int | None = None,
    ) -> Tensor:
        """scale · Σ w · cross-entropy over the positions that count; the logits of a large vocabulary come in chunks.

        Args:
            hidden: (…, C), what ``forward`` gives for a ``Reading``.
            targets: (…) int64; ``IGNORE`` where nothing counts.
            weights: (…) fp32, w of each position; default 1.
            excluded: a token that is never predicted: its logit is −∞.
            classes: only the head's first N rows are predicted; default all.
        """
        weight, bias = self._head(classes)
        return linear_cross_entropy(
            hidden.flatten(0, -2),
            weight,
            targets.flatten(),
            scale,
            bias=bias,
            weights=None if weights is None else weights.flatten(),
            excluded=excluded,
        )

    def cross_entropy_terms(
        self, hidden: Tensor, targets: Tensor, *, excluded: int | None = None, classes: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each position (…), and whether its target is the likeliest token; without gradients."""
        weight, bias = self._head(classes)
        terms, right = linear_cross_entropy_terms(
            hidden.flatten(0, -2), weight, targets.flatten(), bias=bias, excluded=excluded
        )
        return terms.view_as(targets), right.view_as(targets)
