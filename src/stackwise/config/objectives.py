"""Sections of objectives: ``training.masking``, ``training.diffusion``, ``training.classification``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from stackwise.config.section import Fraction, Section, Size, as_tuple, as_tuples, conflict
from stackwise.kinds import OBJECTIVES, text_objectives

if TYPE_CHECKING:
    ObjectiveName = str
    TextObjective = str
else:
    ObjectiveName = Literal[tuple(OBJECTIVES)]
    TextObjective = Literal[text_objectives()]


class MaskingConfig(Section):
    """Masked language modelling (BERT, 1810.04805 §3.1)."""

    rate: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.15, description="Share of tokens to predict")
    max_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="Each sequence has its own rate, spread evenly from rate to max_rate; null: all have rate"
    )
    stack_rates: Annotated[
        tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...], BeforeValidator(as_tuple)
    ] | None = Field(
        None, description=
"strategy progressive: masking rate of each Stack's own phase, in order; a joint phase and "
"evaluation use rate; null: rate in all phases"

    )  # fmt: skip
    unit: Literal["token", "word", "span"] = Field(
        "token", description="What is masked as a whole; word: needs a tokenizer that marks words"
    )
    span_length: Annotated[float, Field(ge=1.0)] = Field(3.0, description="unit span: mean length of a span, in tokens")
    mask_share: Fraction = Field(0.8, description="Share of the tokens to predict that the mask token replaces")
    random_share: Fraction = Field(0.1, description="Share of the tokens to predict that a random token replaces")

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.mask_share + self.random_share > 1.0:
            raise conflict(
                "random_share",
                f"{self.random_share} and mask_share ({self.mask_share}) sum to more than 1",
            )
        if self.max_rate is not None and self.max_rate < self.rate:
            raise conflict("max_rate", f"{self.max_rate} is below rate ({self.rate})")
        if self.stack_rates is not None and self.max_rate is not None:
            raise conflict(
                "stack_rates", f"{list(self.stack_rates)} and max_rate ({self.max_rate}) are both set; keep one"
            )
        return self


class DiffusionConfig(Section):
    """Masked diffusion (MDLM 2406.07524, LLaDA 2502.09992): tokens masked at every rate, weighted to bound −log p."""

    weighting: Literal["stratified", "exact_counts"] = Field(
        "stratified",
        description="stratified: rates spread evenly over the batch, weighted by 1/rate; exact_counts: an exact number "
        "of tokens masked, and their plain mean",
    )
    weight_power: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        1.0,
        description="Training weighs each rate by (1/rate)^weight_power: 1: the loss is the likelihood bound; 0: all "
        "masked tokens count alike; values between give less noisy gradients, and short runs learn faster. "
        "Evaluation always gives the bound",
    )
    min_rate: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(1e-3, description="stratified: lowest masking rate")
    block_length: Size | None = Field(
        None,
        description="Block diffusion (BD3-LM 2503.09573): tokens in a block; blocks come left to right, each by "
        "diffusion given the blocks before it; must divide seq_len; null: all tokens are one block",
    )
    depth_variant: Literal["experts", "suffix", "prefix"] = Field(
        "experts",
        description="time_interpretation depth: which Stacks run in the noise interval of Stack k of K (the first is "
        "the noisiest): experts: Stack k alone; suffix: Stacks k to K; prefix: one pass, in which each Stack reveals "
        "some tokens to the next",
    )
    levels: (
        Literal["linear", "cosine", "exponential", "equal_difficulty"]
        | Annotated[tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...], BeforeValidator(as_tuple)]
    ) = Field(
        "linear",
        description="time_interpretation depth: bounds of the noise intervals: linear (equal probability), cosine, "
        "exponential, equal_difficulty (see difficulty), or a list of K + 1 rates from 1 down to 0",
    )
    difficulty: Annotated[tuple[tuple[float, float], ...], BeforeValidator(as_tuples)] | None = Field(
        None, description="levels equal_difficulty: pairs [rate, cross-entropy at that rate], as eval prints them"
    )
    expert: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="depth_variant experts on a frozen trunk: id of the one Stack to train in this process: 0 also "
        "trains what all Stacks share, the others start from a run of 0 (train --from); stackwise join puts the runs "
        "together",
    )
    condition: Literal["rate", "masked"] = Field(
        "rate",
        description="time_interpretation input: noise level that the model is told: rate: the rate drawn; masked: the "
        "masked share of the tokens (special ones do not count)",
    )
    time_embedding: Literal["sinusoidal", "learned"] = Field(
        "sinusoidal", description="time_interpretation input: how the noise level becomes a vector"
    )
    time_dim: Annotated[Size, Field(ge=2, multiple_of=2)] = Field(
        64, description="time_interpretation input: width of the noise level's vector"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.levels == "equal_difficulty" and self.difficulty is None:
            raise conflict(
                "difficulty", "must be set when levels is equal_difficulty: a list of pairs [rate, cross-entropy]"
            )
        if self.difficulty is not None:
            rates = [rate for rate, _ in self.difficulty]
            fits = all(0 <= rate <= 1 and nats > 0 for rate, nats in self.difficulty)
            if not rates or len(set(rates)) < len(rates) or not fits:
                shown = [list(pair) for pair in self.difficulty]
                raise conflict(
                    "difficulty",
                    f"{shown} must be pairs [rate, cross-entropy]: different rates from 0 to 1, "
                    "cross-entropies above 0",
                )
        return self


class ClassificationConfig(Section):
    """The class of a sequence, scored by the first rows of the head."""

    classes: Annotated[Size, Field(ge=2)] = Field(2, description="Number of classes: labels are 0 to classes − 1")
    names: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] | None = Field(
        None, description="data.source labelled: what the labels 0, 1, … are called in the files; null: what the "
        "training rows say, sorted"
    )  # fmt: skip
    pooling: Literal["last", "mean"] | None = Field(
        None, description=
"What the head reads: the last real token, or the mean over all; null: last with causal attention, "
"else mean"

    )  # fmt: skip

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.names is not None and (len(self.names) != self.classes or len(set(self.names)) < len(self.names)):
            raise conflict("names", f"{list(self.names)} must be {self.classes} different names (classes)")
        return self
