"""Attention of one class, composed of parts: projections, positions, a feature map, then one fused kernel.

B batch, T tokens, S keys, C width, H query heads, G key/value heads, D head size, R rotary part of it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, get_args

import torch
from torch import Tensor, nn

from stackwise.config.attention import AttentionMode, AttentionSpec, KernelType
from stackwise.errors import allowed
from stackwise.kinds import ATTENTION_TYPES
from stackwise.model.attention.projections import Projections
from stackwise.model.cache import LayerCache, positions_of
from stackwise.ops.attention import attend
from stackwise.ops.kernels import KERNELS, LAPLACIAN_TIP, fourier_features
from stackwise.ops.rope import rope_rows, rope_table

if TYPE_CHECKING:
    from stackwise.config.base import StackWiseConfig


class CoreAttention(nn.Module):
    """Multi-head attention (1706.03762 §3.2), composed of parts that an ``AttentionSpec`` names.

    Projections make q, k and v (``model.attention.projections``). A kernel k(q, k) may replace the dot product: as
    *logit*, softmax(τ k(q, k)) with k approximated by random Fourier features (Rahimi and Recht 2007) after the
    rotation; as *weight*, k / Σ k, exactly (``ops.kernels``).

    Raises:
        ValueError: sizes that do not divide, and combinations that do not exist.
    """

    frequencies: Tensor | None
    o_proj: nn.Module

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        if spec.n_kv_heads < 1 or spec.n_heads % spec.n_kv_heads:
            raise ValueError(f"n_kv_heads ({spec.n_kv_heads}) must divide n_heads ({spec.n_heads})")
        if spec.projections not in ATTENTION_TYPES:
            raise ValueError(f"attention_type is {spec.projections!r}; {allowed(spec.projections, ATTENTION_TYPES)}")
        self._spec = spec
        self.n_heads, self.n_kv_heads = spec.n_heads, spec.n_kv_heads
        self.dropout, self.window = spec.dropout, spec.window
        self.set_attention_mode(spec.attention_mode)
        self.projections: Projections = ATTENTION_TYPES[spec.projections].load()(spec)
        for name, layer in self.projections.layers().items():
            self.add_module(name, layer)
        self.qk_dim, self.v_dim = self.projections.qk_dim, self.projections.v_dim
        self.rope_key = (self.projections.rope_dim, spec.rope_theta) if spec.use_rope else None
        self._set_kernel(spec)
        self.log_temperature = nn.Parameter(torch.zeros(spec.n_heads)) if spec.learned_temperature else None
        self.set_temperature()

    @property
    def spec(self) -> AttentionSpec:
        """What the layer is, in numbers, with the direction that it has now."""
        return replace(self._spec, attention_mode=self.attention_mode)

    def _set_kernel(self, spec: AttentionSpec) -> None:
        """Takes the kernel, and what it needs: bandwidth, temperature, and as logit the frequencies of its features."""
        if spec.kernel not in KERNELS:
            raise ValueError(f"kernel_type is {spec.kernel_type!r}; allowed: {', '.join(get_args(KernelType))}")
        if spec.kernel_meaning not in ("logit", "weight"):
            raise ValueError(f"kernel_meaning is {spec.kernel_meaning!r}; allowed: logit, weight")
        if spec.kernel_norm not in ("l2", "l1"):
            raise ValueError(f"kernel_norm is {spec.kernel_norm!r}; allowed: l2, l1")
        if spec.kernel_bandwidth is not None and not spec.kernel_bandwidth > 0:
            raise ValueError(f"kernel_bandwidth is {spec.kernel_bandwidth}; it must be above 0")
        self.kernel = KERNELS[spec.kernel]
        self.register_buffer("frequencies", None)
        if spec.learned_temperature and (self.kernel is None or spec.kernel_meaning == "weight"):
            raise ValueError("learned_temperature needs a kernel as logit")
        if self.kernel is None:
            return
        default = self.kernel.default_bandwidth(spec.kernel_meaning, self.qk_dim)
        self.bandwidth = default if spec.kernel_bandwidth is None else spec.kernel_bandwidth
        self.temperature = self.kernel.temperature(self.bandwidth, self.qk_dim)
        if spec.kernel_meaning == "weight":
            if self.kernel.weigh is None:
                exact = ", ".join(name for name, kernel in KERNELS.items() if kernel and kernel.weigh)
                raise ValueError(f"kernel_meaning weight is exact for {exact}; not for {spec.kernel}")
            if self.dropout and not self.kernel.drops:
                raise ValueError(f"the {spec.kernel} as weight has no dropout of attention weights; set dropout to 0")
            return
        n = spec.kernel_dim
        if n < 2 or n % 2:
            raise ValueError(f"kernel_dim is {n}; features come in pairs: an even number from 2 on")
        self.frequencies = torch.empty(n // 2, self.qk_dim)
        self.draw_frequencies(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def draw_frequencies(self, generator: torch.Generator) -> None:
        """Draws the frequencies of the features again. Only kernels as logits have any."""
        if self.frequencies is not None and self.kernel is not None:
            n = len(self.frequencies)
            self.frequencies.copy_(self.kernel.frequencies(n, self.qk_dim, self.bandwidth, generator, LAPLACIAN_TIP))

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
    def from_config(cls, config: StackWiseConfig) -> Self:
        """The attention of the first Block that ``config`` describes."""
        return cls(config.block_fields()["attention"])

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
        q, k, v = self.projections(self, x, rope, cache)
        if cache is not None and attention_mask is not None:
            attention_mask = cache.mask(attention_mask)
        out = self._attend(q, k, v, attention_mask, seen, decoding=past > 0)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, self.n_heads * self.v_dim))

    def feature_map(self, x: Tensor) -> Tensor:
        """Random features of queries or keys, where a kernel is the logit."""
        return x if self.frequencies is None else fourier_features(x, self.frequencies)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, seen: Tensor | None, *, decoding: bool
    ) -> Tensor:
        """(B, H, T, size of a value head)."""
        sight: dict[str, Any] = {
            "causal": self.attention_mode == "causal" and not decoding and seen is None,
            "key_mask": key_mask,
            "window": None if decoding else self.window,  # a cache of a local layer holds its window only
            "dropout": self.dropout if self.training else 0.0,
            "seen": seen,
        }
        if self.kernel is None:
            return attend(q, k, v, scale=self.qk_dim**-0.5, **sight)
        if self.frequencies is None:
            assert self.kernel.weigh is not None
            return self.kernel.weigh(q, k, v, self.bandwidth, **sight)
        if self.log_temperature is None:
            return attend(q, k, v, scale=self.temperature, **sight)
        return attend(q * self.log_temperature.exp().to(q.dtype)[:, None, None], k, v, scale=1.0, **sight)
