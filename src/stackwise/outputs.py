"""What programs may read: the records that commands print with ``--json`` and that a run directory holds.

Each class below is one JSON object; ``docs/reference/json.md`` and ``outputs.schema.json`` beside it are made from them
by ``python -m stackwise.outputs docs/reference``. Within a version of the package a key keeps its name and its meaning;
keys may be added, so a reader ignores those that it does not know.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Bytes = Annotated[int, Field(ge=0)]
Point = Annotated[list[float | None], Field(min_length=3, max_length=3)]


class _Record(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]


class Metrics(_Record):
    """A line of ``RUN/metrics.jsonl``: one for each logged step, in order."""

    step: Annotated[int, Field(description="Optimizer steps since the start of the run, this one included")]
    phase: Annotated[str, Field(description="Name of the phase")]
    stack: Annotated[int | None, Field(description="The Stack that the phase adds or trains; null where it is several")]
    tokens: Annotated[int, Field(description="Tokens trained on since the start of the run")]
    loss: Annotated[float, Field(description="Training loss of the step: nats per predicted token")]
    lr: Annotated[float, Field(description="Learning rate of the step")]
    grad_norm: Annotated[float, Field(description="Norm of all gradients together, before clipping")]
    tokens_per_second: Annotated[float, Field(description="Since the line before; validation and saving left out")]
    mfu: Annotated[float | None, Field(description="Share of the device's peak FLOP/s that is reached")]
    memory_bytes: Annotated[Bytes | None, Field(description="Peak of the phase so far; null where it is not measured")]
    flops: Annotated[float, Field(description="True FLOPs of training since the start of the run")]
    validation_loss: NotRequired[Annotated[float, Field(description="Only of steps after which the Rack was scored")]]


class Nelbo(_Record):
    """A loss that bounds −log p of the text."""

    nats_per_token: Annotated[float, Field(description="The bound")]
    standard_error: Annotated[float | None, Field(description="Of the bound, by sequences; null for a single one")]
    draws: Annotated[int, Field(description="Masks drawn for each sequence")]


class Score(_Record):
    """How well text is predicted."""

    loss: Annotated[float, Field(description="Mean nats of a predicted token")]
    perplexity: Annotated[float | None, Field(description="e to the power of the loss; null of regression")]
    bits_per_byte: Annotated[float | None, Field(description="null where not all of the text is predicted")]
    accuracy: NotRequired[Annotated[float | None, Field(description="Share of predicted tokens that were likeliest")]]
    curve: NotRequired[
        Annotated[
            list[Point], Field(description="Points of c(r): share masked, nats of a masked token, standard error")
        ]
    ]


class Storage(_Record):
    """What storing Stacks in another precision cost."""

    precision: Annotated[dict[str, str], Field(description="By Stack id")]
    validation_loss_before: float | None
    validation_loss_after: float | None


class PhaseSummary(_Record):
    """What became of a phase."""

    name: str
    stack: Annotated[int | None, Field(description="The Stack that it adds or trains; null where it is several")]
    steps: int
    tokens: Annotated[int, Field(description="That it trained on")]
    flops: Annotated[float, Field(description="Of its steps, and of what comes before the first")]
    first_loss: Annotated[float | None, Field(description="Training loss of its first step")]
    last_loss: Annotated[float | None, Field(description="Training loss of its last step")]
    objective: str | None
    validation_loss: Annotated[float | None, Field(description="At its end")]
    bits_per_byte: Annotated[float | None, Field(description="At its end, of the validation text")]
    trainable_parameters: int
    storage: Storage | None
    peak_memory_bytes: Annotated[Bytes | None, Field(description="Allocator's on an accelerator, resident on a CPU")]
    seconds: Annotated[float, Field(description="Wall time, validation included")]
    stopped_early: Annotated[
        Literal["phase", "run"] | None, Field(description="What its validations ended before its budget, after steps")
    ]


class Best(_Record):
    """The step with the lowest validation loss."""

    step: int
    validation_loss: float


class Summary(_Record):
    """``RUN/summary.json``, which ``train --json`` and ``resume --json`` print: there once the run is complete."""

    validation: Annotated[Score | None, Field(description="Of the trained Rack; null where there was no text for it")]
    nelbo: NotRequired[Annotated[Nelbo, Field(description="Where the loss is a bound")]]
    tokens: Annotated[int, Field(description="Trained on")]
    flops: Annotated[float, Field(description="True FLOPs of training")]
    wall_seconds: float
    peak_memory_bytes: Bytes | None
    best: Annotated[Best | None, Field(description="With training.keep_best: the checkpoint that --step best takes")]
    weights_sha256: Annotated[str, Field(description="Over names, dtypes, shapes and bytes of all final weights")]
    phases: list[PhaseSummary]


class Memory(_Record):
    """Bytes of the device while a step of a phase runs. The parts need not peak together."""

    weights: Bytes
    gradients: Bytes
    optimizer: Bytes
    activations: Annotated[Bytes, Field(description="Kept for the backward pass of one micro-batch")]
    logits: Annotated[Bytes, Field(description="What the loss adds on top")]
    peak: Bytes
    waiting: Annotated[Bytes, Field(description="Of Stacks that are not on the device")]


class FlopsByKind(_Record):
    """Floating-point operations by what they are for."""

    forward: float
    head: float
    backward: float
    recomputation: float
    dequantisation: float
    cache: float
    optimizer: float


class PlannedValidation(_Record):
    """What scoring the validation text takes."""

    times: Annotated[int, Field(description="Validations in the phase")]
    tokens: Annotated[int, Field(description="Scored in all of them, at most")]
    memory_bytes: Annotated[Bytes, Field(description="Peak of the device meanwhile")]
    flops: Annotated[float, Field(description="Of all of them; not among the phase's flops")]
    seconds: float | None


class PlannedPhase(_Record):
    """A phase before it runs."""

    name: str
    stack: int | None
    stacks: Annotated[list[int], Field(description="Ids of those that run, left to right")]
    trains: Annotated[list[str], Field(description="Parts that train: embedding, norm, head, stack.N, stack.N/NAME")]
    steps: int
    trainable_parameters: int
    memory_bytes: Memory
    host_memory_bytes: Annotated[Bytes, Field(description="Of an accelerator's host")]
    cache_bytes: Annotated[Bytes, Field(description="Of the activation cache on disk")]
    flops: float
    flops_by_kind: FlopsByKind
    seconds: Annotated[float | None, Field(description="At the speed taken; null where that is not known")]
    tokens: int
    validation: PlannedValidation


class MachineRecord(_Record):
    """What a plan is for. null: not known, and no limit."""

    name: str
    compute_dtype: str
    memory_bytes: Annotated[int | None, Field(description="That tensors can have")]
    host_memory_bytes: int | None
    disk_bytes: int | None
    flops_per_second: float | None
    rate: Annotated[str, Field(description="Where flops_per_second is from: data sheet, measured here, given")]
    reached_flops_per_second: Annotated[float | None, Field(description="That training is taken to reach")]


class TotalValidation(_Record):
    """All validations of a run."""

    peak_memory_bytes: Bytes
    flops: float
    seconds: float | None


class Totals(_Record):
    """A whole run, before it runs."""

    peak_memory_bytes: Annotated[Bytes, Field(description="Of the device, steps and validation")]
    host_memory_bytes: Bytes
    flops: Annotated[float, Field(description="True FLOPs of training")]
    disk_bytes: Annotated[Bytes, Field(description="Checkpoints and activation cache, at most")]
    validation: TotalValidation
    seconds: Annotated[float | None, Field(description="Training and validation; null where the speed is not known")]
    fits: Annotated[bool | None, Field(description="null where the device does not say how much memory it has")]


class RecipePlan(_Record):
    """A recipe by its plan; of one that is refused, there is the reason alone."""

    recipe: str
    refused: Annotated[str | None, Field(description="Why it does not go with the config")]
    missing: NotRequired[Annotated[list[str], Field(description="What there is not enough of")]]
    peak_memory_bytes: NotRequired[Bytes]
    host_memory_bytes: NotRequired[Bytes]
    flops: NotRequired[float]
    disk_bytes: NotRequired[Bytes]
    validation: NotRequired[TotalValidation]
    seconds: NotRequired[float | None]
    fits: NotRequired[bool | None]


class ChangePlan(Totals):
    """Settings with which the run fits, and its plan then."""

    recipe: Annotated[str | None, Field(description="null: the config's own curriculum")]
    overrides: Annotated[list[str], Field(description="As a command line takes them: key.path=value")]


class Plan(Totals):
    """``stackwise plan --json``."""

    phases: list[PlannedPhase]
    machine: MachineRecord
    recipes: NotRequired[
        Annotated[list[RecipePlan], Field(description="With --recipes, or where the run does not fit")]
    ]
    recommended: NotRequired[Annotated[str | None, Field(description="The best recipe that fits")]]
    change: NotRequired[Annotated[ChangePlan | None, Field(description="Where no recipe fits as it is")]]


class SourceScore(Score):
    """The validation text of one source of a mixture."""

    tokens: Annotated[int, Field(description="Predicted, over which the loss is the mean")]
    nelbo: NotRequired[Annotated[Nelbo, Field(description="Where the loss is a bound")]]


class Evaluation(Score):
    """``stackwise eval --json``."""

    step: Annotated[int, Field(description="Of the checkpoint")]
    objective: str
    tokens: Annotated[int, Field(description="Predicted, over which the loss is the mean")]
    nelbo: NotRequired[Annotated[Nelbo, Field(description="Where the loss is a bound")]]
    sources: NotRequired[Annotated[dict[str, SourceScore], Field(description="Of a mixture, each source for itself")]]
    pseudo_perplexity: NotRequired[Annotated[float, Field(description="mlm: each token masked alone")]]
    pseudo_perplexity_tokens: NotRequired[Annotated[int, Field(description="Over how many")]]
    given: Annotated[dict[str, int], Field(description="Tokens of the text that are not predicted, by kind")]
    unigram_bits_per_byte: Annotated[float, Field(description="Entropy of the same tokens")]
    bigram_bits_per_byte: Annotated[float, Field(description="Entropy of the same tokens, each after the one before")]


class Interval(_Record):
    """A score, and where the middle 95 % of it lie when the rows are drawn again; null where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


