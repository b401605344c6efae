"""Attention: projections, positions, then ``scaled_dot_product_attention``.

B batch, T tokens, C width, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from typing import Literal, Self

from torch import Tensor, nn

from stackwise.config.base import StackWiseConfig
from stackwise.model.cache import LayerCache
from stackwise.ops.attention import attend
from stackwise.ops.rope import apply_rope, rope_table

AttentionMode = Literal["causal", "bidirectional"]


class CoreAttention(nn.Module):
    """Multi-head attention (1706.03762 §3.2); grouped (2305.13245) when ``n_kv_heads < n_heads``.

    Args:
        d_model: width C.
        n_heads: query heads H.
        n_kv_heads: key/value heads G, a divisor of H; default H.
        dropout: of attention weights, while training.
        attention_mode: ``causal`` (a token sees itself and what is before it) or ``bidirectional``.
        use_rope: rotate queries and keys by their position; else the layer knows no order.
        rope_theta: base of the rotary frequencies.

    Raises:
        ValueError: head counts that do not divide, or an odd head size with rotary positions.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        *,
        dropout: float = 0.0,
        attention_mode: AttentionMode = "bidirectional",
        use_rope: bool = True,
        rope_theta: float = 10000.0,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if d_model % n_heads or n_heads % n_kv_heads:
            raise ValueError(
                f"n_heads ({n_heads}) must divide d_model ({d_model}), and n_kv_heads ({n_kv_heads}) n_heads"
            )
        if attention_mode not in ("causal", "bidirectional"):
            raise ValueError(f"attention_mode is {attention_mode!r}; allowed: causal, bidirectional")
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, d_model // n_heads
        if use_rope and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head size; d_model / n_heads is {self.head_dim}")
        self.dropout, self.attention_mode = dropout, attention_mode
        self.rope_key = (self.head_dim, rope_theta) if use_rope else None
        self.q_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * self.head_dim, d_model, bias=False)

    @classmethod
    def from_config(cls, config: StackWiseConfig) -> Self:
        """The attention that ``config.model`` describes, in the direction that the preset or the objective sets."""
        model = config.model
        return cls(
            model.d_model,
            model.n_heads,
            model.kv_heads,
            dropout=model.dropout,
            attention_mode=config.attention_mode,
            use_rope=model.use_rope,
            rope_theta=model.rope_theta,
        )

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """(B, T, C) → (B, T, C).

        Args:
            attention_mask: boolean (B, T), True where a token is real; with a cache, (B, all tokens read so far).
            rope: the rotary table of these positions, where the caller has it already; computed when left out.
            cache: keys and values of earlier tokens. It takes the whole prompt at first, then one token at a time.
        """
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)
        past = 0 if cache is None else cache.length
        if self.rope_key is not None:
            cos, sin = rope if rope is not None else rope_table(T, *self.rope_key, x.device, past)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            if past and T > 1:
                raise ValueError(f"a cache that holds {past} tokens takes one token at a time, not {T}")
            k, v = cache.append(k, v)
        out = attend(
            q,
            k,
            v,
            causal=self.attention_mode == "causal" and T > 1,
            key_mask=attention_mask,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.o_proj(out.transpose(1, 2).reshape(B, T, self.n_heads * self.head_dim))
