"""How attention makes queries, keys and values of the hidden state: one class a way, chosen by name.

B batch, T tokens, S keys, C width, H query heads, G key/value heads, D head size, R rotary part of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.config.attention import AttentionSpec
from stackwise.model.cache import LayerCache
from stackwise.model.linear import Linear
from stackwise.model.norms import RMSNorm
from stackwise.ops.rope import apply_rope

LATENT_NORM_EPS = 1e-6
"""Of the norms on latents, in DeepSeek-V3 whatever the model's other norms have."""

Rope = tuple[Tensor, Tensor]


class Projections(ABC):
    """Names the layers that make q, k and v, and calls them. The attention holds the layers, beside ``o_proj``.

    Attributes:
        rope_dim: rotated dimensions of a query and a key; 0: none.
        qk_dim, v_dim: sizes of a query (and a key) and of a value, of one head.
    """

    def __init__(self, spec: AttentionSpec, rope_dim: int, qk_dim: int, v_dim: int) -> None:
        if spec.use_rope and (rope_dim < 2 or rope_dim % 2):
            raise ValueError(f"rotary positions need an even size; it is {rope_dim} (head size {spec.head_size})")
        self.spec, self.rope_dim, self.qk_dim, self.v_dim = spec, rope_dim, qk_dim, v_dim

    @abstractmethod
    def layers(self) -> dict[str, nn.Module]:
        """Name → layer, of all that the attention holds, with ``o_proj``."""

    @abstractmethod
    def __call__(
        self, attention: Any, x: Tensor, rope: Rope | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, ·), k and v (B, G, S, ·), rotated and mapped to features.

        Args:
            attention: holds the layers; its ``feature_map`` is applied to queries and keys.
            x: (B, T, C).
            rope: the rotary table of the positions of ``x``.
            cache: what was kept of earlier tokens; it takes what these give.
        """

    def linear(self, n_in: int, n_out: int) -> Linear:
        """A layer with a bias, where the attention has them."""
        return Linear(n_in, n_out, bias=self.spec.bias)

    def output(self) -> Linear:
        return self.linear(self.spec.n_heads * self.v_dim, self.spec.d_model)


class FullProjections(Projections):
    """One matrix each; *grouped* when ``n_kv_heads < n_heads`` (2305.13245)."""

    def __init__(self, spec: AttentionSpec) -> None:
        if spec.r_q is not None and spec.r_kv is None:
            raise ValueError(f"r_q ({spec.r_q}) without r_kv: latent attention needs the rank of keys and values")
        if spec.rope_dim is not None or spec.v_head_dim is not None:
            raise ValueError("rope_dim and v_head_dim are only used with shared latents; give r_kv")
        super().__init__(spec, spec.head_size if spec.use_rope else 0, spec.head_size, spec.head_size)

    def layers(self) -> dict[str, nn.Module]:
        spec, D = self.spec, self.qk_dim
        heads = {"q_proj": spec.n_heads, "k_proj": spec.n_kv_heads, "v_proj": spec.n_kv_heads}
        made: dict[str, nn.Module] = {name: self.linear(spec.d_model, n * D) for name, n in heads.items()}
        made["o_proj"] = self.output()
        if spec.qk_norm:
            made |= {name: RMSNorm(D, eps=spec.norm_eps) for name in ("q_norm", "k_norm")}
        return made

    def __call__(
        self, attention: Any, x: Tensor, rope: Rope | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._projected(attention, x)
        q, k, v = (t.unflatten(-1, (-1, self.qk_dim)) for t in (q, k, v))  # (B, T, heads, D)
        if self.spec.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        q, k = attention.feature_map(q), attention.feature_map(k)
        if cache is not None:
            k, v = cache.append(k, v)
        return q, k, v

    def _projected(self, attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, heads · D) each."""
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)


