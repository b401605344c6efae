"""Attention: the section ``model.attention_custom``, and the spec that settings and presets make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from stackwise.config.section import Section, Size

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
    rope_dim: int | None = None
    v_head_dim: int | None = None
    kernel_type: KernelType = "linear"
    kernel_dim: int = 64
    kernel_meaning: KernelMeaning = "logit"
    kernel_norm: KernelNorm = "l2"
    kernel_bandwidth: float | None = None
    learned_temperature: bool = False

    @property
    def projections(self) -> Literal["full", "shared", "separate"]:
        """How queries, keys and values are made: a name in ``model.attention.projections.PROJECTIONS``."""
        return "full" if self.r_kv is None else self.latents

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


class AttentionCustomConfig(Section):
    """Details of attention: ranks and kernels for the presets that have them, type and mode for ``custom``."""

    attention_type: Literal["mha", "mla"] = Field(
        "mha", description="preset custom: projections: mha (grouped when n_kv_heads < n_heads) or mla (latent)"
    )
    attention_mode: AttentionMode | None = Field(
        None, description="preset custom: direction of attention; null: the objective's"
    )
    mla_rq: Size | None = Field(
        None,
        description="Rank of latent queries; null: d_model / 4, or full queries for preset custom with shared latents",
    )
    mla_rkv: Size | None = Field(None, description="Rank of latent keys and values; null: d_model / 4")
    mla_latents: Latents | None = Field(
        None,
        description="shared: one latent for keys and values, plus a rotary key (DeepSeek-V3); separate: a low-rank "
        "factor for each of q, k and v; null: separate for mlgka, else shared",
    )
    mla_rope_dim: Size | None = Field(
        None, description="Rotary dimensions of each head with shared latents; null: half the head size"
    )
    mla_v_head_dim: Size | None = Field(
        None, description="Size of each value head with shared latents; null: the head size"
    )
    kernel_type: KernelType | None = Field(
        None,
        description="Kernel between queries and keys; null: gaussian for kernel_attention, laplacian for mlgka, linear "
        "for custom",
    )
    kernel_dim: Annotated[Size, Field(ge=2)] | None = Field(
        None, description="kernel_meaning logit: number of random features, even; null: 64"
    )
    kernel_meaning: KernelMeaning = Field(
        "logit",
        description="logit: softmax over the kernel's values; weight: those values themselves, normalised (exact)",
    )
    kernel_norm: KernelNorm = Field(
        "l2",
        description="Distance in the laplacian kernel; with rotary positions, l1 depends on more than relative "
        "positions",
    )
    kernel_bandwidth: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Bandwidth s of the kernel; null: derived from the head size"
    )
    learned_temperature: bool = Field(False, description="kernel_meaning logit: learn a temperature for each head")
