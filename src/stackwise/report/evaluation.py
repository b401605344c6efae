"""What ``stackwise eval --json`` says of a run, kept as ``RUN/evaluation.json``: scores, confusion, wrong examples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stackwise.errors import RunError
from stackwise.reading import read_object
from stackwise.report.html import Html, element, joined, table

FILE = "evaluation.json"
MOST_CLASSES, MOST_WRONG, MOST_LETTERS = 30, 20, 600
"""Classes of a confusion table, wrong examples, and letters of each, that are shown."""


class Interval(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    value: float | None
    low: float | None = None
    high: float | None = None


class Wrong(BaseModel):
    """An example that was taken for something else."""

    model_config = ConfigDict(strict=True)

    label: str | float
    predicted: str | float
    probability: float | None = None
    where: str | None = None
    texts: list[str] = []


class Evaluation(BaseModel):
    """What is shown of an evaluation; its other numbers are ``model_extra``."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    curve: list[Annotated[list[float | None], Field(min_length=2)]] = []
    metrics: dict[str, Interval] = {}
    classes: list[str] = []
    confusion: list[list[int]] = []
    wrong: list[Wrong] = []

    @property
    def points(self) -> list[tuple[float, float]]:
        """(share that is masked, mean cross-entropy) of masked diffusion."""
        return [(point[0], point[1]) for point in self.curve if point[0] is not None and point[1] is not None]


def read_evaluation(folder: Path) -> Evaluation | None:
    """None where there is none. RunError where it is none that ``stackwise eval --json`` printed."""
    path = folder / FILE
    try:
        return Evaluation.model_validate(read_object(path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RunError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error


def scores_of(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, number) of the validation in a summary."""
    scores = summary["validation"]
    if scores is None:
        return []
    limit = "≤ " if "nelbo" in summary else ""
    if scores["perplexity"] is None:  # of numbers, not of tokens or classes
        return [("validation loss", f"{scores['loss']:.4f}")]
    found = [("validation, nats per token", limit + f"{scores['loss']:.4f}")]
    if scores["bits_per_byte"] is not None:
        found.insert(0, ("bits per byte", limit + f"{scores['bits_per_byte']:.4f}"))
    return found


def evaluation_section(found: Evaluation | None) -> Html | None:
    """Scores, the confusion of classes and the wrong examples, as far as there are any."""
    if found is None:
        return None
    return joined([_scores(found), _confusion(found), _wrong(found)])


def _scores(found: Evaluation) -> Html | None:
    rows = [
        [name, _number(score.value), "–" if score.low is None else f"{_number(score.low)} to {_number(score.high)}"]
        for name, score in found.metrics.items()
    ]
    if rows:
        return table(("score", "value", "95 % interval"), rows)
    rows = [
        [name.replace("_", " "), _number(value)]
        for name, value in (found.model_extra or {}).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return table(("score", "value"), rows) if rows else None


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _confusion(found: Evaluation) -> Html | None:
    """True classes by rows, predicted ones by columns; the diagonal is what was right."""
    names = found.classes
    if not names or [len(row) for row in found.confusion] != [len(names)] * len(names):
        return None
    if len(names) > MOST_CLASSES:
        return element("p", f"The confusion table of {len(names)} classes is too large to be shown.", class_="note")
    rows = []
    for i, counts in enumerate(found.confusion):
        most = max(max(counts), 1)
        cells = [element("th", names[i], class_="words", scope="row")]
        for j, count in enumerate(counts):
            share = round(60 * count / most)
            colour = f"color-mix(in srgb,var(--{'s2' if i == j else 's3'}) {share}%,transparent)"
            cells.append(element("td", f"{count:,}", style=f"background:{colour}"))
        rows.append(element("tr", *cells))
    head = element("tr", element("th", "is, taken for →", class_="words"), *(element("th", name) for name in names))
    grid = element("table", element("thead", head), element("tbody", *rows), class_="confusion")
    return element("div", grid, class_="scroll", tabindex="0")


def _wrong(found: Evaluation) -> Html | None:
    if not found.wrong:
        return None
    rows = [
        [
            _shortened(" ⏎ ".join(example.texts) or example.where or "–"),
            _label(example.label),
            _label(example.predicted),
            "–" if example.probability is None else f"{example.probability:.0%}",
        ]
        for example in found.wrong[:MOST_WRONG]
    ]
    header = ("text", "is", "was taken for", "probability")
    return table(header, rows, long=0, caption="Examples that are farthest from right")


def _label(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _shortened(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…"