class SeparateLatents(FullProjections):
    """A factor of its own for each of q, k and v, of rank ``r_q``, ``r_kv`` and ``r_kv``."""

    def __init__(self, spec: AttentionSpec) -> None:
        if spec.r_q is None:
            raise ValueError(f"separate latents need r_q beside r_kv ({spec.r_kv})")
        _refuse_norms(spec)
        super().__init__(spec)

    def layers(self) -> dict[str, nn.Module]:
        spec = self.spec
        assert spec.r_q is not None and spec.r_kv is not None
        made: dict[str, nn.Module] = {}
        for name, rank, heads in (
            ("q", spec.r_q, spec.n_heads), ("k", spec.r_kv, spec.n_kv_heads), ("v", spec.r_kv, spec.n_kv_heads),
        ):  # fmt: skip
            made[f"{name}_a_proj"] = Linear(spec.d_model, rank, bias=False)
            made[f"{name}_b_proj"] = self.linear(rank, heads * self.qk_dim)
        made["o_proj"] = self.output()
        return made

    def _projected(self, attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = attention.q_b_proj(attention.q_a_proj(x))
        return q, attention.k_b_proj(attention.k_a_proj(x)), attention.v_b_proj(attention.v_a_proj(x))


class SharedLatent(Projections):
    """DeepSeek-V3's latent attention (2412.19437 §2.1.1).

    Keys and values come from one normalised latent of rank ``r_kv``, queries from one of rank ``r_q`` (or they are
    full). Positions travel in ``rope_dim`` more dimensions, whose key all heads share. A cache holds the latent and
    that key.
    """

    def __init__(self, spec: AttentionSpec) -> None:
        _refuse_norms(spec)
        if not spec.use_rope and spec.rope_dim:
            raise ValueError(f"rope_dim is {spec.rope_dim}, but use_rope is false")
        D, R = spec.head_size, 0
        if spec.use_rope:
            R = D // 4 * 2 if spec.rope_dim is None else spec.rope_dim
        super().__init__(spec, R, D + R, spec.v_head_dim or D)

    def layers(self) -> dict[str, nn.Module]:
        # The factors have no bias but where the field gives them one, before a norm (DeepSeek-V3).
        spec, n_q = self.spec, self.spec.n_heads * self.qk_dim
        assert spec.r_kv is not None
        made: dict[str, nn.Module] = {}
        if spec.r_q is None:
            made["q_proj"] = Linear(spec.d_model, n_q, bias=False)
        else:
            made["q_a_proj"] = self.linear(spec.d_model, spec.r_q)
            made["q_a_norm"] = RMSNorm(spec.r_q, eps=LATENT_NORM_EPS)
            made["q_b_proj"] = Linear(spec.r_q, n_q, bias=False)
        made["kv_a_proj"] = self.linear(spec.d_model, spec.r_kv + self.rope_dim)
        made["kv_a_norm"] = RMSNorm(spec.r_kv, eps=LATENT_NORM_EPS)
        made["kv_b_proj"] = Linear(spec.r_kv, spec.n_kv_heads * (spec.head_size + self.v_dim), bias=False)
        made["o_proj"] = self.output()
        return made

    def __call__(
        self, attention: Any, x: Tensor, rope: Rope | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        D, G, rank = self.spec.head_size, self.spec.n_kv_heads, self.spec.r_kv
        full = self.spec.r_q is None
        q = attention.q_proj(x) if full else attention.q_b_proj(attention.q_a_norm(attention.q_a_proj(x)))
        q = q.unflatten(-1, (-1, self.qk_dim)).transpose(1, 2)  # (B, H, T, D + R)
        latent = attention.kv_a_proj(x)[:, None]  # (B, 1, T, r_kv + R)
        key = latent[..., rank:]
        latent = attention.kv_a_norm(latent[..., :rank])
        if rope is not None:
            q = torch.cat((q[..., :D], apply_rope(q[..., D:], *rope)), dim=-1)
            key = apply_rope(key, *rope)
        if cache is not None:
            latent, key = cache.append(latent, key)
        kv = attention.kv_b_proj(latent.squeeze(1)).unflatten(-1, (G, D + self.v_dim)).transpose(1, 2)
        k = torch.cat((kv[..., :D], key.expand(-1, G, -1, -1)), dim=-1)
        return attention.feature_map(q), attention.feature_map(k), kv[..., D:]


def _refuse_norms(spec: AttentionSpec) -> None:
    if spec.qk_norm:
        raise ValueError("qk_norm needs full projections; latents have norms of their own")


def latent(spec: AttentionSpec) -> Projections:
    """``mla``: of the two kinds of latents, the one that the spec names."""
    if spec.latents not in ("shared", "separate"):
        raise ValueError(f"latents is {spec.latents!r}; allowed: shared, separate")
    return SharedLatent(spec) if spec.latents == "shared" else SeparateLatents(spec)
