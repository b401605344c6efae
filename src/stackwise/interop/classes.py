"""What an exported classifier tells apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stackwise.objectives import create_objective
from stackwise.objectives.classification import ClassificationObjective
from stackwise.ops.pooling import Pooling
from stackwise.runs.run import LoadedRun


@dataclass(frozen=True)
class Classes:
    """The head's first rows, one for each of ``names``, read one vector for each sequence, which ``pooling`` makes."""

    names: tuple[str, ...]
    pooling: Pooling

    def settings(self) -> dict[str, Any]:
        """Their part of ``config.json``."""
        return {
            "pooling": self.pooling,
            "problem_type": "single_label_classification",
            "id2label": {str(i): name for i, name in enumerate(self.names)},
            "label2id": {name: i for i, name in enumerate(self.names)},
        }


def classes_of(run: LoadedRun) -> Classes | None:
    """None where the run's objective gives tokens probabilities."""
    objective = create_objective(run.config, run.known_tokenizer)
    if not isinstance(objective, ClassificationObjective):
        return None
    settings = run.config.training.classification
    names = settings.names or tuple(f"LABEL_{i}" for i in range(settings.classes))
    return Classes(names, objective.pooling)
