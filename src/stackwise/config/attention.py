"""The spec of one attention layer: settings and presets make it, and the layer is built from it; plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AttentionPreset = Literal[
    "gpt_style", "bert_style", "efficient_gqa", "mla_attention", "kernel_attention", "mlgka", "custom"
]
AttentionMode = Literal["causal", "bidirectional"]
Latents = Literal["shared", "separate"]
KernelType = Literal["linear", "gaussian", "laplacian", "uniform"]
KernelMeaning = Literal["logit", "weight"]
KernelNorm = Literal["l2", "l1"]


@dataclass(frozen=True)
class AttentionSpec:
    """Everything that shapes one attention layer (``model.attention.CoreAttention``).

    Attributes:
        d_model: width C.
        n_heads: query heads H.
        n_kv_heads: key/value heads G, a divisor of H.
        attention_mode: ``causal`` (a token sees itself and what is before it) or ``bidirectional``.
        dropout: of attention weights, while training.
        use_rope: rotate queries and keys by their position; else the layer knows no order.
        rope_theta: base of the rotary frequencies.
        head_dim: D; default C / H. With shared latents, the part of a key without position.
        bias: of all projections.
        qk_norm: RMSNorm over each head's q and k before the rotation (Qwen3), with ``norm_eps``.
        window: local attention: causal: a token sees itself and window − 1 before; bidirectional: window // 2 to each
            side; default all.
        r_q, r_kv: ranks of latent queries, and of latent keys and values; default: full projections.
        latents: only used with ``r_kv``: ``shared`` or ``separate`` (see ``model.attention.projections``).
        attention_type: how queries, keys and values are made, by name; default ``mla`` with ``r_kv``, else ``mha``.
        rope_dim: rotary part R of shared latents; default D / 2, made even; 0 without rotary positions.
        v_head_dim: size of a value head of shared latents; default D.
        kernel_type: ``linear`` (the dot product), ``gaussian``, ``laplacian`` or ``uniform``.
        kernel_dim: random features (even) of kernels as logits.
        kernel_meaning: ``logit`` or ``weight``.
        kernel_norm: of the laplacian's distance: ``l2``, or ``l1`` (not a function of relative positions after rotary).
        kernel_bandwidth: s; default by kernel and D.
        learned_temperature: τ of each head trains, for kernels as logits; else it keeps its first value.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    attention_mode: AttentionMode = "causal"
    dropout: float = 0.0
    use_rope: bool = True
    rope_theta: float = 10000.0
    head_dim: int | None = None
    bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-5
    window: int | None = None
    r_q: int | None = None
    r_kv: int | None = None
    latents: Latents = "shared"
    attention_type: str | None = None
    rope_dim: int | None = None
    v_head_dim: int | None = None
    kernel_type: KernelType = "linear"
    kernel_dim: int = 64
    kernel_meaning: KernelMeaning = "logit"
    kernel_norm: KernelNorm = "l2"
    kernel_bandwidth: float | None = None
    learned_temperature: bool = False

    @property
    def projections(self) -> str:
        """How queries, keys and values are made: a name in ``kinds.ATTENTION_TYPES``."""
        return self.attention_type or ("mha" if self.r_kv is None else "mla")

    @property
    def kernel(self) -> str:
        """A name in ``ops.kernels.KERNELS``."""
        return "laplacian_l1" if (self.kernel_type, self.kernel_norm) == ("laplacian", "l1") else self.kernel_type

    @property
    def head_size(self) -> int:
        """D. ValueError where neither ``head_dim`` nor a division gives it."""
        if self.head_dim is not None:
            return self.head_dim
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must divide d_model ({self.d_model}), or head_dim be given")
        return self.d_model // self.n_heads
