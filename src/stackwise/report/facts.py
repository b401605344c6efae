"""What a run folder says of its run, read and checked: a report believes nothing in it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from stackwise.config.base import StackWiseConfig
from stackwise.errors import RunError, UserError
from stackwise.planning.plan import Planned
from stackwise.reading import parse_json
from stackwise.report.evaluation import Evaluation, read_evaluation
from stackwise.runs.planned import plan_of
from stackwise.store.checkpoints import CheckpointStore
from stackwise.store.rundir import RunDir
from stackwise.store.state import PhaseRecord, load_checkpoint, read_summary

MOST_SAMPLES = 12
"""Samples shown of a run: the newest."""


class Line(BaseModel):
    """A line of ``metrics.jsonl``; what else it holds is not shown."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    step: int
    phase: str
    tokens: int
    loss: float
    lr: float
    flops: float
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    memory_bytes: int | None = None
    validation_loss: float | None = None


class Totals(BaseModel):
    """What ``summary.json`` says of a whole run, beside its validation."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    tokens: int
    flops: float
    wall_seconds: float
    peak_memory_bytes: int | None = None


class Sample(BaseModel):
    """A line of ``samples.jsonl``: text that the run wrote while it trained."""

    model_config = ConfigDict(strict=True)

    step: int
    text: str
    prompt: str = ""


_LINES, _TOTALS, _SAMPLES = TypeAdapter(list[Line]), TypeAdapter(Totals), TypeAdapter(list[Sample])


@dataclass(frozen=True)
class Facts:
    """One run.

    Attributes:
        name: the folder's, made longer by its parents' where several runs of a report have the same.
        lines: of ``metrics.jsonl``.
        records: of the phases that have begun, as in ``summary.json``.
        summary: None while the run is not complete; ``totals`` are its own.
        planned: the plan, made again here; None where that cannot be done, and ``unplanned`` says why.
        evaluation: what ``stackwise eval`` left, if anything.
        samples: the newest last.
    """

    run: RunDir
    name: str
    config: StackWiseConfig
    lines: list[Line]
    records: list[dict[str, Any]]
    summary: dict[str, Any] | None
    totals: Totals | None
    planned: Planned | None
    unplanned: str = ""
    evaluation: Evaluation | None = None
    samples: list[Sample] = field(default_factory=list)

    def column(self, name: str) -> NDArray[np.float64]:
        """A number of every line, nan where it is not there."""
        values = [getattr(line, name) for line in self.lines]
        return np.array([np.nan if value is None else value for value in values], dtype=float)

    def edges(self, unit: str) -> list[float]:
        """Where phases begin and end, in ``flops`` or ``tokens`` of the run."""
        return np.cumsum([0.0, *(record[unit] for record in self.records)]).tolist()

    @property
    def objectives(self) -> str:
        return " then ".join(self.config.training.objectives)


def read_facts(path: str | Path, name: str) -> Facts:
    """Reads the run in ``path``, complete or not.

    Raises:
        UserError: there is no run, or it has not trained a step. RunError: a file of it is damaged.
    """
    run = RunDir.open(path)
    config = StackWiseConfig.from_yaml(run.config)
    lines = _checked(_LINES, run.read_metrics(), run.metrics)
    if not lines:
        raise UserError(f"{run.metrics}: contains no step, so there is nothing to report")
    summary = read_summary(run) if run.is_complete() else None
    totals = None if summary is None else _checked(_TOTALS, summary, run.summary)
    records = [asdict(PhaseRecord(**record)) for record in (summary["phases"] if summary else _records(run))]
    evaluation, samples = read_evaluation(run.path), _samples(run.path)
    planned, unplanned = None, ""
    try:
        planned = plan_of(run, config)
    except UserError as error:
        unplanned = str(error)
    if planned is not None and [p.name for p in planned.phases][: len(records)] != [r["name"] for r in records]:
        raise RunError(f"{run.path}: config.yaml and the records of the run are not of one run: their phases differ")
    return Facts(run, name, config, lines, records, summary, totals, planned, unplanned, evaluation, samples)


def _records(run: RunDir) -> list[dict[str, Any]]:
    """Of a run in progress: of its newest checkpoint."""
    store = CheckpointStore(run.checkpoints)
    if not store.has_any():
        return []
    records: list[dict[str, Any]] = load_checkpoint(store).state["run"]["records"]
    return records


def _samples(folder: Path) -> list[Sample]:
    path = folder / "samples.jsonl"
    try:
        lines = path.read_bytes().splitlines()[-MOST_SAMPLES:]
        return _checked(_SAMPLES, [parse_json(line) for line in lines], path)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error


def _checked(kind: TypeAdapter[Any], value: Any, path: Path) -> Any:
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(f"{path}: {where}: {first['msg']}") from None
