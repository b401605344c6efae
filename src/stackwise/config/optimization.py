"""Sections of the update: ``training.optimizer`` and ``training.schedule``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from stackwise.config.section import Fraction, Section, as_tuple
from stackwise.kinds import OPTIMIZERS

if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]


class OptimizerConfig(Section):
    steerable = ("lr", "weight_decay", "betas", "eps", "momentum")
    fixed = "the moments in its checkpoints have the form that it says"

    optimizer_type: OptimizerName = Field(
        "adamw", description="adamw; muon: Muon on the matrices of Stacks, AdamW on the rest; sgd: with momentum"
    )
    lr: Annotated[float, Field(gt=0.0)] = Field(1e-3, description="Peak learning rate")
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0,
        description="Learning rate of each Block as a share of the rate of the Block after it (ELECTRA, 2003.10555); "
        "head and norm have lr, and the embedding has the lowest rate, a tied head with it",
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        0.1, description="Weight decay of matrices (adamw, muon: decoupled); vectors are not decayed"
    )
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]],
        BeforeValidator(as_tuple),
    ] = Field((0.9, 0.95), description="AdamW: decay rates of the two moments")
    eps: Annotated[float, Field(gt=0.0)] = Field(1e-8, description="AdamW: added to the root of the second moment")
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None, description="muon, sgd: momentum; null: 0.95 for muon, 0.9 for sgd"
    )
    moments: Literal["float32", "bfloat16", "int8"] = Field(
        "float32", description="AdamW: storage of the two moments: 8, 4 or 2 bytes for each weight"
    )
    in_backward: bool = Field(
        False,
        description="Update each parameter inside the backward pass, so that gradients never exist all at once "
        "(micro-batches still accumulate); needs grad_clip: null",
    )


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
