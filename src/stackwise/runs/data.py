"""What a run learns from and is scored on: the windows of a text, or the rows of labelled files."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from stackwise.config.base import StackWiseConfig
from stackwise.data.labelled import LabelledBatches, LabelledData, LabelledRows, training_names
from stackwise.data.store import PreparedData
from stackwise.data.tokenizers import Tokenizer
from stackwise.errors import UserError
from stackwise.kinds import CORPORA, OBJECTIVES
from stackwise.model.architecture import Rack
from stackwise.model.lexical import resolve_family
from stackwise.objectives import Objective
from stackwise.objectives.scoring import Validation, check_scorable, validate_samples
from stackwise.runs.validation import validate_run, windows_of
from stackwise.training.examples import ExampleSource
from stackwise.training.sources import BatchSource, ProgressiveDataLoader, TokenSource
from stackwise.units import count


class RunData(Protocol):
    """The training and validation sides of what a run reads."""

    @property
    def prepared(self) -> PreparedData | LabelledData: ...

    def described(self) -> str:
        """One sentence for people."""
        ...

    def source(self, objective: Objective) -> ExampleSource:
        """The example of each step."""
        ...

    def check(self, objective: Objective) -> None:
        """UserError where ``score`` would find nothing to score; before anything is trained."""
        ...

    def score(self, rack: Rack, objective: Objective, compute_dtype: torch.dtype | None) -> Validation:
        """Scores the validation side."""
        ...


class Text:
    """Windows of text."""

    def __init__(self, prepared: PreparedData, config: StackWiseConfig) -> None:
        self.prepared, self._config = prepared, config

    def described(self) -> str:
        data = self.prepared
        return (
            f"{len(data.train):,} training and {len(data.validation):,} validation tokens "
            f"({data.bytes_per_token:.2f} bytes each) of {count(data.n_documents, 'document')}, split by {data.split}, "
            f"{_vocabulary(data.tokenizer)}"
        )

    def source(self, objective: Objective) -> ExampleSource:
        # Of one source there is one entry too, but no weight.
        counted = zip(self.prepared.sources, self._config.data.sources)
        mixed = [(tokens, entry.weight) for (tokens, _, _), entry in counted]
        return TokenSource(ProgressiveDataLoader(self.prepared.train, self._config, mixed), objective)

    def check(self, objective: Objective) -> None:
        check_scorable(objective, self.prepared.validation, **windows_of(self._config.training))

    def score(self, rack: Rack, objective: Objective, compute_dtype: torch.dtype | None) -> Validation:
        return validate_run(rack, self._config, self.prepared, compute_dtype, objective)


class Rows:
    """Rows with a label each."""

    def __init__(self, prepared: LabelledData, config: StackWiseConfig) -> None:
        self.prepared, self._config = prepared, config

    def described(self) -> str:
        data = self.prepared
        names = "" if data.names is None else f" with the classes {', '.join(data.names)}"
        longer = data.train.truncated + data.validation.truncated
        cut = f"; {longer:,} rows are longer than {data.train.seq_len} tokens and were cut" if longer else ""
        return (
            f"{len(data.train):,} training and {len(data.validation):,} validation rows{names}{cut}, "
            f"{_vocabulary(data.tokenizer)}"
        )

    def source(self, objective: Objective) -> ExampleSource:
        training = self._config.training
        return BatchSource(LabelledBatches(self.prepared.train, training.batch_size, training.seed), objective)

    def check(self, objective: Objective) -> None:
        """There always is a row."""

    def score(self, rack: Rack, objective: Objective, compute_dtype: torch.dtype | None) -> Validation:
        return score_rows(self.prepared.validation, rack, objective, self._config, compute_dtype)


def score_rows(
    rows: LabelledRows, rack: Rack, objective: Objective, config: StackWiseConfig, compute_dtype: torch.dtype | None
) -> Validation:
    """Scores ``rows``, or so many of them, spread evenly, that they have about ``training.evaluation.max_tokens``."""
    n, most = len(rows), config.training.evaluation.max_tokens
    wanted = n if most is None else min(n, max(1, most // rows.seq_len))
    batch_size = config.training.micro_batch_size or config.training.batch_size
    samples = np.arange(wanted, dtype=np.int64) * n // wanted
    return validate_samples(rack, objective, samples, rows.batch, batch_size=batch_size, compute_dtype=compute_dtype)


def _vocabulary(tokenizer: Tokenizer) -> str:
    return f"vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind})"


def resolved(config: StackWiseConfig) -> StackWiseConfig:
    """``config`` with what files say beside it: a family's tokenizer, the names of the classes.

    Raises:
        UserError: the objective needs labels that the source does not have, or other classes are there than
            ``training.classification.classes`` says.
    """
    config = resolve_family(config)
    training, labelled = config.training, CORPORA[config.data.source].labelled
    for name in training.objectives:
        kind = OBJECTIVES[name]
        if kind.labels != "inputs" and not (labelled and kind.of_sequences):
            files = "labelled files (data.source: labelled), or from " if kind.of_sequences else ""
            raise UserError(
                f"training.progressive.training_objective: {name!r} takes its targets from {files}a data loader, in "
                "Python (ProgressiveTrainer, ArchitectureTrainer)"
            )
    return _with_names(config) if OBJECTIVES[training.objective].labels == "classes" else config


def _with_names(config: StackWiseConfig) -> StackWiseConfig:
    if config.training.classification.names is not None:
        return config
    names = training_names(config.data)
    classes = config.training.classification.classes
    if len(names) != classes:
        shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
        raise UserError(
            f"training.classification.classes: {classes}, but the training rows have {len(names)} "
            f"class{'' if len(names) == 1 else 'es'} ({shown})"
            + (f"; set it to {len(names)}" if len(names) > 1 else "; there must be two at least")
        )
    return config.changed({"training.classification.names": names})
