"""The records that programs read: documented, and the documents made from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from stackwise import outputs

FOLDER = Path(__file__).parents[1] / "docs/reference"
LINE = {
    "step": 3, "phase": "stack 0", "stack": 0, "tokens": 9, "loss": 1.5, "lr": 0.1, "grad_norm": 2.0,
    "tokens_per_second": 10.0, "mfu": None, "memory_bytes": None, "flops": 12.0,
}  # fmt: skip


def test_the_documents_are_those_that_the_records_make(tmp_path: Path) -> None:
    outputs.main(str(tmp_path))
    for name in ("json.md", "outputs.schema.json"):
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text(), (
            f"{name}: run python -m stackwise.outputs docs/reference"
        )


def test_a_key_that_is_not_documented_fails_and_so_does_one_that_is_missing() -> None:
    outputs.check(LINE, outputs.Metrics)
    outputs.check([LINE, {**LINE, "validation_loss": 1.0}], outputs.Metrics)
    with pytest.raises(ValidationError, match="temperature"):
        outputs.check({**LINE, "temperature": 1.0}, outputs.Metrics)
    with pytest.raises(ValidationError, match="grad_norm"):
        outputs.check({key: value for key, value in LINE.items() if key != "grad_norm"}, outputs.Metrics)
    with pytest.raises(ValidationError, match="loss"):
        outputs.check({**LINE, "loss": "1.5"}, outputs.Metrics)


def test_the_schema_says_what_is_required_and_allows_nothing_else() -> None:
    found = json.loads((FOLDER / "outputs.schema.json").read_text())["$defs"]
    assert set(found["Metrics"]["required"]) == set(LINE)
    assert all(not record["additionalProperties"] for record in found.values())
    assert {record.__name__ for record in outputs.RECORDS} <= set(found)
