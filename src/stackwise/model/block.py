"""Block: one pre-norm transformer layer.

B batch, T tokens, C width (``d_model``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.model.attention.core import CoreAttention
from stackwise.model.cache import LayerCache
from stackwise.model.feed_forward import create_feed_forward
from stackwise.model.norms import create_norm
from stackwise.model.spec import BlockSpec

RopeTables = Mapping[tuple[int, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Context:
    """What the Blocks of one pass share beside the hidden state.

    Attributes:
        attention_mask: boolean (B, T), True where a token is real; with caches (B, all tokens read so far).
        rope: the rotary tables of the tokens' positions; ``None``: each attention computes its own.
        seen: (T, T) boolean, which tokens each one sees, in place of the Blocks' attention mode.
        condition: (B, ``time_dim``), what Blocks are conditioned on.
        caches: the keys and values of earlier tokens, one for each Block that reads this context; empty: none.
    """

    attention_mask: Tensor | None = None
    rope: RopeTables | None = None
    seen: Tensor | None = None
    condition: Tensor | None = None
    caches: tuple[LayerCache, ...] = ()

    def of_blocks(self, first: int, n: int) -> Context:
        """The context of ``n`` of the Blocks, from the place ``first`` on."""
        return replace(self, caches=self.caches[first : first + n]) if self.caches else self


NO_CONTEXT = Context()


class Block(nn.Module):
    """One pre-norm transformer layer: x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self._spec = spec
        attention = spec.attention
        norm = (spec.norm, attention.d_model, attention.norm_eps, spec.norm_bias)
        self.attention_norm = create_norm(*norm) if spec.attention_norm else nn.Identity()
        self.attention = CoreAttention(attention)
        self.ffn_norm = create_norm(*norm)
        self.ffn = create_feed_forward(spec.ffn, attention.d_model, spec.d_ff, spec.freeze_up_proj, attention.bias)
        self.dropout = attention.dropout
        self.modulation = None if spec.time_dim is None else nn.Linear(spec.time_dim, 6 * attention.d_model)

    @property
    def spec(self) -> BlockSpec:
        """What the Block is, in numbers."""
        return replace(self._spec, attention=self.attention.spec)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """(B, T, C) → (B, T, C).

        The condition scales and shifts what each norm returns, and scales each residual branch, by 1 + s and 0 + b with
        s and b from a linear layer that starts at zero (after DiT's adaLN, 2212.09748 §3.2).
        """
        h = self.attention_norm(x)
        if self.modulation is None:
            x = x + F.dropout(self._attended(_for_products(h), context), self.dropout, self.training)
            return x + F.dropout(self.ffn(_for_products(self.ffn_norm(x))), self.dropout, self.training)
        if context.condition is None:
            raise ValueError("the Blocks are conditioned on the noise level; give time")
        scale, shift, gate, ffn_scale, ffn_shift, ffn_gate = (
            self.modulation(F.silu(context.condition))[:, None].to(x.dtype).chunk(6, dim=-1)
        )
        update = (1 + gate) * self._attended(_for_products(h * (1 + scale) + shift), context)
        x = x + F.dropout(update, self.dropout, self.training)
        h = _for_products(self.ffn_norm(x) * (1 + ffn_scale) + ffn_shift)
        return x + F.dropout((1 + ffn_gate) * self.ffn(h), self.dropout, self.training)

    def _attended(self, h: Tensor, context: Context) -> Tensor:
        attention = self.attention
        return attention(
            h,
            context.attention_mask,
            rope=context.rope[attention.rope_key] if context.rope is not None and attention.rope_key else None,
            cache=context.caches[0] if context.caches else None,
            seen=context.seen,
        )


def _for_products(x: Tensor) -> Tensor:
    """``x`` in the dtype of matrix products, once: under autocast each of several would make and keep its own copy."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Blocks(nn.ModuleList):
    """A ``ModuleList`` that type checkers know to hold Blocks."""

    def __iter__(self) -> Iterator[Block]:
        return super().__iter__()  # type: ignore[return-value]
