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
    """The head's first ``number`` rows read one vector for each sequence, which ``pooling`` makes."""

    number: int
    pooling: Pooling

    def settings(self) -> dict[str, Any]:
        """Their part of ``config.json``."""
        names = [f"LABEL_{i}" for i in range(self.number)]
        return {
            "pooling": self.pooling,
            "problem_type": "single_label_classification",
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
        }


def classes_of(run: LoadedRun) -> Classes | None:
    """None where the run's objective gives tokens probabilities."""
    objective = create_objective(run.config, run.known_tokenizer)
    if not isinstance(objective, ClassificationObjective):
        return None
    return Classes(run.config.training.classification.classes, objective.pooling)
