"""What a checkpoint says beside its tensors, and the check that it says something that a run can go on from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, ValidationError

from stackwise.config.growth import PrecisionName
from stackwise.config.messages import show
from stackwise.config.section import Fraction, Size
from stackwise.errors import RunError, UserError
from stackwise.growth.phases import AdapterKind
from stackwise.store.checkpoints import Checkpoint, CheckpointError, CheckpointStore
from stackwise.store.rundir import RunDir

_TOLERANT = ConfigDict(strict=True, allow_inf_nan=False)
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


StepName = int | Literal["best"]
"""Which checkpoint of a run: that of a step, or the one with the lowest validation loss."""


@dataclass
class PhaseRecord:
    """What ``summary.json`` says of a phase.

    ``stopped_early``: what its validations ended before its budget did: the phase or the run, after ``steps``.
    """

    __pydantic_config__ = _STRICT

    name: str
    stack: int | None
    steps: int
    tokens: NonNegativeInt = 0
    flops: NonNegativeFloat = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    objective: str | None = None
    validation_loss: float | None = None
    bits_per_byte: float | None = None
    trainable_parameters: int = 0
    storage: dict[str, Any] | None = None
    peak_memory_bytes: int | None = None
    seconds: NonNegativeFloat = 0.0
    stopped_early: Literal["phase", "run"] | None = None


@dataclass
class Best:
    """The step with the lowest validation loss so far."""

    __pydantic_config__ = _STRICT

    step: NonNegativeInt
    validation_loss: float


@dataclass
class Patience:
    """What early stopping waits for: a loss below ``loss``, since ``waited`` validations, in or from ``phase`` on."""

    __pydantic_config__ = _STRICT

    phase: NonNegativeInt
    loss: float
    waited: NonNegativeInt = 0


@dataclass
class RunState:
    """Where a run is. Everything but weights and moments; JSON in a checkpoint.

    Attributes:
        unscored: the metrics of the last step, where a signal came before its validation had ended.
    """

    __pydantic_config__ = _STRICT

    step: NonNegativeInt = 0
    phase: NonNegativeInt = 0
    phase_step: NonNegativeInt = 0
    tokens: NonNegativeInt = 0
    flops: NonNegativeFloat = 0.0
    seconds: NonNegativeFloat = 0.0
    records: list[PhaseRecord] = field(default_factory=list)
    best: Best | None = None
    patience: Patience | None = None
    unscored: dict[str, Any] | None = None

    @property
    def is_best(self) -> bool:
        """Whether no validation was better than the one of this step."""
        return self.best is not None and self.best.step == self.step

    def phase_over(self, steps: int) -> bool:
        """Whether the phase in progress, which has a budget of ``steps``, has none left or stopped early."""
        record = self.records[self.phase] if self.phase < len(self.records) else None
        return self.phase_step >= steps or (record is not None and record.stopped_early is not None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunState:
        records = [PhaseRecord(**record) for record in data["records"]]
        best, patience = data.get("best"), data.get("patience")
        parts = {"best": best and Best(**best), "patience": patience and Patience(**patience)}
        return cls(**{**data, "records": records, **parts})


class _AdapterState(BaseModel):
    model_config = _STRICT

    stack: NonNegativeInt
    kind: AdapterKind
    rank: Size
    alpha: float
    dropout: Fraction


class _State(BaseModel):
    """``fingerprint``, ``config``, ``tokenizer`` and ``data`` say whose the checkpoint is; the rest what it holds."""

    model_config = _TOLERANT

    fingerprint: str
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    data: dict[str, str] | None = None
    stacks: Annotated[list[NonNegativeInt], Field(min_length=1)]
    precision: dict[str, PrecisionName] = {}
    adapters: list[_AdapterState] = []
    run: RunState


class _Validation(BaseModel):
    model_config = _TOLERANT

    loss: float
    perplexity: float | None
    bits_per_byte: float | None


class _Summary(BaseModel):
    model_config = _TOLERANT

    phases: list[PhaseRecord]
    validation: _Validation | None
    nelbo: dict[str, Any] | None = None


def read_summary(run: RunDir) -> dict[str, Any]:
    """The summary of a complete run. UserError where it has none, RunError where that is none that a run wrote."""
    summary = run.read_summary()
    try:
        _Summary.model_validate_json(json.dumps(summary))
    except ValidationError as error:
        raise RunError(f"{run.summary}: not the summary of a run: {_first(error)}") from None
    return summary


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))} is {show(first['input'])}: {first['msg']}"


def load_checkpoint(store: CheckpointStore, step: StepName | None = None) -> Checkpoint:
    """The checkpoint of ``step``, or the newest, of a run.

    Raises:
        UserError: the best one is asked for, and the run keeps none.
        CheckpointError: it cannot be read, or its state is nothing that a run ever saved.
    """
    if step == "best":
        best = load_checkpoint(store).state["run"].get("best")
        if best is None:
            raise UserError(f"{store.folder.parent} keeps no best checkpoint (training.keep_best: true keeps it)")
        step = int(best["step"])
    checkpoint = store.load(step)
    try:
        state = _State.model_validate_json(json.dumps(checkpoint.state))
    except ValidationError as error:
        problem = _first(error)
    else:
        if len(set(state.stacks)) < len(state.stacks):
            problem = f"stacks is {show(state.stacks)}: a Stack is there twice"
        elif state.run.step != checkpoint.step:
            problem = f"run.step is {state.run.step}, in the checkpoint of step {checkpoint.step}"
        elif odd := [a.stack for a in state.adapters if a.stack not in state.stacks]:
            problem = f"adapters names Stack {odd[0]}, which is not there"
        else:
            return checkpoint
    raise CheckpointError(
        f"the checkpoint of step {checkpoint.step} in {store.folder} does not hold the state of a run: {problem}"
    )
