"""What a run is: every setting, its type, its range and its only default.

The classes are frozen: a config is data. ``None`` means "derived", and the description says from what.
The description of a field is its documentation: ``stackwise init`` writes it as the comment beside the key.
"""

from __future__ import annotations

import math
import reprlib
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(ge=1, le=1 << 53)]
Size = Annotated[int, Field(ge=1, le=1 << 24)]
"""Of a tensor along one dimension."""
Stacks = Annotated[int, Field(ge=1, le=256)]
MAX_BLOCKS = 10_000
"""More layers than any model has."""
Blocks = Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _tuple(value: Any) -> Any:
    """YAML has lists only; frozen configs hold tuples."""
    return tuple(value) if isinstance(value, list) else value


def _tuples(value: Any) -> Any:
    """The same, one level down too."""
    return tuple(_tuple(part) for part in value) if isinstance(value, list) else value


class Section(BaseModel):
    """Base of every config section: typed strictly, frozen, closed to unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    alternatives: ClassVar[tuple[str, ...]] = ()
    """Keys of which at most one is set; overriding one clears the others."""

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        """A section whose keys are all commented out is null in YAML: every key takes its default."""
        return {} if value is None else value


def conflict(key: str, message: str) -> PydanticCustomError:
    """An impossible combination, reported at ``key`` (dotted, relative to the section that raises)."""
    return PydanticCustomError("conflict", "{problem}", {"key": key, "problem": message})


class ArchitectureConfig(Section):
    n_stacks: Stacks = Field(4, description="Stacks of the whole Rack")
    blocks_per_stack: Annotated[Blocks | tuple[Blocks, ...], BeforeValidator(_tuple)] = Field(
        2, description="Blocks (transformer layers) in each Stack, or a list: one number for each Stack's id"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.blocks_per_stack, tuple) and len(self.blocks_per_stack) < self.n_stacks:
            raise conflict(
                "blocks_per_stack",
                f"has {len(self.blocks_per_stack)} entries for {self.n_stacks} Stacks (n_stacks); give one a Stack",
            )
        if (total := self.blocks_before(self.n_stacks)) > MAX_BLOCKS:
            raise conflict("blocks_per_stack", f"makes {total:,} Blocks in all; allowed: at most {MAX_BLOCKS:,}")
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


class AttentionCustomConfig(Section):
    """Details of attention: ranks and kernels for the presets that have them, type and mode for ``custom``."""

    attention_type: Literal["mha", "mla"] = Field(
        "mha", description="custom: projections: mha (grouped when n_kv_heads < n_heads) or mla (latent)"
    )
    attention_mode: Literal["causal", "bidirectional"] | None = Field(
        None, description="custom: null: causal for clm, bidirectional for mlm"
    )
    mla_rq: Size | None = Field(
        None, description="Rank of latent queries; null: d_model / 4 (custom and shared latents: queries are full)"
    )
    mla_rkv: Size | None = Field(None, description="Rank of latent keys and values; null: d_model / 4")
    mla_latents: Literal["shared", "separate"] | None = Field(
        None,
        description="shared: one latent for keys and values and a rotary key beside it (DeepSeek-V3); "
        "separate: a factor for each of q, k, v; null: shared, for mlgka separate",
    )
    mla_rope_dim: Size | None = Field(
        None, description="Rotary dimensions beside each head of shared latents; null: half the head size"
    )
    mla_v_head_dim: Size | None = Field(None, description="Size of a value head of shared latents; null: the head size")
    kernel_type: Literal["linear", "gaussian", "laplacian", "uniform"] | None = Field(
        None, description="Kernel of queries and keys; null: kernel_attention gaussian, mlgka laplacian, custom linear"
    )
    kernel_dim: Annotated[Size, Field(ge=2)] | None = Field(
        None, description="Random features of kernels as logits, an even number; null: 64"
    )
    kernel_meaning: Literal["logit", "weight"] = Field(
        "logit", description="logit: softmax over the kernel; weight: the kernel itself, normalised (exact)"
    )
    kernel_norm: Literal["l2", "l1"] = Field(
        "l2", description="Distance of the laplacian; l1 is not a function of relative positions after rotary ones"
    )
    kernel_bandwidth: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Bandwidth s of the kernel; null: from the head size"
    )
    learned_temperature: bool = Field(False, description="Kernels as logits: each head's temperature trains")


class TokenizerEmbeddingConfig(Section):
    family: str | None = Field(
        None,
        description="A Hugging Face model, a folder or a name on the hub, whose token table and tokenizer are taken; "
        "null: none",
    )
    embedding_option: Literal["embed_tokens", "lm_head"] | None = Field(
        None, description="The matrix of family to take: its input's or its head's; null: embed_tokens"
    )
    freeze_embeddings: bool = Field(False, description="Keep the token embedding at its initial values")
    adapter_hidden_dim: Size | None = Field(
        None,
        description="Hidden width of the adapter from family's table to d_model; null: d_model, and no adapter where "
        "the table has that width",
    )
    embedding_dim: Size | None = Field(None, description="Width of family's table; null: read there")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.family is None:
            for key in ("embedding_option", "adapter_hidden_dim", "embedding_dim"):
                if getattr(self, key) is not None:
                    raise conflict(key, f"{getattr(self, key)!r} is only read beside family, which is null")
        return self


AttentionPreset = Literal[
    "gpt_style", "bert_style", "efficient_gqa", "mla_attention", "kernel_attention", "mlgka", "custom"
]

DEFAULT_KERNEL_DIM = 64
"""Random features where ``kernel_dim`` is null."""

_WITH_LATENTS = ("mla_attention", "mlgka", "custom")
_WITH_KERNELS = ("kernel_attention", "mlgka", "custom")


class ModelConfig(Section):
    initial: str | None = Field(
        None, description="A run whose Rack is there before the first phase (train --from sets it); null: none"
    )
    vocab_size: Size | None = Field(None, description="null: the tokenizer's")
    d_model: Size = Field(128, description="Width of the hidden state")
    n_heads: Size = Field(4, description="Query heads; must divide d_model, unless head_dim is set")
    n_kv_heads: Size | None = Field(
        None, description="Key and value heads; null: n_heads (efficient_gqa and mlgka: n_heads / 4, at least 1)"
    )
    head_dim: Size | None = Field(None, description="Size of a head; null: d_model / n_heads")
    d_ff: Size | None = Field(
        None, description="Width of the feed-forward; null: 8/3 d_model (gelu: 4 d_model), rounded up to 32"
    )
    architecture: ArchitectureConfig = ArchitectureConfig()
    attention_preset: AttentionPreset | None = Field(
        None,
        description="null: full attention in the direction that the objective needs; gpt_style: causal; bert_style: "
        "bidirectional; the others in the objective's direction too: efficient_gqa: shared key/value heads; "
        "mla_attention: latent (DeepSeek-V3); kernel_attention: a kernel as logit; mlgka: latent, grouped and kernel; "
        "custom: see attention_custom",
    )
    attention_custom: AttentionCustomConfig = AttentionCustomConfig()
    qk_norm: bool = Field(False, description="RMSNorm over each head's queries and keys (Qwen3)")
    window: Annotated[Size, Field(ge=2)] | None = Field(
        None, description="Local attention: tokens in a window (bidirectional: half to each side); null: all tokens"
    )
    global_every: PositiveInt | None = Field(
        None, description="With window: every so many Blocks, from the first on, see all tokens; null: none does"
    )
    local_rope_theta: Annotated[float, Field(gt=1.0)] | None = Field(
        None, description="Base of the rotary frequencies of local Blocks; null: rope_theta"
    )
    use_rope: bool = Field(True, description="Rotary positions on queries and keys")
    rope_theta: Annotated[float, Field(gt=1.0)] = Field(10000.0, description="Base of the rotary frequencies")
    learned_positions: Size | None = Field(
        None, description="Rows of a learned table of positions, the longest sequence; null: no table"
    )
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="rmsnorm or layernorm, everywhere")
    norm_eps: Annotated[float, Field(gt=0.0)] = Field(1e-5, description="Epsilon of the norms")
    norm_bias: bool | None = Field(None, description="LayerNorms have biases; null: as bias says")
    embedding_norm: bool = Field(False, description="A norm after the embedding (BERT)")
    first_attention_norm: bool = Field(
        True, description="false: attention of the very first Block reads its input without a norm (ModernBERT)"
    )
    ffn: Literal["swiglu", "geglu", "gelu", "gelu_tanh"] = Field(
        "swiglu", description="swiglu, geglu: gated; gelu: two matrices; gelu_tanh: with GPT-2's approximation"
    )
    bias: bool = Field(False, description="Linear layers have biases")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="After the embedding, in attention and after each residual branch"
    )
    tie_embeddings: bool = Field(False, description="Head shares the embedding's matrix (not with a frozen trunk)")
    mlm_head: bool = Field(False, description="Dense, GELU and norm before the head, and a bias on its logits (BERT)")
    freeze_up_proj: bool = Field(False, description="Keep the feed-forward's up-projections at their initial values")
    tokenizer_embedding: TokenizerEmbeddingConfig = TokenizerEmbeddingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        custom = self.attention_custom
        if self.head_dim is None and self.d_model % self.n_heads:
            raise conflict("n_heads", f"{self.n_heads} does not divide d_model ({self.d_model})")
        if self.use_rope and self.head_size % 2 and not self._has_shared_latent:
            raise conflict(
                "n_heads" if self.head_dim is None else "head_dim",
                f"{self.n_heads if self.head_dim is None else self.head_dim} gives heads of odd size {self.head_size}; "
                "rotary positions (use_rope) need an even one",
            )
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise conflict("n_kv_heads", f"{self.n_kv_heads} does not divide n_heads ({self.n_heads})")
        if self.attention_preset == "efficient_gqa" and self.kv_heads == self.n_heads:
            raise conflict(
                "n_kv_heads",
                f"{self.kv_heads} equals n_heads; efficient_gqa needs fewer key/value heads "
                "(use gpt_style or bert_style for full attention)",
            )
        preset = self.attention_preset
        self._read_by(_WITH_LATENTS, "mla_rq", "mla_rkv", "mla_latents", "mla_rope_dim", "mla_v_head_dim")
        self._read_by(
            _WITH_KERNELS, "kernel_type", "kernel_dim", "kernel_meaning", "kernel_norm", "kernel_bandwidth",
            "learned_temperature",
        )  # fmt: skip
        self._read_by(("custom",), "attention_type", "attention_mode")
        if preset == "custom" and custom.attention_type == "mha":
            for key in ("mla_rq", "mla_rkv", "mla_latents", "mla_rope_dim", "mla_v_head_dim"):
                if getattr(custom, key) is not None:
                    raise conflict(
                        f"attention_custom.{key}",
                        f"{getattr(custom, key)!r} is read when attention_type is mla (it is mha)",
                    )
        if self.latents != "shared":
            for key in ("mla_rope_dim", "mla_v_head_dim"):
                if getattr(custom, key) is not None:
                    raise conflict(f"attention_custom.{key}", f"{getattr(custom, key)} is of shared latents")
        if self._has_shared_latent and self.use_rope and self.shared_rope_dim % 2:
            raise conflict(
                "attention_custom.mla_rope_dim", f"{self.shared_rope_dim} is odd; rotary positions need pairs"
            )
        if self._has_shared_latent and self.use_rope and self.shared_rope_dim < 2:
            raise conflict(
                "attention_custom.mla_rope_dim",
                f"null gives {self.shared_rope_dim} for heads of size {self.head_size}; set it",
            )
        if self._has_shared_latent and not self.use_rope and custom.mla_rope_dim is not None:
            raise conflict("attention_custom.mla_rope_dim", f"{custom.mla_rope_dim} is not read when use_rope is false")
        if self.qk_norm and self.latents is not None:
            raise conflict("qk_norm", "true goes with full projections; latents have norms of their own")
        self._check_kernel()
        if self.window is None and (self.global_every is not None or self.local_rope_theta is not None):
            key = "global_every" if self.global_every is not None else "local_rope_theta"
            raise conflict(key, f"{getattr(self, key):g} is only read beside window, which is null")
        if self.norm_bias and self.norm == "rmsnorm":
            raise conflict("norm_bias", "true, but RMSNorm has no bias; set norm: layernorm")
        return self

    def _read_by(self, presets: tuple[str, ...], *keys: str) -> None:
        """Refuses details that the attention preset would not read."""
        if self.attention_preset in presets:
            return
        for key in keys:
            value = getattr(self.attention_custom, key)
            if value != type(self.attention_custom).model_fields[key].default:
                preset = self.attention_preset or "null"
                wanted = f"when attention_preset is {presets[0]} (it is {preset})"
                if len(presets) > 1:
                    wanted = f"by the presets {', '.join(presets)} (attention_preset is {preset})"
                raise conflict(f"attention_custom.{key}", f"{value!r} is read {wanted}")

    def _check_kernel(self) -> None:
        custom, kernel = self.attention_custom, self.kernel_type
        if kernel == "linear":
            for key in ("kernel_dim", "kernel_bandwidth"):
                if getattr(custom, key) is not None:
                    raise conflict(
                        f"attention_custom.{key}", f"{getattr(custom, key)} is of kernels; kernel_type is linear"
                    )
            if self.attention_preset in ("kernel_attention", "mlgka"):
                raise conflict(
                    "attention_custom.kernel_type",
                    f"'linear' is no kernel, and {self.attention_preset} is named for one; "
                    "allowed: gaussian, laplacian, uniform",
                )
        if custom.learned_temperature and (kernel == "linear" or custom.kernel_meaning == "weight"):
            raise conflict("attention_custom.learned_temperature", "true goes with kernels as logits")
        if custom.kernel_dim is not None and custom.kernel_dim % 2:
            raise conflict("attention_custom.kernel_dim", f"{custom.kernel_dim} is odd; features come in pairs")
        if custom.kernel_meaning == "weight":
            if kernel not in ("gaussian", "laplacian") or custom.kernel_norm == "l1":
                raise conflict(
                    "attention_custom.kernel_meaning",
                    f"'weight' is exact for gaussian and the l2 laplacian; not for {kernel} ({custom.kernel_norm})",
                )
            if custom.kernel_dim is not None:
                raise conflict(
                    "attention_custom.kernel_dim", f"{custom.kernel_dim}, but kernels as weights use no features"
                )
            if kernel == "laplacian" and self.dropout:
                raise conflict("dropout", f"{self.dropout} cannot drop weights of the laplacian; set it to 0")

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
    def latents(self) -> Literal["shared", "separate"] | None:
        """How keys and values are latent, or ``None`` where they are not."""
        custom = self.attention_custom
        match self.attention_preset:
            case "mla_attention":
                return custom.mla_latents or "shared"
            case "mlgka":
                return custom.mla_latents or "separate"
            case "custom" if custom.attention_type == "mla":
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
    def kernel_type(self) -> Literal["linear", "gaussian", "laplacian", "uniform"]:
        match self.attention_preset:
            case "kernel_attention":
                return self.attention_custom.kernel_type or "gaussian"
            case "mlgka":
                return self.attention_custom.kernel_type or "laplacian"
            case "custom":
                return self.attention_custom.kernel_type or "linear"
        return "linear"

    @property
    def has_head(self) -> bool:
        """Whether the head has parameters of its own."""
        return self.mlm_head or not self.tie_embeddings

    @property
    def norm_has_bias(self) -> bool:
        return self.norm == "layernorm" and (self.bias if self.norm_bias is None else self.norm_bias)


class OptimizerConfig(Section):
    optimizer_type: Literal["adamw", "muon", "sgd"] = Field(
        "adamw", description="adamw; muon: on the matrices of Stacks, AdamW on the rest; sgd: with momentum"
    )
    lr: Annotated[float, Field(gt=0.0)] = Field(1e-3, description="Peak learning rate")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        0.1, description="Decay of matrices (adamw, muon: decoupled); vectors are not decayed"
    )
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]],
        BeforeValidator(_tuple),
    ] = Field((0.9, 0.95), description="AdamW: decay rates of the two moments")
    eps: Annotated[float, Field(gt=0.0)] = Field(1e-8, description="AdamW: added to the root of the second moment")
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None, description="muon, sgd: null: 0.95 for muon, 0.9 for sgd"
    )
    moments: Literal["float32", "bfloat16", "int8"] = Field(
        "float32", description="AdamW: storage of the two moments: 8, 4 or 2 bytes a weight"
    )
    in_backward: bool = Field(
        False,
        description="Update each parameter inside the backward pass, so that gradients never exist all at once (with "
        "micro-batches they still add up); needs grad_clip: null",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        readers = {"betas": ("adamw", "muon"), "eps": ("adamw", "muon"), "moments": ("adamw", "muon")}
        for key, types in {**readers, "momentum": ("muon", "sgd")}.items():
            value = getattr(self, key)
            if self.optimizer_type not in types and value != type(self).model_fields[key].default:
                shown = list(value) if isinstance(value, tuple) else value
                raise conflict(
                    key, f"{shown!r} is read by {' and '.join(types)} (optimizer_type is {self.optimizer_type})"
                )
        return self


class ScheduleConfig(Section):
    kind: Literal["wsd", "cosine", "constant"] = Field(
        "wsd", description="wsd: warm-up, stable, linear decay; cosine: warm-up, cosine decay"
    )
    warmup_steps: Annotated[int, Field(ge=0, le=1 << 53)] = Field(50, description="Linear warm-up of the first phase")
    rewarmup_steps: Annotated[int, Field(ge=0, le=1 << 53)] = Field(
        20, description="Linear warm-up at the start of every later phase"
    )
    decay_fraction: Fraction = Field(0.2, description="wsd: share of the steps, at the end, that decay")
    min_lr_ratio: Fraction = Field(0.1, description="Final learning rate as a share of the peak")
    span: Literal["run", "phase"] = Field("run", description="Decay once over the whole run, or within every phase")


ObjectiveName = Literal["clm", "mlm", "diffusion", "custom", "classification"]
PrecisionName = Literal["full", "half", "bfloat16", "fp8", "int8", "nf4", "nvfp4"]
TRAINABLE_PRECISIONS = ("full", "bfloat16")
"""Storage of weights that can train: the others are too coarse for an update, or (half) would need loss scaling."""


class ProgressiveConfig(Section):
    target_stacks: Stacks | None = Field(None, description="Stacks to grow to; null: model.architecture.n_stacks")
    building_mode: Literal["append", "prepend", "interleave"] = Field(
        "append",
        description="New Stacks go to the right (append) or to the left (prepend) of the trunk, or (interleave) all at "
        "once between the Stacks of model.initial",
    )
    trunk_strategy: Literal["frozen", "qlora", "trainable"] = Field(
        "trainable",
        description="The Stacks already trained, when a new one is added: frozen, qlora (frozen, their adapters train; "
        "see qlora) or trainable",
    )
    new_stack_precision: PrecisionName = Field(
        "full",
        description="How a new Stack's matrices are stored: full (fp32) or bfloat16; the others (half, fp8, int8, nf4, "
        "nvfp4) freeze them, and the Stack's adapters train (qlora.enabled)",
    )
    trunk_precision: PrecisionName = Field(
        "full", description="How the matrices of a frozen trunk are stored: full, half, bfloat16, fp8, int8, nf4, nvfp4"
    )
    new_stack_init: Literal["random", "identity", "copy"] = Field(
        "copy", description="copy: of the neighbouring Stack; identity: zero residual outputs"
    )
    optimizer_state: Literal["keep", "reset", "copy"] = Field(
        "keep",
        description="Moments at growth: keep for what goes on training, reset all, "
        "or keep and copy the source's to a copied Stack",
    )
    phase_fractions: Annotated[tuple[Fraction, ...], BeforeValidator(_tuple)] | None = Field(
        None, description="Share of the budget for each Stack's phase, in order; null: equal shares"
    )
    joint_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Share of the budget for a last phase that trains everything"
    )
    cache_activations: bool = Field(
        False, description="append on a frozen trunk: run it once, and feed each new Stack from disk (see cache)"
    )
    time_interpretation: Literal["depth", "input"] | None = Field(
        None,
        description="Of diffusion: depth: each Stack has an interval of noise levels (see diffusion); input: Blocks "
        "are conditioned on the noise level; null: the model is not told",
    )
    training_objective: ObjectiveName = Field(
        "clm",
        description="clm: next token; mlm: masked tokens; diffusion: masked tokens at every rate, a bound on the "
        "likelihood (mlm and diffusion need bidirectional attention); custom: targets in the batches of a data loader, "
        "classification: the class of each sequence there (both from Python)",
    )


class PhaseConfig(Section):
    """An entry of ``training.phases``: add, trains, sweep or unfreeze. The final norm and the head always train."""

    add: PositiveInt | Literal["rest", "each"] | None = Field(
        None, description="So many Stacks join; rest: all that are left, at once; each: all that are left, one a phase"
    )
    at: Literal["right", "left", "middle", "between"] = Field("right", description="add: where they join")
    init: Literal["random", "identity", "copy"] | None = Field(
        None, description="add: null: training.progressive.new_stack_init"
    )
    trunk: Literal["frozen", "qlora", "trainable"] | None = Field(
        None, description="add: what the Stacks that are there do; null: training.progressive.trunk_strategy"
    )
    precision: PrecisionName | None = Field(
        None, description="add: storage of a frozen trunk; null: training.progressive.trunk_precision"
    )
    trains: (
        Literal["all"]
        | Annotated[
            tuple[Annotated[int, Field(ge=0)] | Literal["embedding"], ...],
            BeforeValidator(_tuple),
        ]
        | None
    ) = Field(None, description="all, or a list of Stacks' ids (and embedding) that train together")
    sweep: Literal["left_to_right", "right_to_left"] | None = Field(
        None, description="One unit after another trains, the rest frozen"
    )
    cycles: Annotated[int, Field(ge=1, le=1000)] = Field(1, description="sweep: how often")
    unit: Literal["stack", "block"] = Field("stack", description="sweep: stack or block")
    group: PositiveInt = Field(1, description="sweep: neighbouring Stacks that train together")
    unfreeze: Literal["right_to_left", "left_to_right"] | None = Field(
        None, description="The last Stack trains (or the first one), then one more in each phase, then everything"
    )
    share: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="Of the budget; null: an equal part of what the others leave"
    )
    objective: Literal["clm", "mlm", "diffusion"] | None = Field(
        None,
        description="clm, mlm or diffusion, in this entry's phases; null: training.progressive.training_objective. The "
        "run is scored and used by that of the last entry",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        kinds = [key for key in ("add", "trains", "sweep", "unfreeze") if getattr(self, key) is not None]
        if len(kinds) != 1:
            what = f"both {kinds[0]} and {kinds[1]}" if kinds else "none of them"
            raise conflict(
                kinds[1] if kinds else "add", f"an entry has one of add, trains, sweep, unfreeze; here {what}"
            )
        readers = {
            "at": "add", "init": "add", "trunk": "add", "precision": "add",
            "cycles": "sweep", "unit": "sweep", "group": "sweep",
        }  # fmt: skip
        for key, reader in readers.items():
            if getattr(self, key) != type(self).model_fields[key].default and reader != kinds[0]:
                raise conflict(key, f"{getattr(self, key)!r} is read beside {reader}, not beside {kinds[0]}")
        if self.unit == "block" and self.group != 1:
            raise conflict("group", f"{self.group} is of Stacks; unit is block")
        return self


class MaskingConfig(Section):
    """Masked language modelling (BERT, 1810.04805 §3.1)."""

    rate: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.15, description="Share of tokens to predict")
    max_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="Each sequence has a rate of its own, evenly between rate and this; null: all have rate"
    )
    stack_rates: Annotated[
        tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...], BeforeValidator(_tuple)
    ] | None = Field(
        None, description="strategy progressive: the rate while each Stack is the new one, in order (a first time for "
        "high rates, a last one for low ones); rate holds in a joint phase and where the run is scored; null: rate"
    )  # fmt: skip
    unit: Literal["token", "word", "span"] = Field(
        "token", description="What is masked or left as a whole; word: needs a tokenizer that marks words"
    )
    span_length: Annotated[float, Field(ge=1.0)] = Field(3.0, description="unit span: mean length, in tokens")
    mask_share: Fraction = Field(0.8, description="Of those, the share replaced by the mask token")
    random_share: Fraction = Field(0.1, description="Of those, the share replaced by a random token")

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.mask_share + self.random_share > 1.0:
            raise conflict(
                "random_share",
                f"{self.random_share} plus mask_share ({self.mask_share}) is above 1",
            )
        if self.max_rate is not None and self.max_rate < self.rate:
            raise conflict("max_rate", f"{self.max_rate} is below rate ({self.rate})")
        if self.stack_rates is not None and self.max_rate is not None:
            raise conflict("stack_rates", f"{list(self.stack_rates)} and max_rate ({self.max_rate}) are both set")
        if self.span_length != type(self).model_fields["span_length"].default and self.unit != "span":
            raise conflict("span_length", f"{self.span_length:g} is read when unit is span (it is {self.unit})")
        return self


class DiffusionConfig(Section):
    """Masked diffusion (MDLM 2406.07524, LLaDA 2502.09992): tokens masked at every rate, weighted to bound −log p."""

    weighting: Literal["stratified", "exact_counts"] = Field(
        "stratified",
        description="stratified: rates spread evenly over the batch, weight 1/rate; exact_counts: so many tokens "
        "masked exactly, and their plain mean",
    )
    weight_power: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        1.0,
        description="Training weighs rates by 1/rate to this power: 1: the loss is the bound; 0: all masked tokens "
        "count alike; between them gradients are less noisy and short runs learn faster. Scores are always the bound",
    )
    min_rate: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(1e-3, description="stratified: the lowest rate")
    block_length: Size | None = Field(
        None,
        description="Block diffusion (BD3-LM 2503.09573): blocks of so many tokens come left to right, each by "
        "diffusion given those before; must divide seq_len; null: all tokens are one block",
    )
    depth_variant: Literal["experts", "suffix", "prefix"] = Field(
        "experts",
        description="time_interpretation depth, Stack k of K and its interval, the first the noisiest: experts: Stack "
        "k alone; suffix: Stacks k to K; prefix: one pass, in which each Stack reveals some tokens to the next",
    )
    levels: (
        Literal["linear", "cosine", "exponential", "equal_difficulty"]
        | Annotated[tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...], BeforeValidator(_tuple)]
    ) = Field(
        "linear",
        description="time_interpretation depth: where the intervals meet: linear (equal probability), cosine, "
        "exponential, equal_difficulty (see difficulty), or a list of K + 1 rates from 1 down to 0",
    )
    difficulty: Annotated[tuple[tuple[float, float], ...], BeforeValidator(_tuples)] | None = Field(
        None, description="equal_difficulty: pairs (rate, cross-entropy there), as eval prints them"
    )
    expert: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="depth_variant experts, grown on a frozen trunk: train this Stack alone: 0 with what all share, "
        "the others from a run of 0 (train --from), each in a process of its own; stackwise join puts them together",
    )
    condition: Literal["rate", "masked"] = Field(
        "rate",
        description="time_interpretation input: the rate drawn, or the share that is masked of the tokens that can be "
        "(all but special ones)",
    )
    time_embedding: Literal["sinusoidal", "learned"] = Field(
        "sinusoidal", description="time_interpretation input: how the noise level becomes a vector"
    )
    time_dim: Annotated[Size, Field(ge=2, multiple_of=2)] = Field(
        64, description="time_interpretation input: width of that vector"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.levels == "equal_difficulty") != (self.difficulty is not None):
            if self.difficulty is None:
                raise conflict(
                    "difficulty", "must be given when levels is equal_difficulty: pairs (rate, cross-entropy)"
                )
            raise conflict("difficulty", f"is read when levels is equal_difficulty (it is {self.levels!r})")
        if self.difficulty is not None:
            rates = [rate for rate, _ in self.difficulty]
            fits = all(0 <= rate <= 1 and nats > 0 for rate, nats in self.difficulty)
            if not rates or len(set(rates)) < len(rates) or not fits:
                shown = [list(pair) for pair in self.difficulty]
                raise conflict(
                    "difficulty", f"{shown} must be pairs of different rates from 0 to 1 and numbers above 0"
                )
        return self


class ClassificationConfig(Section):
    """The class of a sequence, scored by the first rows of the head."""

    classes: Annotated[Size, Field(ge=2)] = Field(2, description="Number of classes: labels are 0 to classes − 1")
    pooling: Literal["last", "mean"] | None = Field(
        None, description="What the head reads: the last real token, or the mean over all; null: last where attention "
        "is causal, else mean"
    )  # fmt: skip


class QLoRAConfig(Section):
    """Low-rank adapters (LoRA 2106.09685, QLoRA 2305.14314) on every linear layer of attention and feed-forward."""

    enabled: bool = Field(False, description="Each Stack gets a stack adapter when it is made")
    rank: Size = Field(16, description="Rank of stack adapters")
    alpha: Annotated[float, Field(gt=0.0)] = Field(16.0, description="Stack adapters count alpha / rank times")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Of what the adapters read")
    strategy: Literal["simplified", "progressive", "variable"] = Field(
        "simplified",
        description="simplified: one rank and alpha; progressive: by the patterns below, from Stack to Stack; "
        "variable: rank_pattern and alpha_pattern list one number a Stack",
    )
    rank_pattern: (
        Literal["constant", "increasing", "decreasing"] | Annotated[tuple[PositiveInt, ...], BeforeValidator(_tuple)]
    ) = Field(
        "constant",
        description="progressive: of the n Stacks the one with id k gets rank, rank·(k+1)/n (increasing) or "
        "rank·(n−k)/n (decreasing), rounded up; variable: a list",
    )
    alpha_pattern: (
        Literal["constant", "increasing", "decreasing"]
        | Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], BeforeValidator(_tuple)]
    ) = Field("constant", description="progressive: as rank_pattern, not rounded; variable: a list")
    progressive_enabled: bool = Field(
        False, description="Each Stack gets a second, progressive adapter when it becomes trunk"
    )
    progressive_rank: Size = Field(8, description="Rank of progressive adapters")
    progressive_alpha: Annotated[float, Field(gt=0.0)] = Field(
        8.0, description="Progressive adapters count progressive_alpha / progressive_rank times"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, key)
            if self.strategy == "variable" and isinstance(value, str) and value != "constant":
                raise conflict(key, f"{value!r} is read when strategy is progressive (it is variable): give a list")
            if self.strategy == "progressive" and not isinstance(value, str):
                raise conflict(key, "a list is read when strategy is variable (it is progressive)")
            if self.strategy == "simplified" and value != "constant":
                raise conflict(key, f"{value!r} is not read when strategy is simplified; set progressive or variable")
        if self.strategy == "variable" and isinstance(self.rank_pattern, str):
            raise conflict("rank_pattern", "must list a rank for each Stack when strategy is variable")
        return self

    @property
    def varies(self) -> bool:
        """Whether stack adapters differ from Stack to Stack."""
        return self.enabled and (self.rank_pattern, self.alpha_pattern) != ("constant", "constant")

    def stack_adapter(self, stack_id: int, n_stacks: int) -> tuple[int, float]:
        """Rank and alpha of the stack adapter of the Stack ``stack_id`` in a Rack that grows to ``n_stacks``."""
        rank, alpha = _patterned(self.rank, self.rank_pattern, stack_id, n_stacks), self.alpha
        return max(1, math.ceil(rank - 1e-9)), _patterned(alpha, self.alpha_pattern, stack_id, n_stacks)


def _patterned(base: float, pattern: str | tuple[float, ...], k: int, n: int) -> float:
    """``base`` for Stack k of n: constant, base·(k+1)/n, base·(n−k)/n, or the k-th of a list."""
    if not isinstance(pattern, str):
        return pattern[k]
    return {"constant": base, "increasing": base * (k + 1) / n, "decreasing": base * (n - k) / n}[pattern]


class CacheConfig(Section):
    """Hidden states at a boundary, computed once and read while a Stack trains."""

    dtype: Literal["float32", "bfloat16", "fp8"] = Field(
        "bfloat16", description="How they are stored; fp8: with a scale for each 128 values of a row"
    )
    max_bytes: PositiveInt | None = Field(
        None, description="Room for the cache; a phase whose batches need more takes fewer of them again and again; "
        "null: no limit but the disk's"
    )  # fmt: skip
    in_memory: bool = Field(False, description="Keep the cache in memory instead of on disk")


class CheckpointConfig(Section):
    every_steps: PositiveInt = Field(500, description="Save every so many steps (and at every phase's end)")
    keep_last: PositiveInt = Field(2, description="Checkpoints kept; older ones are deleted")


class EvaluationConfig(Section):
    every_steps: PositiveInt | None = Field(
        None, description="Validate every so many steps; null: at the end of every phase"
    )
    max_tokens: PositiveInt | None = Field(None, description="Validation tokens to score, spread evenly; null: all")
    draws: Size = Field(1, description="diffusion: masks drawn for each sequence that is scored")


class LoggingConfig(Section):
    every_steps: PositiveInt = Field(10, description="A line of metrics every so many steps")
    tensorboard: bool = Field(False, description="Also write TensorBoard events (extra: track)")


DEFAULT_STEPS = 1000
"""Budget when none of max_steps, max_tokens and max_flops is set."""


class TrainingConfig(Section):
    alternatives = ("max_steps", "max_tokens", "max_flops")

    strategy: Literal["progressive", "end_to_end", "phases"] = Field(
        "progressive",
        description="progressive: grow Stack by Stack; end_to_end: the whole Rack at once; phases: as phases lists",
    )
    end_to_end_scope: Literal["rackwise", "stackwise", "blockwise"] = Field(
        "rackwise", description="end_to_end: what trains at a time: everything, one Stack after another, one Block"
    )
    phases: Annotated[tuple[PhaseConfig, ...], BeforeValidator(_tuple)] = Field(
        (), description="strategy phases: the phases, in order; each adds Stacks, or trains some, or sweeps over all"
    )
    batch_size: Size = Field(16, description="Sequences in one optimizer step")
    micro_batch_size: Size | None = Field(
        None, description="Sequences in one forward pass (gradients accumulate); null: batch_size"
    )
    seq_len: Size = Field(256, description="Tokens in a sequence")
    max_steps: PositiveInt | None = Field(
        None,
        description=f"Budget in steps; set one of max_steps, max_tokens, max_flops (none: {DEFAULT_STEPS} steps)",
    )
    max_tokens: PositiveInt | None = Field(None, description="Budget in training tokens")
    max_flops: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Budget in true FLOPs of training steps"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Fixes initial weights, batches, masks and dropout"
    )
    grad_clip: Annotated[float, Field(gt=0.0)] | None = Field(
        1.0, description="Largest global gradient norm; null: no clipping"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: cuda, else mps, else cpu")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of matrix products; auto: bfloat16 autocast on cuda that has it, else float32"
    )
    cpu_allocator: Literal["auto", "tight", "fast"] = Field(
        "auto",
        description="On a CPU: tight gives freed tensors back to the system at once, and memory stays at the plan's; "
        "fast keeps them for reuse (about a third more memory); auto: tight from d_model 512 on",
    )
    compile: bool = Field(False, description="torch.compile the Stacks")
    activation_checkpointing: bool = Field(
        False, description="Recompute each Block's activations in the backward pass: less memory, more FLOPs"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    progressive: ProgressiveConfig = ProgressiveConfig()
    masking: MaskingConfig = MaskingConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    classification: ClassificationConfig = ClassificationConfig()
    qlora: QLoRAConfig = QLoRAConfig()
    cache: CacheConfig = CacheConfig()
    offload: Literal["none", "host", "disk"] = Field(
        "none",
        description="Where frozen Stacks wait: none: on the device; host: in this machine's memory; disk: in the run's "
        "checkpoint. What is not on the device is brought one Stack at a time, the next one ahead",
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [key for key in self.alternatives if getattr(self, key) is not None]
        if len(given) > 1:
            raise conflict(
                given[1],
                f"{getattr(self, given[1])} and {given[0]} ({getattr(self, given[0])}) are both set; keep one budget",
            )
        if self.optimizer.in_backward and self.grad_clip is not None:
            raise conflict(
                "optimizer.in_backward",
                f"true cannot clip by the norm of all gradients (grad_clip is {self.grad_clip:g}), which is not known "
                "before the first update; set grad_clip: null",
            )
        trains_bf16 = self.progressive.new_stack_precision == "bfloat16"
        if trains_bf16 and self.optimizer.optimizer_type != "adamw":
            raise conflict(
                "progressive.new_stack_precision",
                f"'bfloat16' weights are updated by adamw, which rounds at random; optimizer_type is "
                f"{self.optimizer.optimizer_type}",
            )
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise conflict(
                "micro_batch_size",
                f"{self.micro_batch_size} does not divide batch_size ({self.batch_size})",
            )
        return self

    @property
    def budget(self) -> tuple[Literal["steps", "tokens", "flops"], float]:
        """The unit and the size of the training budget."""
        if self.max_tokens is not None:
            return "tokens", self.max_tokens
        if self.max_flops is not None:
            return "flops", self.max_flops
        return "steps", self.max_steps if self.max_steps is not None else DEFAULT_STEPS

    @property
    def objectives(self) -> tuple[ObjectiveName, ...]:
        """Those of the phases, in the order of their first use."""
        default = self.progressive.training_objective
        return tuple(dict.fromkeys(entry.objective or default for entry in self.phases)) or (default,)

    @property
    def objective(self) -> ObjectiveName:
        """What the run is trained for: the objective of its last phase."""
        return (self.phases and self.phases[-1].objective) or self.progressive.training_objective

    @property
    def needs_mask(self) -> bool:
        """Whether the tokenizer must have a mask token."""
        return not {"mlm", "diffusion"}.isdisjoint(self.objectives)

    @property
    def depth_variant(self) -> Literal["experts", "suffix", "prefix"] | None:
        """How Stacks share the noise levels; ``None``: depth is no time."""
        return self.diffusion.depth_variant if self.progressive.time_interpretation == "depth" else None


TIGHT_FROM_WIDTH = 512
"""``cpu_allocator: auto`` is tight from this d_model on."""


class TokenizerConfig(Section):
    kind: Literal["bytes", "characters", "bpe", "pretrained"] = Field(
        "bpe", description="bytes; characters; bpe (trained on the corpus); pretrained (from path)"
    )
    vocab_size: Annotated[Size, Field(ge=260)] = Field(4096, description="bpe: size of the trained vocabulary")
    path: str | None = Field(
        None, description="pretrained: a tokenizer.json, a Hugging Face folder, or the tokenizer folder of a run"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "pretrained" and self.path is None:
            raise conflict("path", "must name a tokenizer.json or a folder when kind is pretrained")
        if self.kind != "pretrained" and self.path is not None:
            raise conflict(
                "path", f"{reprlib.repr(self.path)} is only read when kind is pretrained (kind is {self.kind})"
            )
        return self


class DataConfig(Section):
    source: Literal["python-stdlib", "files", "huggingface"] = Field(
        "python-stdlib",
        description="python-stdlib: the library sources on this machine; files: path; huggingface: a data set",
    )
    path: str | Annotated[tuple[str, ...], BeforeValidator(_tuple)] | None = Field(
        None, description="files: a file, folder, glob or list (text, .jsonl, .parquet); huggingface: its name"
    )
    subset: str | None = Field(None, description="huggingface: the configuration of the data set")
    split: str = Field("train", description="huggingface: the split to read")
    text_field: str = Field("text", description="Field of .jsonl and .parquet records that holds the text")
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1, description="Share of the text kept for validation"
    )
    validation_split: Literal["auto", "documents", "tail"] = Field(
        "auto",
        description="documents: whole documents, chosen by content; tail: the end of each document; "
        "auto: documents where there are at least 20, else tail",
    )
    tokenizer: TokenizerConfig = TokenizerConfig()
    cache_dir: str | None = Field(
        None, description="Where token stores are kept; null: $STACKWISE_CACHE, else ~/.cache/stackwise"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.source == "python-stdlib" and self.path is not None:
            raise conflict(
                "path", f"{reprlib.repr(self.path)} is not read when source is python-stdlib; set data.source: files"
            )
        if self.source != "python-stdlib" and not self.path:
            raise conflict("path", f"must be set when source is {self.source}")
        if self.source == "huggingface" and not isinstance(self.path, str):
            raise conflict("path", f"{list(self.path or ())!r} must be one data set name when source is huggingface")
        return self


def _key_of(settings: dict[str, str], wanted: str) -> str:
    """The first key that has the value ``wanted``."""
    return next(key for key, value in settings.items() if value == wanted)


class StackWiseConfigFields(Section):
    """The fields of a whole run; ``StackWiseConfig`` adds reading and writing."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        progressive, training = self.training.progressive, self.training
        for objective in training.objectives:
            mode = self.mode_of(objective)
            if objective == "clm" and mode == "bidirectional":
                raise conflict(
                    "model.attention_preset",
                    f"{self.model.attention_preset!r} is bidirectional and would see the tokens that clm predicts; "
                    "set gpt_style, or training.progressive.training_objective: mlm or diffusion",
                )
            if objective in ("mlm", "diffusion") and mode == "causal":
                raise conflict(
                    "model.attention_preset",
                    f"{self.model.attention_preset!r} is causal and {objective} reads both sides; set bert_style, "
                    "or training.progressive.training_objective: clm",
                )
        self._check_diffusion()
        self._check_masking()
        if training.objective != "classification" and training.classification != ClassificationConfig():
            raise conflict(
                "training.classification",
                f"is read by classification (training_objective is {training.objective})",
            )
        if training.objective == "classification" and progressive.cache_activations:
            raise conflict(
                "training.progressive.cache_activations",
                "true needs batches of a token store; classification takes them from a data loader",
            )
        tokenizer, family = self.data.tokenizer, self.model.tokenizer_embedding.family
        if family is not None and tokenizer.kind != "pretrained" and tokenizer != TokenizerConfig():
            raise conflict(
                "data.tokenizer.kind",
                f"{tokenizer.kind!r} does not fit the table of model.tokenizer_embedding.family, which comes with its "
                "own tokenizer; leave data.tokenizer out",
            )
        positions = self.model.learned_positions
        if positions is not None and training.seq_len > positions:
            raise conflict(
                "training.seq_len",
                f"{training.seq_len} is longer than the table of learned positions "
                f"(model.learned_positions: {positions})",
            )
        blocks = self.model.architecture.blocks_per_stack
        if isinstance(blocks, tuple) and len(blocks) < self.target_stacks:
            raise conflict(
                "model.architecture.blocks_per_stack",
                f"has {len(blocks)} entries for {self.target_stacks} Stacks; give one a Stack",
            )
        self._check_growth()
        if progressive.building_mode == "interleave" and self.model.initial is None:
            raise conflict(
                "training.progressive.building_mode",
                "'interleave' goes between the Stacks of a Rack that is there (model.initial, or train --from); "
                "allowed without one: append, prepend",
            )
        if progressive.optimizer_state == "copy" and progressive.new_stack_init != "copy":
            raise conflict(
                "training.progressive.optimizer_state",
                f"'copy' needs new_stack_init: copy (it is {progressive.new_stack_init})",
            )
        fractions = progressive.phase_fractions
        if training.strategy == "progressive" and fractions is not None:
            if len(fractions) != self.target_stacks:
                raise conflict(
                    "training.progressive.phase_fractions",
                    f"has {len(fractions)} entries for {self.target_stacks} Stacks; give one a Stack",
                )
            if abs(sum(fractions) + progressive.joint_fraction - 1.0) > 1e-6:
                raise conflict(
                    "training.progressive.phase_fractions",
                    f"and joint_fraction add up to {sum(fractions) + progressive.joint_fraction:g}, not 1",
                )
        return self

    def _check_diffusion(self) -> None:
        """Noise levels, blocks and depth as time."""
        training, diffusion, progressive = self.training, self.training.diffusion, self.training.progressive
        time = progressive.time_interpretation
        if "diffusion" not in training.objectives:
            if training.evaluation.draws != 1:
                raise conflict(
                    "training.evaluation.draws",
                    f"{training.evaluation.draws} is read by diffusion (training_objective is {training.objective})",
                )
            for key, value in (("training.progressive.time_interpretation", time), ("training.diffusion", diffusion)):
                if value not in (None, DiffusionConfig()):
                    shown = repr(value) if isinstance(value, str) else "has settings that differ from the default; it"
                    raise conflict(key, f"{shown} is read by diffusion (training_objective is {training.objective})")
            return
        readers = {
            "depth_variant": "depth", "levels": "depth", "difficulty": "depth", "expert": "depth",
            "condition": "input", "time_embedding": "input", "time_dim": "input",
        }  # fmt: skip
        for key, reader in readers.items():
            if getattr(diffusion, key) != DiffusionConfig.model_fields[key].default and time != reader:
                raise conflict(
                    f"training.diffusion.{key}",
                    f"{getattr(diffusion, key)!r} is read when training.progressive.time_interpretation is {reader} "
                    f"(it is {'null' if time is None else time})",
                )
        if time == "depth" and diffusion.depth_variant == "prefix" and diffusion.weighting != "stratified":
            raise conflict(
                "training.diffusion.weighting",
                f"{diffusion.weighting!r} is not read by depth_variant prefix, whose Stacks have one rate each",
            )
        if time == "depth" and diffusion.depth_variant == "prefix" and diffusion.weight_power != 1.0:
            raise conflict(
                "training.diffusion.weight_power",
                f"{diffusion.weight_power:g} is not read by depth_variant prefix, whose Stacks have one rate each",
            )
        if diffusion.weighting != "stratified" and diffusion.min_rate != DiffusionConfig().min_rate:
            raise conflict(
                "training.diffusion.min_rate",
                f"{diffusion.min_rate:g} is read when weighting is stratified (it is {diffusion.weighting})",
            )
        levels = diffusion.levels
        if isinstance(levels, tuple) and (
            len(levels) != self.target_stacks + 1
            or (levels[0], levels[-1]) != (1.0, 0.0)
            or any(a <= b for a, b in pairwise(levels))
        ):
            raise conflict(
                "training.diffusion.levels",
                f"{list(levels)} must fall from 1 to 0 in {self.target_stacks} steps, one for each Stack; where they "
                "stop above 0, the sum would not bound the likelihood",
            )
        if time is not None and len(training.objectives) > 1:
            other = next(name for name in training.objectives if name != "diffusion")
            raise conflict(
                "training.progressive.time_interpretation",
                f"{time!r} goes with diffusion in every phase; some train {other}",
            )
        block = diffusion.block_length
        if block is not None:
            if training.seq_len % block:
                raise conflict(
                    "training.diffusion.block_length", f"{block} does not divide seq_len ({training.seq_len})"
                )
            if time is not None:
                raise conflict("training.diffusion.block_length", f"{block} goes with time_interpretation: null")
            if self.model.window is not None or self.model.attention_custom.kernel_meaning == "weight":
                raise conflict("training.diffusion.block_length", f"{block} goes with attention over all tokens")
        if time == "depth":
            self._check_depth()

    def _check_masking(self) -> None:
        """Masking rates of the Stacks."""
        rates, training = self.training.masking.stack_rates, self.training
        if rates is None:
            return
        key, progressive = "training.masking.stack_rates", training.progressive
        if training.objective != "mlm" or training.strategy != "progressive":
            raise conflict(
                key,
                f"{list(rates)} is read by mlm with strategy progressive (training_objective is {training.objective}, "
                f"strategy {training.strategy})",
            )
        if len(rates) != self.target_stacks:
            raise conflict(key, f"has {len(rates)} entries for {self.target_stacks} Stacks; give one a Stack")
        if progressive.cache_activations or progressive.building_mode == "interleave":
            what = "cache_activations" if progressive.cache_activations else "building_mode: interleave"
            raise conflict(key, f"{list(rates)} cannot go with {what}: each phase has masks of its own")

    def _check_depth(self) -> None:
        """Which curricula train Stacks that share the noise levels."""
        progressive, variant = self.training.progressive, self.training.diffusion.depth_variant
        if self.training.strategy == "phases" or self.training.end_to_end_scope != "rackwise":
            raise conflict(
                "training.progressive.time_interpretation",
                "'depth' goes with strategy progressive or end_to_end (rackwise)",
            )
        expert = self.training.diffusion.expert
        if expert is not None:
            frozen = self.training.strategy == "progressive" and progressive.trunk_strategy == "frozen"
            if variant != "experts" or not frozen or expert >= self.target_stacks or progressive.joint_fraction:
                raise conflict(
                    "training.diffusion.expert",
                    f"{expert} needs depth_variant experts, strategy progressive, trunk_strategy frozen, no "
                    f"joint_fraction, and one of the {self.target_stacks} Stacks, counted from 0",
                )
        if (self.model.initial is not None) != (expert is not None and expert > 0):
            what = "starts without model.initial" if expert in (None, 0) else "starts from a run of expert 0 (--from)"
            key = "training.progressive.time_interpretation" if expert is None else "training.diffusion.expert"
            raise conflict(key, f"{'depth' if expert is None else expert!r} {what}")
        if progressive.cache_activations:
            raise conflict(
                "training.progressive.cache_activations",
                "true cannot go with time_interpretation: depth, whose Stacks read tokens",
            )
        if self.training.strategy != "progressive":
            return
        wanted = "prepend" if variant == "suffix" else "append"
        if progressive.building_mode != wanted:
            raise conflict(
                "training.progressive.building_mode",
                f"{progressive.building_mode!r}, but depth_variant {variant} grows by {wanted}",
            )
        if progressive.trunk_strategy == "qlora":
            raise conflict(
                "training.progressive.trunk_strategy",
                "'qlora' does not go with time_interpretation: depth; allowed: frozen, trainable",
            )

    def _check_growth(self) -> None:
        """What becomes of the trunk: strategies, storage, adapters, cache."""
        training, progressive, qlora = self.training, self.training.progressive, self.training.qlora
        if (training.strategy == "phases") != bool(training.phases):
            if training.phases:
                raise conflict("training.phases", f"is read when strategy is phases (it is {training.strategy})")
            raise conflict("training.phases", "must list the phases when strategy is phases")
        if training.end_to_end_scope != "rackwise" and training.strategy != "end_to_end":
            raise conflict(
                "training.end_to_end_scope",
                f"{training.end_to_end_scope!r} is read when strategy is end_to_end (it is {training.strategy})",
            )
        trunks = self._trunks()
        for i, entry in enumerate(training.phases):
            strategy = entry.trunk or progressive.trunk_strategy
            if strategy == "trainable" and entry.precision not in (None, "full"):
                raise conflict(
                    f"training.phases[{i}].precision",
                    f"{entry.precision!r} is of a frozen trunk, but the trunk is trainable; "
                    "set trunk: frozen or qlora, or precision: full",
                )
        strategies = set(trunks.values())
        if "qlora" in strategies and not (qlora.enabled or qlora.progressive_enabled):
            raise conflict(
                _key_of(trunks, "qlora"),
                "'qlora' trains adapters, and there are none; set training.qlora.enabled or "
                "training.qlora.progressive_enabled to true",
            )
        if strategies == {"trainable"} and progressive.trunk_precision != "full":
            raise conflict(
                "training.progressive.trunk_precision",
                f"{progressive.trunk_precision!r} is of a frozen trunk, but trunk_strategy is trainable; "
                "set trunk_strategy: frozen or qlora, or trunk_precision: full",
            )
        if progressive.new_stack_precision not in TRAINABLE_PRECISIONS and not qlora.enabled:
            raise conflict(
                "training.progressive.new_stack_precision",
                f"{progressive.new_stack_precision!r} cannot train; allowed: {', '.join(TRAINABLE_PRECISIONS)}, or "
                "set training.qlora.enabled: true, whose adapters train",
            )
        still = strategies - {"trainable"}
        if still and self.model.tie_embeddings and self.model.initial is None:
            kind = min(still)
            raise conflict(
                "model.tie_embeddings",
                f"true cannot go with {_key_of(trunks, kind)}: {kind}, since "
                "training the head would change what the trunk reads; set it to false, or the trunk to trainable",
            )
        if progressive.cache_activations:
            if len(training.objectives) > 1:
                raise conflict(
                    "training.progressive.cache_activations",
                    f"true keeps the inputs of one objective; the phases have {', '.join(training.objectives)}",
                )
            append = training.strategy == "progressive" and progressive.building_mode == "append"
            if training.strategy == "phases":
                append = bool(trunks) and all(entry.at == "right" for entry in training.phases)
            if strategies - {"frozen"} or not append:
                raise conflict(
                    "training.progressive.cache_activations",
                    "true needs Stacks appended to a frozen trunk: what is cached would change with a trunk that "
                    "trains, or with Stacks that join before it; set trunk_strategy: frozen and building_mode: append",
                )
        if training.offload != "none" and not self.freezes_stacks:
            grows = training.strategy == "progressive" and trunks
            why = "but trunk_strategy is trainable" if grows else "and no phase freezes any"
            raise conflict("training.offload", f"{training.offload!r} is of frozen Stacks, {why}")
        for key in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(qlora, key)
            if not isinstance(pattern, str) and len(pattern) < self.target_stacks:
                raise conflict(
                    f"training.qlora.{key}",
                    f"has {len(pattern)} entries for {self.target_stacks} Stacks; give one a Stack",
                )

    def _trunks(self) -> dict[str, str]:
        """What the trunk does when Stacks join one, by the key that says it."""
        training, default = self.training, "training.progressive.trunk_strategy"
        strategy, present = training.progressive.trunk_strategy, self.model.initial is not None
        if training.strategy == "progressive":
            return {default: strategy} if present or self.target_stacks > 1 else {}
        return {
            default if entry.trunk is None else f"training.phases[{i}].trunk": entry.trunk or strategy
            for i, entry in enumerate(training.phases)
            if entry.add == "each" or (entry.add is not None and (present or i > 0))
        }

    @property
    def freezes_stacks(self) -> bool:
        """Whether there are Stacks that do not train, in some phase."""
        training = self.training
        if training.strategy == "end_to_end":
            return training.end_to_end_scope != "rackwise"
        some = any(entry.sweep or entry.unfreeze or isinstance(entry.trains, tuple) for entry in training.phases)
        stored = training.progressive.new_stack_precision not in TRAINABLE_PRECISIONS
        return some or stored or bool(set(self._trunks().values()) - {"trainable"})

    @property
    def tight_allocator(self) -> bool:
        """Whether freed tensors leave the process at once (on a CPU): the cost of that falls with the width."""
        wanted = self.training.cpu_allocator
        return wanted == "tight" or (wanted == "auto" and self.model.d_model >= TIGHT_FROM_WIDTH)

    @property
    def target_stacks(self) -> int:
        return self.training.progressive.target_stacks or self.model.architecture.n_stacks

    @property
    def attention_mode(self) -> Literal["causal", "bidirectional"]:
        """The direction of attention of the trained Rack."""
        return self.mode_of(self.training.objective)

    def mode_of(self, objective: ObjectiveName) -> Literal["causal", "bidirectional"]:
        """The direction of attention: the preset's, or that of ``objective`` where the preset leaves it open."""
        causal = objective in ("clm", "custom")
        needed: Literal["causal", "bidirectional"] = "causal" if causal else "bidirectional"
        match self.model.attention_preset:
            case "gpt_style":
                return "causal"
            case "bert_style":
                return "bidirectional"
            case "custom":
                return self.model.attention_custom.attention_mode or needed
        return needed

    @property
    def time_fields(self) -> dict[str, Any]:
        """How the model is told the noise level: fields of a ``RackSpec``, empty where it is not."""
        if self.training.progressive.time_interpretation != "input":
            return {}
        diffusion = self.training.diffusion
        return {"time_embedding": diffusion.time_embedding, "time_dim": diffusion.time_dim}

    def block_fields(self, stack_id: int = 0, index: int = 0) -> dict[str, Any]:
        """The Block ``index`` of the Stack ``stack_id``, as the fields of a ``BlockSpec``."""
        model, custom = self.model, self.model.attention_custom
        r_q, r_kv = model.latent_ranks
        number = model.architecture.blocks_before(stack_id) + index if stack_id or index else 0
        is_global = model.window is None or (model.global_every is not None and number % model.global_every == 0)
        kernel = model.kernel_type
        return {
            "d_model": model.d_model,
            "d_ff": model.ff_width,
            "n_heads": model.n_heads,
            "n_kv_heads": model.kv_heads,
            "attention_mode": self.attention_mode,
            "dropout": model.dropout,
            "freeze_up_proj": model.freeze_up_proj,
            "use_rope": model.use_rope,
            "rope_theta": model.rope_theta if is_global else model.local_rope_theta or model.rope_theta,
            "norm_eps": model.norm_eps,
            "head_dim": model.head_dim,
            "norm": model.norm,
            "norm_bias": model.norm_has_bias,
            "attention_norm": number > 0 or model.first_attention_norm,
            "ffn": model.ffn,
            "bias": model.bias,
            "qk_norm": model.qk_norm,
            "window": None if is_global else model.window,
            "r_q": r_q,
            "r_kv": r_kv,
            "latents": model.latents or "shared",
            "rope_dim": custom.mla_rope_dim,
            "v_head_dim": custom.mla_v_head_dim,
            "kernel_type": kernel,
            "kernel_dim": custom.kernel_dim or DEFAULT_KERNEL_DIM,
            "kernel_meaning": custom.kernel_meaning,
            "kernel_norm": custom.kernel_norm,
            "kernel_bandwidth": custom.kernel_bandwidth,
            "learned_temperature": custom.learned_temperature,
            "time_dim": self.time_fields.get("time_dim"),
        }

    def rack_fields(self, vocab_size: int) -> dict[str, Any]:
        """What is not in the Stacks, as the fields of a ``RackSpec``."""
        model = self.model
        return {
            "vocab_size": vocab_size,
            "d_model": model.d_model,
            "tie_embeddings": model.tie_embeddings,
            "dropout": model.dropout,
            "norm": model.norm,
            "norm_eps": model.norm_eps,
            "norm_bias": model.norm_has_bias,
            "bias": model.bias,
            "freeze_embeddings": model.tokenizer_embedding.freeze_embeddings,
            "learned_positions": model.learned_positions,
            "embedding_norm": model.embedding_norm,
            "mlm_head": model.mlm_head,
            "embedding_dim": model.tokenizer_embedding.embedding_dim,
            "adapter_hidden_dim": model.tokenizer_embedding.adapter_hidden_dim,
            **self.time_fields,
        }
