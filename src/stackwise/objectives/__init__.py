from stackwise.config.schema import TrainingConfig
from stackwise.data.tokenizers import Tokenizer
from stackwise.errors import UserError
from stackwise.objectives.base import Example, Objective
from stackwise.objectives.causal import CausalObjective
from stackwise.objectives.masked import MaskedObjective

__all__ = ["CausalObjective", "Example", "MaskedObjective", "Objective", "create_objective"]


def create_objective(training: TrainingConfig, tokenizer: Tokenizer) -> Objective:
    """The objective that ``training.progressive.training_objective`` names."""
    if training.objective == "clm":
        return CausalObjective()
    if tokenizer.mask_id is None:
        raise UserError("data.tokenizer: it has no mask token, which mlm needs; use bytes, characters or bpe")
    return MaskedObjective(
        training.masking,
        seed=training.seed,
        mask_id=tokenizer.mask_id,
        special_ids=tokenizer.special_ids,
        vocab_size=tokenizer.vocab_size,
    )
