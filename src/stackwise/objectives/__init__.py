from stackwise.config.base import StackWiseConfig
from stackwise.data.tokenizers import Tokenizer
from stackwise.errors import UserError
from stackwise.objectives.base import Example, Objective, Score
from stackwise.objectives.causal import CausalObjective
from stackwise.objectives.custom import CustomObjective
from stackwise.objectives.depth import levels_of
from stackwise.objectives.diffusion import DiffusionObjective
from stackwise.objectives.masked import MaskedObjective

__all__ = [
    "CausalObjective",
    "CustomObjective",
    "DiffusionObjective",
    "Example",
    "MaskedObjective",
    "Objective",
    "Score",
    "create_objective",
]


def create_objective(config: StackWiseConfig, tokenizer: Tokenizer | None) -> Objective:
    """The objective that ``training.progressive.training_objective`` names.

    Raises:
        UserError: it needs a mask token, or to know where words begin, and the tokenizer (or its absence) does not say.
    """
    training = config.training
    key = f"training.progressive.training_objective: {training.objective}"
    if training.objective == "clm":
        return CausalObjective()
    if training.objective == "custom":
        return CustomObjective()
    if tokenizer is None:
        raise UserError(f"{key} needs the tokenizer, for its mask token")
    if tokenizer.mask_id is None:
        raise UserError(
            f"data.tokenizer: it has no mask token, which {training.objective} needs; use bytes, characters or bpe"
        )
    if training.objective == "mlm":
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
