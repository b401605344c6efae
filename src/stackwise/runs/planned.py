"""The plan of a run that is there, made again."""

from __future__ import annotations

from stackwise.config.base import StackWiseConfig
from stackwise.data.tokenizers import load_tokenizer
from stackwise.planning.plan import Planned, plan_phases
from stackwise.runs.initial import initial_stacks
from stackwise.store.rundir import RunDir


def plan_of(run: RunDir, config: StackWiseConfig) -> Planned:
    """Phases and costs of ``run``, on this machine, with the vocabulary that its tokenizer has.

    Raises:
        UserError: the run has no tokenizer, or the run that it starts from is not there.
    """
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        vocab_size = load_tokenizer(run.tokenizer).vocab_size
    return plan_phases(config, vocab_size, initial_stacks(config))
