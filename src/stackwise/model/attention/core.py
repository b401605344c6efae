"""Attention of one class, composed of parts: projections, positions, a feature map, then one fused kernel.

B batch, T tokens, S keys, C width, H query heads, G key/value heads, D head size, R rotary part of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from stackwise.model.cache import LayerCache, positions_of
from stackwise.model.linear import Linear
from stackwise.model.norms import RMSNorm
from stackwise.model.spec import AttentionMode, BlockSpec, KernelMeaning, KernelNorm, KernelType, Latents
from stackwise.ops.attention import attend
from stackwise.ops.kernels import (
    LAPLACIAN_TIP,
    default_bandwidth,
    default_temperature,
    fourier_features,
    frequencies,
    gaussian_weight_columns,
    laplacian_weight_attention,
)
from stackwise.ops.rope import apply_rope, rope_rows, rope_table

if TYPE_CHECKING:
    from stackwise.config.base import StackWiseConfig

LATENT_NORM_EPS = 1e-6
"""Of the norms on latents, in DeepSeek-V3 whatever the model's other norms have."""

EXACT_WEIGHT_KERNELS = ("gaussian", "laplacian")
"""Kernels that can be attention weights themselves: computed exactly and never negative."""


class CoreAttention(nn.Module):
    """Multi-head attention (1706.03762 §3.2) in every form that a Block can have.

    Projections are full; *grouped* when ``n_kv_heads < n_heads`` (2305.13245); *latent* with ``r_kv`` (and ``r_q``):
    ``shared`` is DeepSeek-V3's MLA (2412.19437 §2.1.1): keys and values come from one normalised latent of rank
    ``r_kv``, queries from one of rank ``r_q``, and positions travel in ``rope_dim`` more dimensions, whose key all
    heads share; ``separate`` gives each of q, k, v a factor of its own of rank ``r_q``, ``r_kv``, ``r_kv``.

    A kernel k(q, k) replaces the dot product: as *logit*, softmax(τ k(q, k)) with k approximated by ``kernel_dim``
    random Fourier features (Rahimi and Recht 2007) after the rotation; as *weight*, k / Σ k, exactly.

    Args:
        d_model: width C.
        n_heads: query heads H.
        n_kv_heads: key/value heads G, a divisor of H; default H.
        r_q, r_kv: ranks of the latents; default none.
        kernel_dim: random features (even), for kernels as logits.
        kernel_type: ``linear`` (the dot product), ``gaussian``, ``laplacian`` or ``uniform``.
        dropout: of attention weights, while training.
        attention_mode: ``causal`` (a token sees itself and what is before it) or ``bidirectional``.
        head_dim: D; default C / H. With shared latents, the part of a key without position.
        use_rope: rotate queries and keys by their position; else the layer knows no order.
        rope_theta: base of the rotary frequencies.
        bias: of all projections.
        qk_norm: RMSNorm over each head's q and k before the rotation (Qwen3), with ``norm_eps``.
        window: local attention: causal: a token sees itself and window − 1 before; bidirectional: window // 2 to each
            side; default all.
        latents: ``shared`` or ``separate``.
        rope_dim: R of shared latents; default D / 2, made even; 0 without rotary positions.
        v_head_dim: size of a value head; default D. Shared latents only.
        kernel_meaning: ``logit`` or ``weight``.
        kernel_norm: of the laplacian's distance: ``l2``, or ``l1`` (not a function of relative positions after rotary).
        kernel_bandwidth: s; default by kernel and D (``ops.kernels.default_bandwidth``).
        learned_temperature: τ of each head trains, from ``ops.kernels.default_temperature`` on; else it stays there.
        seed: of the frequencies of the features.

    Raises:
        ValueError: sizes that do not divide, and combinations that do not exist.
    """

    frequencies: Tensor | None

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        r_q: int | None = None,
        r_kv: int | None = None,
        kernel_dim: int = 64,
        kernel_type: KernelType = "linear",
        dropout: float = 0.0,
        attention_mode: AttentionMode = "bidirectional",
        *,
        head_dim: int | None = None,
        use_rope: bool = True,
        rope_theta: float = 10000.0,
        bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        window: int | None = None,
        latents: Latents = "shared",
        rope_dim: int | None = None,
        v_head_dim: int | None = None,
        kernel_meaning: KernelMeaning = "logit",
        kernel_norm: KernelNorm = "l2",
        kernel_bandwidth: float | None = None,
        learned_temperature: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        G = n_heads if n_kv_heads is None else n_kv_heads
        if G < 1 or n_heads % G:
            raise ValueError(f"n_kv_heads ({G}) must divide n_heads ({n_heads})")
        if head_dim is None:
            if d_model % n_heads:
                raise ValueError(f"n_heads ({n_heads}) must divide d_model ({d_model}), or head_dim be given")
            head_dim = d_model // n_heads
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, G, head_dim
        self.dropout, self.window = dropout, window
        self.set_attention_mode(attention_mode)

        shared = r_kv is not None and latents == "shared"
        if latents not in ("shared", "separate"):
            raise ValueError(f"latents is {latents!r}; allowed: shared, separate")
        if r_q is not None and r_kv is None:
            raise ValueError(f"r_q ({r_q}) without r_kv: latent attention needs the rank of keys and values")
        if r_kv is not None and latents == "separate" and r_q is None:
            raise ValueError(f"separate latents need r_q beside r_kv ({r_kv})")
        if not shared and (rope_dim is not None or v_head_dim is not None):
            raise ValueError("rope_dim and v_head_dim are of shared latents; give r_kv")
        if qk_norm and r_kv is not None:
            raise ValueError("qk_norm goes with full projections; latents have norms of their own")
        self.shared_latent = shared
        rotary = 0
        if use_rope:
            rotary = head_dim if not shared else (head_dim // 4 * 2 if rope_dim is None else rope_dim)
            if rotary < 2 or rotary % 2:
                raise ValueError(f"rotary positions need an even size; it is {rotary} (head size {head_dim})")
        elif rope_dim:
            raise ValueError(f"rope_dim is {rope_dim}, but use_rope is false")
        self.rope_dim = rotary
        self.rope_key = (rotary, rope_theta) if rotary else None
        D = head_dim + rotary if shared else head_dim  # of a query
        self.qk_dim, self.v_dim = D, v_head_dim or head_dim

        def linear(n_in: int, n_out: int) -> Linear:
            return Linear(n_in, n_out, bias=bias)

        # Shared latents: the factors have no bias but where the field gives them one, before a norm (DeepSeek-V3).
        if shared:
            assert r_kv is not None
            if r_q is None:
                self.q_proj = Linear(d_model, n_heads * D, bias=False)
            else:
                self.q_a_proj = linear(d_model, r_q)
                self.q_a_norm = RMSNorm(r_q, eps=LATENT_NORM_EPS)
                self.q_b_proj = Linear(r_q, n_heads * D, bias=False)
            self.kv_a_proj = linear(d_model, r_kv + rotary)
            self.kv_a_norm = RMSNorm(r_kv, eps=LATENT_NORM_EPS)
            self.kv_b_proj = Linear(r_kv, G * (head_dim + self.v_dim), bias=False)
        elif r_kv is not None:
            assert r_q is not None
            self.q_a_proj, self.q_b_proj = Linear(d_model, r_q, bias=False), linear(r_q, n_heads * D)
            self.k_a_proj, self.k_b_proj = Linear(d_model, r_kv, bias=False), linear(r_kv, G * D)
            self.v_a_proj, self.v_b_proj = Linear(d_model, r_kv, bias=False), linear(r_kv, G * D)
        else:
            self.q_proj, self.k_proj, self.v_proj = (linear(d_model, n * D) for n in (n_heads, G, G))
        self.o_proj = linear(n_heads * self.v_dim, d_model)
        self.q_norm = RMSNorm(D, eps=norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(D, eps=norm_eps) if qk_norm else None
        self._set_kernel(kernel_type, kernel_dim, kernel_meaning, kernel_norm, kernel_bandwidth, seed)
        if learned_temperature and (kernel_type == "linear" or kernel_meaning == "weight"):
            raise ValueError("learned_temperature goes with kernels as logits")
        self.log_temperature = nn.Parameter(torch.zeros(n_heads)) if learned_temperature else None
        self.set_temperature()

    def _set_kernel(
        self, kind: KernelType, n: int, meaning: KernelMeaning, norm: KernelNorm, bandwidth: float | None, seed: int
    ) -> None:
        if kind not in ("linear", "gaussian", "laplacian", "uniform"):
            raise ValueError(f"kernel_type is {kind!r}; allowed: linear, gaussian, laplacian, uniform")
        if meaning not in ("logit", "weight"):
            raise ValueError(f"kernel_meaning is {meaning!r}; allowed: logit, weight")
        if norm not in ("l2", "l1"):
            raise ValueError(f"kernel_norm is {norm!r}; allowed: l2, l1")
        if bandwidth is not None and not bandwidth > 0:
            raise ValueError(f"kernel_bandwidth is {bandwidth}; it must be above 0")
        self.kernel_type, self.kernel_meaning, self.kernel_norm = kind, meaning, norm
        self.kernel_dim = n
        self.register_buffer("frequencies", None)
        if kind == "linear":
            return
        self.bandwidth = default_bandwidth(kind, meaning, self.qk_dim) if bandwidth is None else bandwidth
        self.temperature = default_temperature(kind, self.bandwidth, self.qk_dim)
        if meaning == "weight":
            if kind not in EXACT_WEIGHT_KERNELS or norm != "l2":
                raise ValueError(
                    f"kernel_meaning weight is exact for the gaussian and the L2 laplacian; not for {kind} ({norm})"
                )
            if kind == "laplacian" and self.dropout:
                raise ValueError("the laplacian as weight has no dropout of attention weights; set dropout to 0")
            return
        if n < 2 or n % 2:
            raise ValueError(f"kernel_dim is {n}; features come in pairs: an even number from 2 on")
        self.frequencies = torch.empty(n // 2, self.qk_dim)
        self.draw_frequencies(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def draw_frequencies(self, generator: torch.Generator) -> None:
        """Draws the frequencies of the features again. Only kernels as logits have any."""
        if self.frequencies is not None:
            n = len(self.frequencies)
            self.frequencies.copy_(
                frequencies(
                    self.kernel_type, n, self.qk_dim, self.bandwidth, self.kernel_norm, generator, LAPLACIAN_TIP
                )
            )

    @torch.no_grad()
    def set_temperature(self) -> None:
        """Gives learned temperatures their first value."""
        if self.log_temperature is not None:
            self.log_temperature.fill_(math.log(self.temperature))

    def set_attention_mode(self, mode: AttentionMode) -> None:
        """Switches between ``causal`` and ``bidirectional``; the weights fit both."""
        if mode not in ("causal", "bidirectional"):
            raise ValueError(f"attention_mode is {mode!r}; allowed: causal, bidirectional")
        self.attention_mode: AttentionMode = mode

    @classmethod
    def from_spec(cls, spec: BlockSpec) -> Self:
        """The attention of a Block."""
        return cls(
            spec.d_model,
            spec.n_heads,
            spec.n_kv_heads,
            spec.r_q,
            spec.r_kv,
            spec.kernel_dim,
            spec.kernel_type,
            spec.dropout,
            spec.attention_mode,
            head_dim=spec.head_dim,
            use_rope=spec.use_rope,
            rope_theta=spec.rope_theta,
            bias=spec.bias,
            qk_norm=spec.qk_norm,
            norm_eps=spec.norm_eps,
            window=spec.window,
            latents=spec.latents,
            rope_dim=spec.rope_dim,
            v_head_dim=spec.v_head_dim,
            kernel_meaning=spec.kernel_meaning,
            kernel_norm=spec.kernel_norm,
            kernel_bandwidth=spec.kernel_bandwidth,
            learned_temperature=spec.learned_temperature,
        )

    @classmethod
    def from_config(cls, config: StackWiseConfig) -> Self:
        """The attention that ``config.model`` describes (its local form where Blocks differ)."""
        return cls.from_spec(BlockSpec(**config.block_fields()))

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) → (B, T, C).

        Args:
            attention_mask: boolean (B, T), True where a token is real; with a cache, (B, all tokens read so far).
                Positions are counted over real tokens.
            rope: the rotary table of these positions, where the caller has it already; computed when left out.
            cache: what was kept of earlier tokens. It takes the whole prompt at first, then one token at a time; where
                attention is bidirectional, then several, which see each other and all that are held.
            seen: (T, S) boolean, which keys each query sees, in place of ``attention_mode``; not beside a window.
        """
        B, T, _ = x.shape
        past = 0 if cache is None else cache.length
        if past and T > 1 and self.attention_mode == "causal":
            raise ValueError(f"a cache that holds {past} tokens takes one token at a time, not {T}")
        if rope is None and self.rope_key is not None:
            rope = rope_table(past + T, *self.rope_key, x.device)
            positions = None if attention_mask is None else positions_of(attention_mask)[:, -T:]
            rope = (rope[0][past:], rope[1][past:]) if positions is None else rope_rows(rope, positions)
        if self.shared_latent:
            q, k, v = self._from_shared_latent(x, rope, cache)
        else:
            q, k, v = self._from_projections(x, rope, cache)
        if cache is not None and attention_mask is not None:
            attention_mask = cache.mask(attention_mask)
        out = self._attend(q, k, v, attention_mask, seen, decoding=past > 0)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, self.n_heads * self.v_dim))

    def _from_projections(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, ·), k and v (B, G, S, ·), rotated and mapped to features."""
        if hasattr(self, "k_a_proj"):
            q, k, v = (b(a(x)) for a, b in (
                (self.q_a_proj, self.q_b_proj), (self.k_a_proj, self.k_b_proj), (self.v_a_proj, self.v_b_proj),
            ))  # fmt: skip
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # (B, T, heads, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        q, k = self._map(q), self._map(k)
        if cache is not None:
            k, v = cache.append(k, v)
        return q, k, v

    def _from_shared_latent(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``_from_projections``; the cache holds the latent and the rotary key that all heads share."""
        D, R = self.head_dim, self.rope_dim
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))) if hasattr(self, "q_a_proj") else self.q_proj(x)
        q = q.unflatten(-1, (self.n_heads, D + R)).transpose(1, 2)  # (B, H, T, D + R)
        latent = self.kv_a_proj(x)[:, None]  # (B, 1, T, r_kv + R)
        rank = latent.shape[-1] - R
        key = latent[..., rank:]
        latent = self.kv_a_norm(latent[..., :rank])
        if rope is not None:
            q = torch.cat((q[..., :D], apply_rope(q[..., D:], *rope)), dim=-1)
            key = apply_rope(key, *rope)
        if cache is not None:
            latent, key = cache.append(latent, key)
        kv = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.n_kv_heads, D + self.v_dim)).transpose(1, 2)
        k = torch.cat((kv[..., :D], key.expand(-1, self.n_kv_heads, -1, -1)), dim=-1)
        return self._map(q), self._map(k), kv[..., D:]

    def _map(self, x: Tensor) -> Tensor:
        """Random features of queries or keys, where a kernel is the logit."""
        return x if self.frequencies is None else fourier_features(x, self.frequencies)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, seen: Tensor | None, *, decoding: bool
    ) -> Tensor:
        """(B, H, T, size of a value head)."""
        causal = self.attention_mode == "causal" and not decoding and seen is None
        window = None if decoding else self.window  # a cache of a local layer holds its window only
        dropout = self.dropout if self.training else 0.0
        scale = self.qk_dim**-0.5
        if self.kernel_type != "linear":
            if self.kernel_meaning == "logit":
                if self.log_temperature is None:
                    scale = self.temperature
                else:
                    q, scale = q * self.log_temperature.exp().to(q.dtype)[:, None, None], 1.0
            elif self.kernel_type == "gaussian":
                q, k = gaussian_weight_columns(q, k, self.bandwidth)
                scale = self.bandwidth**-2
            elif seen is not None:
                raise ValueError("the laplacian as weight cannot be told which keys each query sees (seen)")
            else:
                return laplacian_weight_attention(
                    q, k, v, self.bandwidth, causal=causal, key_mask=key_mask, window=window
                )
        return attend(q, k, v, causal=causal, key_mask=key_mask, window=window, dropout=dropout, scale=scale, seen=seen)