class Mistake(_Record):
    """A row whose label was not predicted; of regression, one of the largest errors."""

    where: Annotated[str, Field(description="File and line")]
    texts: list[str]
    row: Annotated[int, Field(description="Its number, from 0")]
    label: str | float
    predicted: str | float
    probability: NotRequired[Annotated[float, Field(description="That the run gave to what it predicted")]]


class LabelScores(_Record):
    """``stackwise eval --json`` of a run that has learnt labels."""

    step: Annotated[int, Field(description="Of the checkpoint")]
    objective: str
    rows: int
    truncated: Annotated[int, Field(description="Rows that were longer than training.seq_len and were cut")]
    metrics: Annotated[dict[str, Interval], Field(description="By the name of the score")]
    majority: NotRequired[Annotated[float, Field(description="Share of the commonest class")]]
    classes: NotRequired[list[str]]
    confusion: NotRequired[
        Annotated[list[list[int]], Field(description="Rows of each class (a row) taken for which (a column)")]
    ]
    wrong: Annotated[list[Mistake], Field(description="The surest mistakes, or the largest errors")]


class ComparedPhase(PhaseSummary):
    """A phase of a run that is compared."""

    fell: Annotated[bool, Field(description="Whether its validation loss ends below that of the phase before")]


class ComparedRun(_Record):
    """A run of a comparison."""

    seed: int
    run: Annotated[
        str, Field(pattern=r"^[\w.-]*\w$", max_length=200, description="Its folder in that of the comparison")
    ]
    validation: Score
    nelbo: NotRequired[Nelbo]
    tokens: int
    flops: float
    wall_seconds: float
    peak_memory_bytes: Bytes | None
    weights_sha256: str
    phases: list[ComparedPhase]


