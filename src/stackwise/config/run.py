"""The section ``training`` as a whole, and the three sections of a run with what follows from them together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from stackwise.config.attention import AttentionMode
from stackwise.config.data import DataConfig
from stackwise.config.growth import CacheConfig, PhaseConfig, ProgressiveConfig, QLoRAConfig
from stackwise.config.model import ModelConfig
from stackwise.config.objectives import ClassificationConfig, DiffusionConfig, MaskingConfig, ObjectiveName
from stackwise.config.optimization import OptimizerConfig, ScheduleConfig
from stackwise.config.section import PositiveInt, Section, Size, as_tuple, conflict
from stackwise.kinds import CURRICULA, OBJECTIVES, STORAGES, TRACKERS

DEFAULT_STEPS = 1000
"""Budget when none of max_steps, max_tokens and max_flops is set."""
VALIDATION_TOKENS = 1 << 17
"""Tokens of a validation: enough that chance moves the loss by about 0.01 nats, and a few percent of a run's time."""
TIGHT_FROM_WIDTH = 512
"""``cpu_allocator: auto`` is tight from this d_model on."""


if TYPE_CHECKING:
    StrategyName = str
    TrackerName = str
else:
    StrategyName = Literal[tuple(CURRICULA)]
    TrackerName = Literal[tuple(TRACKERS)]


class CheckpointConfig(Section):
    every_steps: PositiveInt = Field(
        500, description="Steps between checkpoints (one is also saved at the end of every phase)"
    )
    keep_last: PositiveInt = Field(
        2, description="Number of checkpoints kept beside those of phase ends and the best; older ones are deleted"
    )
    keep_phase_ends: bool = Field(
        True, description="Keep the checkpoint at the end of each phase (what is frozen is stored once for all)"
    )


class EvaluationConfig(Section):
    every_steps: PositiveInt | None = Field(
        None, description="Steps between validations; null: at the end of every phase"
    )
    max_tokens: PositiveInt | None = Field(
        VALIDATION_TOKENS,
        description="Validation tokens to score at a time, spread evenly; null: all (stackwise eval scores all)",
    )
    draws: Size = Field(1, description="diffusion: masks drawn for each scored sequence")


class EarlyStoppingConfig(Section):
    patience: PositiveInt | None = Field(
        None, description="Validations without improvement after which training ends early; null: it does not"
    )
    min_improvement: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="How far below the lowest validation loss so far counts as an improvement"
    )
    ends: Literal["run", "phase"] = Field(
        "run", description="What ends: run: all training; phase: the phase, and the next one begins"
    )


class LoggingConfig(Section):
    every_steps: PositiveInt = Field(10, description="Steps between lines of metrics")
    trackers: Annotated[tuple[TrackerName, ...], BeforeValidator(as_tuple)] = Field(
        (),
        description="Dashboards that metrics also go to: tensorboard (RUN/tensorboard), wandb (with "
        "WANDB_MODE=offline they stay here), trackio; each is an extra",
    )


class TrainingConfig(Section):
    alternatives = ("max_steps", "max_tokens", "max_flops")
    steerable = (
        *alternatives, "micro_batch_size", "grad_clip", "device", "cpu_allocator", "compile",
        "activation_checkpointing", "offload", "schedule", "evaluation", "keep_best", "early_stopping", "checkpoint",
        "logging",
    )  # fmt: skip
    fixed = "the phases, batches and moments of the run follow from it"

    strategy: StrategyName = Field(
        "progressive",
        description="progressive: grow Stack by Stack; end_to_end: the whole Rack at once; phases: the list in phases",
    )
    end_to_end_scope: Literal["rackwise", "stackwise", "blockwise"] = Field(
        "rackwise",
        description="end_to_end: what trains at a time: rackwise: everything; stackwise: one Stack; blockwise: one "
        "Block",
    )
    phases: Annotated[tuple[PhaseConfig, ...], BeforeValidator(as_tuple)] = Field(
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
        "auto",
        description="Data type of matrix products; auto: bfloat16 autocast on CUDA devices that have it, else float32",
    )
    cpu_allocator: Literal["auto", "tight", "fast"] = Field(
        "auto",
        description="On a CPU: tight returns freed memory to the system at once, so that memory stays at the plan's; "
        "fast keeps it for reuse (about a third more memory); auto: tight from d_model 512 on",
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
        description="Where frozen Stacks are kept: none: on the device; host: in host memory; disk: in the run's "
        "checkpoint. Offloaded Stacks are brought to the device one at a time, each while the one before computes",
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    keep_best: bool = Field(
        False,
        description="Save and keep the checkpoint with the lowest validation loss; --step best of eval, generate and "
        "export takes it",
    )
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
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
        return any(OBJECTIVES[name].needs_mask for name in self.objectives)

    @property
    def depth_variant(self) -> Literal["experts", "suffix", "prefix"] | None:
        """How Stacks share the noise levels; ``None``: depth is no time."""
        return self.diffusion.depth_variant if self.progressive.time_interpretation == "depth" else None


class Settings(Section):
    """The fields of a whole run; ``StackWiseConfig`` adds reading and writing."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()

    def trunks(self) -> dict[str, str]:
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
        some = any(entry.sweep or entry.unfreeze or entry.trains not in (None, "all") for entry in training.phases)
        stored = not STORAGES[training.progressive.new_stack_precision].trains
        return some or stored or bool(set(self.trunks().values()) - {"trainable"})

    @property
    def tight_allocator(self) -> bool:
        """Whether freed tensors leave the process at once (on a CPU): the cost of that falls with the width."""
        wanted = self.training.cpu_allocator
        return wanted == "tight" or (wanted == "auto" and self.model.d_model >= TIGHT_FROM_WIDTH)

    @property
    def target_stacks(self) -> int:
        return self.training.progressive.target_stacks or self.model.architecture.n_stacks

    @property
    def attention_mode(self) -> AttentionMode:
        """The direction of attention of the trained Rack."""
        return self.mode_of(self.training.objective)

    def mode_of(self, objective: ObjectiveName) -> AttentionMode:
        """The direction of attention: the preset's, or that of ``objective`` where the preset leaves it open."""
        needed = OBJECTIVES[objective].attention
        match self.model.attention_preset:
            case "gpt_style":
                return "causal"
            case "bert_style":
                return "bidirectional"
        return self.model.attention_custom.attention_mode or needed

    @property
    def time_fields(self) -> dict[str, Any]:
        """How the model is told the noise level: fields of a ``RackSpec``, empty where it is not."""
        if self.training.progressive.time_interpretation != "input":
            return {}
        diffusion = self.training.diffusion
        return {"time_embedding": diffusion.time_embedding, "time_dim": diffusion.time_dim}

    def block_fields(self, stack_id: int = 0, index: int = 0) -> dict[str, Any]:
        """The Block ``index`` of the Stack ``stack_id``, as the fields of a ``BlockSpec``."""
        model = self.model
        number = model.architecture.blocks_before(stack_id) + index if stack_id or index else 0
        local = model.global_every is None or number % model.global_every != 0
        return {
            "attention": model.attention(self.attention_mode, local),
            "d_ff": model.ff_width,
            "freeze_up_proj": model.freeze_up_proj,
            "norm": model.norm,
            "norm_bias": model.norm_has_bias,
            "attention_norm": number > 0 or model.first_attention_norm,
            "ffn": model.ffn,
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
