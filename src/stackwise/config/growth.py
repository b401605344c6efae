"""Sections of growth: ``training.progressive``, ``training.phases``, ``training.qlora``, ``training.cache``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from stackwise.config.objectives import ObjectiveName, TextObjective
from stackwise.config.section import Fraction, PositiveInt, Section, Size, Stacks, as_tuple, conflict
from stackwise.kinds import STORAGES

if TYPE_CHECKING:
    PrecisionName = str
else:
    PrecisionName = Literal[tuple(STORAGES)]


class ProgressiveConfig(Section):
    target_stacks: Stacks | None = Field(None, description="Stacks to grow to; null: model.architecture.n_stacks")
    building_mode: Literal["append", "prepend", "interleave"] = Field(
        "append",
        description="Where Stacks join the trunk: append: right; prepend: left; interleave: all at once, between the "
        "Stacks of model.initial",
    )
    trunk_strategy: Literal["frozen", "qlora", "trainable"] = Field(
        "trainable",
        description="What the Stacks already trained do when another joins: frozen; qlora: frozen, but their adapters "
        "train (see qlora); trainable",
    )
    new_stack_precision: PrecisionName = Field(
        "full",
        description="Storage of a joining Stack's matrices: full (fp32) or bfloat16; half, fp8, int8, nf4 and nvfp4 "
        "freeze them, and only adapters train (qlora.enabled)",
    )
    trunk_precision: PrecisionName = Field(
        "full", description="Storage of a frozen trunk's matrices: full, half, bfloat16, fp8, int8, nf4, nvfp4"
    )
    new_stack_init: Literal["random", "identity", "copy"] = Field(
        "copy", description="copy: the neighbouring Stack's weights; identity: residual outputs are zero; random"
    )
    optimizer_state: Literal["keep", "reset", "copy"] = Field(
        "keep",
        description="Optimizer moments when a Stack joins: keep: of all weights that go on training; reset: of none; "
        "copy: keep, and a copied Stack gets its source's",
    )
    phase_fractions: Annotated[tuple[Fraction, ...], BeforeValidator(as_tuple)] | None = Field(
        None, description="Share of the budget for each Stack's phase, in order; null: equal shares"
    )
    joint_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Share of the budget for a final phase that trains everything"
    )
    cache_activations: bool = Field(
        False,
        description="Appending to a frozen trunk: run the trunk once and train each Stack on cached hidden states (see "
        "cache)",
    )
    time_interpretation: Literal["depth", "input"] | None = Field(
        None,
        description="diffusion: depth: each Stack handles one interval of noise levels (see diffusion); input: Blocks "
        "are conditioned on the noise level; null: the model is not told the noise level",
    )
    training_objective: ObjectiveName = Field(
        "clm",
        description="clm: next token; mlm: masked tokens; diffusion: masked tokens at every rate, a bound on the "
        "likelihood (mlm and diffusion need bidirectional attention); custom: targets from a data loader (from Python "
        "only); classification, regression: the class of each text, or a number (data.source labelled, or Python)",
    )


_KINDS: tuple[Literal["add", "trains", "sweep", "unfreeze"], ...] = ("add", "trains", "sweep", "unfreeze")


class PhaseConfig(Section):
    """An entry of ``training.phases``: add, trains, sweep or unfreeze. The final norm and the head always train."""

    add: PositiveInt | Literal["rest", "each"] | None = Field(
        None,
        description="Number of Stacks that join at once; rest: all that are left, at once; each: all that are left, "
        "one in each phase",
    )
    at: Literal["right", "left", "middle", "between"] = Field("right", description="add: where the Stacks join")
    init: Literal["random", "identity", "copy"] | None = Field(
        None, description="add: initialisation; null: training.progressive.new_stack_init"
    )
    trunk: Literal["frozen", "qlora", "trainable"] | None = Field(
        None, description="add: what the existing Stacks do; null: training.progressive.trunk_strategy"
    )
    precision: PrecisionName | None = Field(
        None, description="add: storage of a frozen trunk; null: training.progressive.trunk_precision"
    )
    trains: (
        Literal["all", "adapters"]
        | Annotated[
            tuple[Annotated[int, Field(ge=0)] | Literal["embedding"], ...],
            BeforeValidator(as_tuple),
        ]
        | None
    ) = Field(
        None,
        description="all; adapters: those of all Stacks, whose own weights are frozen and stored in trunk_precision; "
        "or a list of Stack ids (and embedding) that train together",
    )
    sweep: Literal["left_to_right", "right_to_left"] | None = Field(
        None, description="One unit after another trains while the others are frozen"
    )
    cycles: Annotated[int, Field(ge=1, le=1000)] = Field(1, description="sweep: number of sweeps")
    unit: Literal["stack", "block"] = Field("stack", description="sweep: what trains at a time: stack or block")
    group: PositiveInt = Field(1, description="sweep: number of neighbouring Stacks that train together")
    unfreeze: Literal["right_to_left", "left_to_right"] | None = Field(
        None,
        description="The last Stack trains (left_to_right: the first), then one more in each phase, then everything",
    )
    share: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="Share of the budget; null: an equal part of what the other entries leave"
    )
    objective: TextObjective | None = Field(
        None,
        description="Objective of this entry, one that learns from text alone; null: "
        "training.progressive.training_objective. The run is evaluated and used with the last entry's objective",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        kinds = [key for key in _KINDS if getattr(self, key) is not None]
        if len(kinds) != 1:
            what = f"both {kinds[0]} and {kinds[1]}" if kinds else "none"
            raise conflict(
                kinds[1] if kinds else "add",
                f"an entry must set exactly one of add, trains, sweep, unfreeze; this entry sets {what}",
            )
        return self

    @property
    def kind(self) -> Literal["add", "trains", "sweep", "unfreeze"]:
        """The one of these keys that is set."""
        return next(key for key in _KINDS if getattr(self, key) is not None)


class QLoRAConfig(Section):
    """Low-rank adapters (LoRA 2106.09685, QLoRA 2305.14314) on every linear layer of attention and feed-forward."""

    enabled: bool = Field(False, description="Each Stack gets a stack adapter when it is created")
    rank: Size = Field(16, description="Rank of stack adapters")
    alpha: Annotated[float, Field(gt=0.0)] = Field(16.0, description="Stack adapters are scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Dropout rate on the adapters' input")
    strategy: Literal["simplified", "progressive", "variable"] = Field(
        "simplified",
        description="simplified: one rank and alpha for all Stacks; progressive: rank and alpha follow the patterns "
        "below from Stack to Stack; variable: rank_pattern and alpha_pattern list one number for each Stack",
    )
    rank_pattern: (
        Literal["constant", "increasing", "decreasing"] | Annotated[tuple[PositiveInt, ...], BeforeValidator(as_tuple)]
    ) = Field(
        "constant",
        description="progressive: Stack k of n gets rank, rank·(k+1)/n (increasing) or rank·(n−k)/n (decreasing), "
        "rounded up; variable: a list",
    )
    alpha_pattern: (
        Literal["constant", "increasing", "decreasing"]
        | Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], BeforeValidator(as_tuple)]
    ) = Field("constant", description="progressive: as rank_pattern, but not rounded; variable: a list")
    progressive_enabled: bool = Field(
        False, description="Each Stack gets a second, progressive adapter when it joins the trunk"
    )
    progressive_rank: Size = Field(8, description="Rank of progressive adapters")
    progressive_alpha: Annotated[float, Field(gt=0.0)] = Field(
        8.0, description="Progressive adapters are scaled by progressive_alpha / progressive_rank"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, key)
            if self.strategy == "variable" and isinstance(value, str) and value != "constant":
                raise conflict(
                    key,
                    f"{value!r} is only used when strategy is progressive (strategy is variable, which takes a list)",
                )
            if self.strategy == "progressive" and not isinstance(value, str):
                raise conflict(key, "a list is only used when strategy is variable (strategy is progressive)")
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
        "bfloat16", description="Storage of the hidden states; fp8: with a scale for each 128 values"
    )
    max_bytes: PositiveInt | None = Field(
        None, description=
"Size limit, in bytes; a phase whose batches need more takes fewer of them, again and again; null: no limit "
"but the disk's"

    )  # fmt: skip
    in_memory: bool = Field(False, description="Keep the cache in memory instead of on disk")