class Spread(_Record):
    """Mean and deviation over seeds; null where runs have no such number."""

    mean: float | None
    deviation: Annotated[float | None, Field(description="Of the sample (n - 1); null for one seed")]


class KnownSpread(_Record):
    """Mean and deviation of what every run has."""

    mean: float
    deviation: float | None


class ComparedRecipe(_Record):
    """A recipe and its runs."""

    recipe: str
    loss: KnownSpread
    bits_per_byte: Spread
    peak_memory_bytes: Spread
    wall_seconds: KnownSpread
    flops: KnownSpread
    flops_by_kind: Annotated[dict[str, Annotated[float, Field(ge=0.0)]], Field(min_length=1)]
    runs: Annotated[list[ComparedRun], Field(min_length=1)]
    ties: Annotated[list[str], Field(description="Recipes that differ by no more than the deviation over seeds")]


class Compared(_Record):
    """``stackwise compare --json``, and ``compare.json`` in its folder."""

    budget_flops: Annotated[float, Field(description="That each run may take")]
    seeds: list[int]
    measure: Annotated[Literal["bits_per_byte", "loss"], Field(description="By which recipes are ranked")]
    bound: Annotated[bool, Field(description="Whether that measure is an upper bound")]
    recipes: Annotated[list[ComparedRecipe], Field(min_length=1, description="Best first")]
    verdict: Annotated[str, Field(description="Which recipe to use under which memory, in a sentence")]


