"""Sections of growth: ``training.progressive``, ``training.phases``, ``training.qlora``, ``training.cache``."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from stackwise.config.objectives import ObjectiveName
from stackwise.config.section import Fraction, PositiveInt, Section, Size, Stacks, as_tuple, conflict

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
    phase_fractions: Annotated[tuple[Fraction, ...], BeforeValidator(as_tuple)] | None = Field(
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


_KINDS: tuple[Literal["add", "trains", "sweep", "unfreeze"], ...] = ("add", "trains", "sweep", "unfreeze")


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
            BeforeValidator(as_tuple),
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
        kinds = [key for key in _KINDS if getattr(self, key) is not None]
        if len(kinds) != 1:
            what = f"both {kinds[0]} and {kinds[1]}" if kinds else "none of them"
            raise conflict(
                kinds[1] if kinds else "add", f"an entry has one of add, trains, sweep, unfreeze; here {what}"
            )
        return self

    @property
    def kind(self) -> Literal["add", "trains", "sweep", "unfreeze"]:
        """The one of these keys that is set."""
        return next(key for key in _KINDS if getattr(self, key) is not None)


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
        Literal["constant", "increasing", "decreasing"] | Annotated[tuple[PositiveInt, ...], BeforeValidator(as_tuple)]
    ) = Field(
        "constant",
        description="progressive: of the n Stacks the one with id k gets rank, rank·(k+1)/n (increasing) or "
        "rank·(n−k)/n (decreasing), rounded up; variable: a list",
    )
    alpha_pattern: (
        Literal["constant", "increasing", "decreasing"]
        | Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], BeforeValidator(as_tuple)]
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
