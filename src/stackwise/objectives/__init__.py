from stackwise.config.base import StackWiseConfig
from stackwise.config.objectives import ObjectiveName
from stackwise.data.tokenizers import Tokenizer
from stackwise.errors import UserError
from stackwise.kinds import OBJECTIVES
from stackwise.objectives.base import Example, Objective, Score
from stackwise.objectives.causal import CausalObjective
from stackwise.objectives.classification import ClassificationObjective
from stackwise.objectives.custom import CustomObjective
from stackwise.objectives.diffusion import DiffusionObjective
from stackwise.objectives.masked import MaskedObjective
from stackwise.objectives.regression import RegressionObjective

__all__ = [
    "CausalObjective",
    "ClassificationObjective",
    "CustomObjective",
    "DiffusionObjective",
    "Example",
    "MaskedObjective",
    "Objective",
    "RegressionObjective",
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
    name = name or config.training.objective
    kind = OBJECTIVES[name]
    if kind.needs_mask and tokenizer is None:
        raise UserError(f"training.progressive.training_objective: {name} needs the tokenizer, for its mask token")
    if kind.needs_mask and tokenizer is not None and tokenizer.mask_id is None:
        raise UserError(
            f"data.tokenizer: the tokenizer has no mask token, which {name} needs; use bytes, characters or bpe"
        )
    objective: Objective = kind.load().from_config(config, tokenizer)
    return objective


def create_objectives(config: StackWiseConfig, tokenizer: Tokenizer | None) -> dict[ObjectiveName, Objective]:
    """The objectives of all phases, by name. Raises ``UserError`` as ``create_objective`` does."""
    return {name: create_objective(config, tokenizer, name) for name in config.training.objectives}
