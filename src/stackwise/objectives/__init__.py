from stackwise.config.base import StackWiseConfig
from stackwise.config.objectives import ObjectiveName
from stackwise.data.tokenizers import Tokenizer
from stackwise.errors import UserError
from stackwise.objectives.base import Example, Objective, Score
from stackwise.objectives.causal import CausalObjective
from stackwise.objectives.classification import ClassificationObjective
from stackwise.objectives.custom import CustomObjective
from stackwise.objectives.depth import levels_of
from stackwise.objectives.diffusion import DiffusionObjective
from stackwise.objectives.masked import MaskedObjective

__all__ = [
    "CausalObjective",
    "ClassificationObjective",
    "CustomObjective",
    "DiffusionObjective",
    "Example",
    "MaskedObjective",
    "Objective",
    "Score",
    "create_objective",
    "create_objectives",
]


def create_objective(
    config: StackWiseConfig, tokenizer: Tokenizer | None, name: ObjectiveName | None = None
) -> Objective:
    """The objective ``name``, or the one that the run is trained for.

    Raises:
        UserError: it needs a mask token, or to know where words begin, and the tokenizer (or its absence) does not say.
    """
    training = config.training
    name = name or training.objective
    key = f"training.progressive.training_objective: {name}"
    if name == "clm":
        return CausalObjective()
    if name == "custom":
        return CustomObjective()
    if name == "classification":
        pooling = training.classification.pooling or ("last" if config.attention_mode == "causal" else "mean")
        return ClassificationObjective(training.classification, pooling)
    if tokenizer is None:
        raise UserError(f"{key} needs the tokenizer, for its mask token")
    if tokenizer.mask_id is None:
        raise UserError(
            f"data.tokenizer: the tokenizer has no mask token, which {name} needs; use bytes, characters or bpe"
        )
    if name == "mlm":
        starts = tokenizer.word_starts() if training.masking.unit == "word" else None
        return MaskedObjective(
            training.masking,
            seed=training.seed,
            mask_id=tokenizer.mask_id,
            special_ids=tokenizer.special_ids,
            vocab_size=tokenizer.vocab_size,
            starts=starts,
        )
    variant = training.depth_variant
    told = training.diffusion.condition if training.progressive.time_interpretation == "input" else None
    return DiffusionObjective(
        training.diffusion,
        seed=training.seed,
        mask_id=tokenizer.mask_id,
        special_ids=tokenizer.special_ids,
        vocab_size=tokenizer.vocab_size,
        variant=variant,
        levels=(1.0, 0.0) if variant is None else levels_of(config),
        conditioned=told,
    )


def create_objectives(config: StackWiseConfig, tokenizer: Tokenizer | None) -> dict[ObjectiveName, Objective]:
    """The objectives of all phases, by name. Raises ``UserError`` as ``create_objective`` does."""
    return {name: create_objective(config, tokenizer, name) for name in config.training.objectives}