class Generated(_Record):
    """``stackwise generate --json``; a list of them where there are several prompts."""

    prompt: str
    seed: int
    text: Annotated[str, Field(description="What follows the prompt; of filling, the whole text")]


class Demo(Summary):
    """``stackwise demo --json``."""

    evaluation: Evaluation
    sample: str


class Recipe(_Record):
    """An entry of ``stackwise recipes --json``."""

    name: str
    summary: str
    source: str


class Exported(_Record):
    """``stackwise export --json``."""

    architecture: Annotated[str, Field(description="Class of transformers, or of the source beside the weights")]
    remote_code: Annotated[bool, Field(description="Whether it needs trust_remote_code")]
    auto_class: str
    parameters: int


class Imported(_Record):
    """``stackwise import --json``."""

    family: str
    stacks: int
    blocks: int
    parameters: int


class Joined(_Record):
    """``stackwise join --json``."""

    stacks: int
    parameters: int


class MigratedFile(_Record):
    """A config that was rewritten."""

    old: str
    new: str
    moved: Annotated[list[str], Field(description="old → new of settings with another key or spelling")]
    differs: Annotated[list[str], Field(description="What could not be carried over as it was")]
    left_out: Annotated[dict[str, str], Field(description="Old keys on which nothing depends, and why")]


class Migration(_Record):
    """``stackwise migrate --json``."""

    files: list[MigratedFile]


class Doctor(_Record):
    """``stackwise doctor --json``: sizes in bytes, speeds in FLOP/s, null where the system does not tell."""

    stackwise: Annotated[str, Field(description="Version")]
    python: dict[str, str]
    platform: str
    torch: dict[str, str | int | None]
    cpu: dict[str, str | int | None]
    memory: dict[str, int | None]
    resident_peak_measurable: bool
    disk: dict[str, int]
    cache: dict[str, str | int]
    accelerators: list[dict[str, str | int | bool | None]]
    compute: dict[str, str | dict[str, float]]
    extras: Annotated[dict[str, dict[str, str | None]], Field(description="Packages of each extra, and their versions")]


RECORDS: tuple[Any, ...] = (
    Metrics, Summary, Plan, Evaluation, LabelScores, Compared, Generated, Demo, Recipe, Exported, Imported, Joined,
    Migration, Doctor,
)  # fmt: skip
"""The records that a file or a command gives; the others are parts of them."""


def check(value: Any, record: Any) -> None:
    """pydantic's ValidationError where ``value`` is not a ``record``, or not a list of them."""
    several = isinstance(value, list)
    TypeAdapter(list[record] if several else record).validate_python(value)


def schema() -> dict[str, Any]:
    """JSON Schema of all records, by name, under ``$defs``."""
    inputs: list[Any] = [(record.__name__, "validation", TypeAdapter(record)) for record in RECORDS]
    _, found = TypeAdapter.json_schemas(inputs, title="StackWise outputs")
    return found


def reference() -> str:
    """The page on all records, in Markdown."""
    found = schema()["$defs"]
    lines = ["# JSON outputs and run files", "", *(__doc__ or "").split("\n\n", 1)[1].strip().splitlines()]
    for name in (*(record.__name__ for record in RECORDS), *sorted(set(found) - {r.__name__ for r in RECORDS})):
        about = found[name]
        lines += ["", f"## {name}", "", about.get("description", ""), "", "| key | type | meaning |", "|---|---|---|"]
        for key, field in about["properties"].items():
            optional = "" if key in about["required"] else " (not always there)"
            lines.append(f"| `{key}` | {_type(field)} | {field.get('description', '')}{optional} |")
    return "\n".join(lines).replace("``", "`") + "\n"


def _type(field: dict[str, Any]) -> str:
    """A JSON Schema type in words."""
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field:
        return " or ".join(_type(part) for part in field["anyOf"])
    if "enum" in field:
        return " or ".join(json.dumps(value) for value in field["enum"])
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    if field["type"] == "object":
        return f"object of {_type(field['additionalProperties'])}"
    return str(field["type"])


def main(folder: str) -> None:
    """Writes the page and the schema into ``folder``."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "json.md").write_text(reference(), encoding="utf-8")
    Path(folder, "outputs.schema.json").write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
