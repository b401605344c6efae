"""The section ``model``: sizes, attention, norms, embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from stackwise.config.attention import (
    AttentionMode,
    AttentionPreset,
    AttentionSpec,
    KernelMeaning,
    KernelNorm,
    KernelType,
    Latents,
)
from stackwise.config.section import MAX_BLOCKS, Blocks, PositiveInt, Section, Size, Stacks, as_tuple, conflict
from stackwise.kinds import ATTENTION_TYPES

if TYPE_CHECKING:
    AttentionType = str
else:
    AttentionType = Literal[tuple(ATTENTION_TYPES)]


class AttentionCustomConfig(Section):
    """Details of attention: ranks and kernels for the presets that have them, type for ``custom``, the direction."""

    attention_type: AttentionType = Field(
        "mha", description="preset custom: projections: mha (grouped when n_kv_heads < n_heads) or mla (latent)"
    )
    attention_mode: AttentionMode | None = Field(
        None, description="Direction of attention, of presets that leave it open; null: the objective's"
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


class ArchitectureConfig(Section):
    n_stacks: Stacks = Field(4, description="Number of Stacks in the whole Rack")
    blocks_per_stack: Annotated[Blocks | tuple[Blocks, ...], BeforeValidator(as_tuple)] = Field(
        2, description="Blocks (transformer layers) in each Stack, or a list with one number for each Stack id"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.blocks_per_stack, tuple) and len(self.blocks_per_stack) < self.n_stacks:
            raise conflict(
                "blocks_per_stack",
                f"has {len(self.blocks_per_stack)} entries for {self.n_stacks} Stacks (n_stacks); "
                "list one entry for each Stack",
            )
        if (total := self.blocks_before(self.n_stacks)) > MAX_BLOCKS:
            raise conflict("blocks_per_stack", f"gives {total:,} Blocks in total; allowed: at most {MAX_BLOCKS:,}")
        return self

    def blocks_of(self, stack_id: int) -> int:
        """Blocks of the Stack ``stack_id``."""
        if isinstance(self.blocks_per_stack, int):
            return self.blocks_per_stack
        if stack_id >= len(self.blocks_per_stack):
            raise ValueError(
                f"model.architecture.blocks_per_stack has no entry for Stack {stack_id}: {self.blocks_per_stack}"
            )
        return self.blocks_per_stack[stack_id]

    def blocks_before(self, stack_id: int) -> int:
        """Blocks of all Stacks with a smaller id."""
        if isinstance(self.blocks_per_stack, int):
            return self.blocks_per_stack * stack_id
        if stack_id > len(self.blocks_per_stack):
            self.blocks_of(stack_id - 1)  # raises
        return sum(self.blocks_per_stack[:stack_id])


class TokenizerEmbeddingConfig(Section):
    family: str | None = Field(
        None,
        description="Hugging Face model (a folder or a name on the hub) that provides the token embedding and the "
        "tokenizer; null: none",
    )
    embedding_option: Literal["embed_tokens", "lm_head"] | None = Field(
        None, description="Matrix taken from family: its input embedding or its head; null: embed_tokens"
    )
    freeze_embeddings: bool = Field(False, description="Keep the token embedding at its initial values")
    adapter_hidden_dim: Size | None = Field(
        None,
        description="Hidden width of the adapter from family's embedding to d_model; null: d_model, or no adapter when "
        "the widths are equal",
    )
    embedding_dim: Size | None = Field(None, description="Width of family's embedding; null: read from that model")


class ModelConfig(Section):
    fixed = "the weights of the run have its shape"

    initial: str | None = Field(
        None,
        description="Run, RUN@STEP or RUN@best: the Rack that the first phase starts from (train --from sets it); "
        "null: none",
    )
    vocab_size: Size | None = Field(None, description="Number of tokens; null: the tokenizer's")
    d_model: Size = Field(128, description="Width of the hidden state")
    n_heads: Size = Field(4, description="Query heads; must divide d_model, unless head_dim is set")
    n_kv_heads: Size | None = Field(
        None, description="Key and value heads; null: n_heads (efficient_gqa and mlgka: n_heads / 4, at least 1)"
    )
    head_dim: Size | None = Field(None, description="Size of a head; null: d_model / n_heads")
    d_ff: Size | None = Field(
        None,
        description="Width of the feed-forward layer; null: 8/3 d_model (gelu: 4 d_model), rounded up to a multiple of "
        "32",
    )
    architecture: ArchitectureConfig = ArchitectureConfig()
    attention_preset: AttentionPreset | None = Field(
        None,
        description="null: full attention in the objective's direction; gpt_style: causal; bert_style: bidirectional; "
        "the others follow the objective's direction: efficient_gqa: shared key/value heads; mla_attention: latent "
        "(DeepSeek-V3); kernel_attention: a kernel as logit; mlgka: latent, grouped, with a kernel; custom: see "
        "attention_custom",
    )
    attention_custom: AttentionCustomConfig = AttentionCustomConfig()
    qk_norm: bool = Field(False, description="RMSNorm over each head's queries and keys (Qwen3)")
    window: Annotated[Size, Field(ge=2)] | None = Field(
        None, description="Local attention: tokens in a window (bidirectional: half on each side); null: all tokens"
    )
    global_every: PositiveInt | None = Field(
        None,
        description="With window: every global_every-th Block, starting with the first, sees all tokens; null: no "
        "Block does",
    )
    local_rope_theta: Annotated[float, Field(gt=1.0)] | None = Field(
        None, description="With window: base of the rotary frequencies in local Blocks; null: rope_theta"
    )
    use_rope: bool = Field(True, description="Rotary positions on queries and keys")
    rope_theta: Annotated[float, Field(gt=1.0)] = Field(10000.0, description="Base of the rotary frequencies")
    learned_positions: Size | None = Field(
        None, description="Rows in a table of learned positions, the longest seq_len; null: no table"
    )
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="Norm of all layers: rmsnorm or layernorm")
    norm_eps: Annotated[float, Field(gt=0.0)] = Field(1e-5, description="Epsilon of the norms")
    norm_bias: bool | None = Field(None, description="Biases in LayerNorms; null: the same as bias")
    embedding_norm: bool = Field(False, description="A norm after the embedding (BERT)")
    first_attention_norm: bool = Field(
        True, description="false: no norm before the attention of the first Block (ModernBERT)"
    )
    ffn: Literal["swiglu", "geglu", "gelu", "gelu_tanh"] = Field(
        "swiglu",
        description="swiglu, geglu: gated; gelu: two matrices, no gate; gelu_tanh: gelu with GPT-2's approximation",
    )
    bias: bool = Field(False, description="Biases in linear layers")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Dropout rate after the embedding, in attention and after each residual branch"
    )
    tie_embeddings: bool = Field(False, description="The head shares the embedding's matrix (not with a frozen trunk)")
    mlm_head: bool = Field(False, description="Dense, GELU and norm before the head, and a bias on its logits (BERT)")
    freeze_up_proj: bool = Field(False, description="Keep the feed-forward's up-projections at their initial values")
    tokenizer_embedding: TokenizerEmbeddingConfig = TokenizerEmbeddingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.head_dim is None and self.d_model % self.n_heads:
            raise conflict("n_heads", f"{self.n_heads} does not divide d_model ({self.d_model})")
        if self.use_rope and self.head_size % 2 and not self._has_shared_latent:
            raise conflict(
                "n_heads" if self.head_dim is None else "head_dim",
                f"{self.n_heads if self.head_dim is None else self.head_dim} gives heads of size {self.head_size}; "
                "rotary positions (use_rope) need an even size",
            )
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise conflict("n_kv_heads", f"{self.n_kv_heads} does not divide n_heads ({self.n_heads})")
        if self.attention_preset == "efficient_gqa" and self.kv_heads == self.n_heads:
            raise conflict(
                "n_kv_heads",
                f"{self.kv_heads} equals n_heads; efficient_gqa needs fewer key/value heads "
                "(use gpt_style or bert_style for full attention)",
            )
        if self._has_shared_latent and self.use_rope and self.shared_rope_dim % 2:
            raise conflict(
                "attention_custom.mla_rope_dim", f"{self.shared_rope_dim} is odd; rotary positions need an even number"
            )
        if self._has_shared_latent and self.use_rope and self.shared_rope_dim < 2:
            raise conflict(
                "attention_custom.mla_rope_dim",
                f"null gives {self.shared_rope_dim} rotary dimensions for heads of size {self.head_size}; "
                "set an even number",
            )
        if self.qk_norm and self.latents is not None:
            raise conflict(
                "qk_norm",
                f"true cannot be combined with latent attention, which has its own norms "
                f"(attention_preset is {self.attention_preset})",
            )
        self._check_kernel()
        if self.norm_bias and self.norm == "rmsnorm":
            raise conflict("norm_bias", "true requires norm: layernorm, because RMSNorm has no bias (norm is rmsnorm)")
        return self

    def _check_kernel(self) -> None:
        custom, kernel = self.attention_custom, self.kernel_type
        if kernel == "linear" and self.attention_preset in ("kernel_attention", "mlgka"):
            raise conflict(
                "attention_custom.kernel_type",
                f"'linear' means attention without a kernel, but {self.attention_preset} needs one; "
                "allowed: gaussian, laplacian, uniform",
            )
        if custom.kernel_dim is not None and custom.kernel_dim % 2:
            raise conflict(
                "attention_custom.kernel_dim",
                f"{custom.kernel_dim} is odd; random features come in pairs, so the number must be even",
            )
        if custom.kernel_meaning == "weight" and kernel != "linear":
            if kernel == "uniform" or custom.kernel_norm == "l1":
                raise conflict(
                    "attention_custom.kernel_meaning",
                    f"'weight' requires the gaussian kernel, or the laplacian with kernel_norm: l2 (kernel_type is "
                    f"{kernel}, kernel_norm is {custom.kernel_norm})",
                )
            if kernel == "laplacian" and self.dropout:
                raise conflict(
                    "dropout", f"{self.dropout} cannot be combined with the laplacian kernel as weight; set dropout: 0"
                )

    @property
    def kv_heads(self) -> int:
        if self.n_kv_heads is not None:
            return self.n_kv_heads
        if self.attention_preset in ("efficient_gqa", "mlgka"):
            wanted = max(1, self.n_heads // 4)
            return max(n for n in range(1, wanted + 1) if self.n_heads % n == 0)
        return self.n_heads

    @property
    def head_size(self) -> int:
        return self.head_dim if self.head_dim is not None else self.d_model // self.n_heads

    @property
    def ff_width(self) -> int:
        if self.d_ff is not None:
            return self.d_ff
        return -(-8 * self.d_model // 96) * 32 if self.ffn in ("swiglu", "geglu") else -(-self.d_model // 8) * 32

    @property
    def latents(self) -> Latents | None:
        """How keys and values are latent, or ``None`` where they are not."""
        custom = self.attention_custom
        match self.attention_preset:
            case "mla_attention":
                return custom.mla_latents or "shared"
            case "mlgka":
                return custom.mla_latents or "separate"
            case "custom" if ATTENTION_TYPES[custom.attention_type].latent:
                return custom.mla_latents or "shared"
        return None

    @property
    def _has_shared_latent(self) -> bool:
        return self.latents == "shared"

    @property
    def shared_rope_dim(self) -> int:
        """Rotary dimensions beside each head, with shared latents."""
        wanted = self.attention_custom.mla_rope_dim
        return wanted if wanted is not None else self.head_size // 4 * 2

    @property
    def latent_ranks(self) -> tuple[int | None, int | None]:
        """Ranks of queries, and of keys and values; ``None`` where they are full."""
        if self.latents is None:
            return None, None
        custom, quarter = self.attention_custom, max(1, self.d_model // 4)
        full_queries = self.attention_preset == "custom" and self.latents == "shared"
        r_q = custom.mla_rq if custom.mla_rq is not None else (None if full_queries else quarter)
        return r_q, custom.mla_rkv if custom.mla_rkv is not None else quarter

    @property
    def kernel_type(self) -> KernelType:
        match self.attention_preset:
            case "kernel_attention":
                return self.attention_custom.kernel_type or "gaussian"
            case "mlgka":
                return self.attention_custom.kernel_type or "laplacian"
            case "custom":
                return self.attention_custom.kernel_type or "linear"
        return "linear"

    def attention(self, mode: AttentionMode, local: bool = True) -> AttentionSpec:
        """Attention in a direction; ``local``: within ``window``, where there is one."""
        custom, (r_q, r_kv), local = self.attention_custom, self.latent_ranks, local and self.window is not None
        implied = "mha" if r_kv is None else "mla"
        chosen = custom.attention_type if self.attention_preset == "custom" else implied
        return AttentionSpec(
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_kv_heads=self.kv_heads,
            attention_mode=mode,
            dropout=self.dropout,
            use_rope=self.use_rope,
            rope_theta=self.local_rope_theta or self.rope_theta if local else self.rope_theta,
            head_dim=self.head_dim,
            bias=self.bias,
            qk_norm=self.qk_norm,
            norm_eps=self.norm_eps,
            window=self.window if local else None,
            r_q=r_q,
            r_kv=r_kv,
            latents=self.latents or "shared",
            attention_type=None if chosen == implied else chosen,
            rope_dim=custom.mla_rope_dim,
            v_head_dim=custom.mla_v_head_dim,
            kernel_type=self.kernel_type,
            kernel_dim=custom.kernel_dim or AttentionSpec.kernel_dim,
            kernel_meaning=custom.kernel_meaning,
            kernel_norm=custom.kernel_norm,
            kernel_bandwidth=custom.kernel_bandwidth,
            learned_temperature=custom.learned_temperature,
        )

    @property
    def has_head(self) -> bool:
        """Whether the head has parameters of its own."""
        return self.mlm_head or not self.tie_embeddings

    @property
    def norm_has_bias(self) -> bool:
        return self.norm == "layernorm" and (self.bias if self.norm_bias is None else self.norm_bias)
