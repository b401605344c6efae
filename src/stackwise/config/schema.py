"""What a run is: every setting, its type, its range and its only default.

The classes are frozen: a config is data. ``None`` means "derived", and the description says from what.
The description of a field is its documentation: ``stackwise init`` writes it as the comment beside the key.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _tuple(value: Any) -> Any:
    """YAML has lists only; frozen configs hold tuples."""
    return tuple(value) if isinstance(value, list) else value


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
    n_stacks: PositiveInt = Field(4, description="Stacks of the whole Rack")
    blocks_per_stack: PositiveInt = Field(2, description="Blocks (transformer layers) in each Stack")


class AttentionCustomConfig(Section):
    """Read only when ``model.attention_preset`` is ``custom``."""

    attention_type: Literal["mha"] = Field("mha", description="Projections: mha (grouped when n_kv_heads < n_heads)")
    attention_mode: Literal["causal", "bidirectional"] | None = Field(
        None, description="null: causal for clm, bidirectional for mlm"
    )
    mla_rq: None = Field(None, description="Rank of latent queries; latent attention is not built yet")
    mla_rkv: None = Field(None, description="Rank of latent keys and values; not built yet")
    kernel_type: None = Field(None, description="Feature map of queries and keys; not built yet")
    kernel_dim: None = Field(None, description="Number of random features; not built yet")


class TokenizerEmbeddingConfig(Section):
    family: None = Field(None, description="Pretrained embedding to start from; not built yet")
    embedding_option: None = Field(None, description="Which matrix of it; not built yet")
    freeze_embeddings: bool = Field(False, description="Keep the token embedding at its initial values")
    adapter_hidden_dim: None = Field(None, description="Width of the adapter to d_model; not built yet")


class ModelConfig(Section):
    vocab_size: PositiveInt | None = Field(None, description="null: the tokenizer's")
    d_model: PositiveInt = Field(128, description="Width of the hidden state")
    n_heads: PositiveInt = Field(4, description="Query heads; must divide d_model into even head sizes")
    n_kv_heads: PositiveInt | None = Field(
        None, description="Key and value heads; null: n_heads (efficient_gqa: n_heads / 4, at least 1)"
    )
    d_ff: PositiveInt | None = Field(
        None, description="Width of the feed-forward; null: 8/3 d_model, rounded up to a multiple of 32"
    )
    architecture: ArchitectureConfig = ArchitectureConfig()
    attention_preset: Literal["gpt_style", "bert_style", "efficient_gqa", "custom"] = Field(
        "gpt_style",
        description="gpt_style: causal; bert_style: bidirectional; efficient_gqa: shared key/value heads, "
        "direction as the objective needs; custom: see attention_custom",
    )
    attention_custom: AttentionCustomConfig = AttentionCustomConfig()
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="After the embedding, in attention and after each residual branch"
    )
    tie_embeddings: bool = Field(False, description="Head shares the embedding's matrix (not with a frozen trunk)")
    freeze_up_proj: bool = Field(False, description="Keep the feed-forward's up-projections at their initial values")
    use_rope: bool = Field(True, description="Rotary positions on queries and keys; false: no positions")
    rope_theta: Annotated[float, Field(gt=1.0)] = Field(10000.0, description="Base of the rotary frequencies")
    norm_eps: Annotated[float, Field(gt=0.0)] = Field(1e-5, description="Epsilon of RMSNorm")
    tokenizer_embedding: TokenizerEmbeddingConfig = TokenizerEmbeddingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.d_model % self.n_heads:
            raise conflict("n_heads", f"{self.n_heads} does not divide d_model ({self.d_model})")
        if self.use_rope and (self.d_model // self.n_heads) % 2:
            raise conflict(
                "n_heads",
                f"{self.n_heads} gives heads of odd size {self.d_model // self.n_heads}; "
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
        return self

    @property
    def kv_heads(self) -> int:
        if self.n_kv_heads is not None:
            return self.n_kv_heads
        if self.attention_preset == "efficient_gqa":
            wanted = max(1, self.n_heads // 4)
            return max(n for n in range(1, wanted + 1) if self.n_heads % n == 0)
        return self.n_heads

    @property
    def ff_width(self) -> int:
        return self.d_ff if self.d_ff is not None else -(-8 * self.d_model // 96) * 32


class OptimizerConfig(Section):
    optimizer_type: Literal["adamw"] = Field("adamw", description="AdamW (fused)")
    lr: Annotated[float, Field(gt=0.0)] = Field(1e-3, description="Peak learning rate")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        0.1, description="Decoupled decay of matrices; vectors are not decayed"
    )
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]],
        BeforeValidator(_tuple),
    ] = Field((0.9, 0.95), description="Decay rates of the two moments")
    eps: Annotated[float, Field(gt=0.0)] = Field(1e-8, description="Added to the root of the second moment")


class ScheduleConfig(Section):
    kind: Literal["wsd", "cosine", "constant"] = Field(
        "wsd", description="wsd: warm-up, stable, linear decay; cosine: warm-up, cosine decay"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(50, description="Linear warm-up of the first phase")
    rewarmup_steps: Annotated[int, Field(ge=0)] = Field(
        20, description="Linear warm-up at the start of every later phase"
    )
    decay_fraction: Fraction = Field(0.2, description="wsd: share of the steps, at the end, that decay")
    min_lr_ratio: Fraction = Field(0.1, description="Final learning rate as a share of the peak")
    span: Literal["run", "phase"] = Field("run", description="Decay once over the whole run, or within every phase")


class ProgressiveConfig(Section):
    target_stacks: PositiveInt | None = Field(None, description="Stacks to grow to; null: model.architecture.n_stacks")
    building_mode: Literal["append", "prepend"] = Field(
        "append", description="New Stacks go to the right (append) or to the left (prepend) of the trunk"
    )
    trunk_strategy: Literal["frozen", "trainable"] = Field(
        "trainable", description="What happens to the Stacks already trained when a new one is added"
    )
    new_stack_precision: Literal["full"] = Field("full", description="full: fp32 weights")
    trunk_precision: Literal["full"] = Field("full", description="full: fp32 weights")
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
    cache_activations: Literal[False] = Field(False, description="Feed new Stacks from disk; not built yet")
    time_interpretation: None = Field(None, description="Of diffusion: depth or input; not built yet")
    training_objective: Literal["clm", "mlm"] = Field(
        "clm", description="clm: next token; mlm: masked tokens (needs bidirectional attention)"
    )


class MaskingConfig(Section):
    """Masked language modelling (BERT, 1810.04805 §3.1)."""

    rate: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.15, description="Share of tokens to predict")
    mask_share: Fraction = Field(0.8, description="Of those, the share replaced by the mask token")
    random_share: Fraction = Field(0.1, description="Of those, the share replaced by a random token")

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.mask_share + self.random_share > 1.0:
            raise conflict(
                "random_share",
                f"{self.random_share} plus mask_share ({self.mask_share}) is above 1",
            )
        return self


class QLoRAConfig(Section):
    enabled: Literal[False] = Field(False, description="LoRA adapters; not built yet")


class CheckpointConfig(Section):
    every_steps: PositiveInt = Field(500, description="Save every so many steps (and at every phase's end)")
    keep_last: PositiveInt = Field(2, description="Checkpoints kept; older ones are deleted")


class EvaluationConfig(Section):
    every_steps: PositiveInt | None = Field(
        None, description="Validate every so many steps; null: at the end of every phase"
    )
    max_tokens: PositiveInt | None = Field(None, description="Validation tokens to score, spread evenly; null: all")


class LoggingConfig(Section):
    every_steps: PositiveInt = Field(10, description="A line of metrics every so many steps")
    tensorboard: bool = Field(False, description="Also write TensorBoard events (extra: track)")


DEFAULT_STEPS = 1000
"""Budget when none of max_steps, max_tokens and max_flops is set."""


class TrainingConfig(Section):
    alternatives = ("max_steps", "max_tokens", "max_flops")

    strategy: Literal["progressive", "end_to_end"] = Field(
        "progressive", description="Grow Stack by Stack, or train the whole Rack from the start"
    )
    end_to_end_scope: Literal["rackwise"] = Field(
        "rackwise", description="rackwise: all Stacks at once (for end_to_end)"
    )
    batch_size: PositiveInt = Field(16, description="Sequences in one optimizer step")
    micro_batch_size: PositiveInt | None = Field(
        None, description="Sequences in one forward pass (gradients accumulate); null: batch_size"
    )
    seq_len: PositiveInt = Field(256, description="Tokens in a sequence")
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
    qlora: QLoRAConfig = QLoRAConfig()
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
    def objective(self) -> Literal["clm", "mlm"]:
        return self.progressive.training_objective


TIGHT_FROM_WIDTH = 512
"""``cpu_allocator: auto`` is tight from this d_model on."""


class TokenizerConfig(Section):
    kind: Literal["bytes", "characters", "bpe", "pretrained"] = Field(
        "bpe", description="bytes; characters; bpe (trained on the corpus); pretrained (from path)"
    )
    vocab_size: Annotated[int, Field(ge=260)] = Field(4096, description="bpe: size of the trained vocabulary")
    path: str | None = Field(None, description="pretrained: a tokenizer.json or a Hugging Face folder")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "pretrained" and self.path is None:
            raise conflict("path", "must name a tokenizer.json or a folder when kind is pretrained")
        if self.kind != "pretrained" and self.path is not None:
            raise conflict("path", f"{self.path!r} is only read when kind is pretrained (kind is {self.kind})")
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
            raise conflict("path", f"{self.path!r} is not read when source is python-stdlib; set data.source: files")
        if self.source != "python-stdlib" and not self.path:
            raise conflict("path", f"must be set when source is {self.source}")
        if self.source == "huggingface" and not isinstance(self.path, str):
            raise conflict("path", f"{list(self.path or ())!r} must be one data set name when source is huggingface")
        return self


class StackWiseConfigFields(Section):
    """The fields of a whole run; ``StackWiseConfig`` adds reading and writing."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        progressive, training = self.training.progressive, self.training
        mode = self.attention_mode
        if training.objective == "clm" and mode == "bidirectional":
            raise conflict(
                "model.attention_preset",
                f"{self.model.attention_preset!r} is bidirectional and would see the tokens that clm predicts; "
                "set gpt_style, or training.progressive.training_objective: mlm",
            )
        if training.objective == "mlm" and mode == "causal":
            raise conflict(
                "model.attention_preset",
                f"{self.model.attention_preset!r} is causal and mlm reads both sides; set bert_style, "
                "or training.progressive.training_objective: clm",
            )
        grows = training.strategy == "progressive" and self.target_stacks > 1
        if grows and progressive.trunk_strategy == "frozen" and self.model.tie_embeddings:
            raise conflict(
                "model.tie_embeddings",
                "true cannot go with training.progressive.trunk_strategy: frozen, since training the head "
                "would change what the frozen trunk reads; set it to false, or the trunk to trainable",
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
        """The direction of attention: the preset's, or the objective's where the preset leaves it open."""
        needed: Literal["causal", "bidirectional"] = "causal" if self.training.objective == "clm" else "bidirectional"
        match self.model.attention_preset:
            case "gpt_style":
                return "causal"
            case "bert_style":
                return "bidirectional"
            case "custom":
                return self.model.attention_custom.attention_mode or needed
            case "efficient_gqa":
                return needed
