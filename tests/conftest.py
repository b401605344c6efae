"""What every test is held to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from stackwise import outputs
from stackwise.cli import results
from stackwise.store.rundir import RunDir


@pytest.fixture(autouse=True, scope="session")
def outputs_are_as_documented() -> Iterator[None]:
    """JSON that a command prints, and files that a run writes, in this process, have the keys that are documented."""
    shown, summary, metrics = results.print_json, RunDir.write_summary, RunDir.append_metrics

    def print_json(value: Any, record: str) -> None:
        outputs.check(json.loads(json.dumps(value)), getattr(outputs, record))
        shown(value, record)

    def write_summary(self: RunDir, value: dict[str, Any]) -> None:
        outputs.check(json.loads(json.dumps(value)), outputs.Summary)
        summary(self, value)

    def append_metrics(self: RunDir, value: dict[str, Any]) -> None:
        outputs.check(value, outputs.Metrics)
        metrics(self, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "print_json", print_json)
        patch.setattr(RunDir, "write_summary", write_summary)
        patch.setattr(RunDir, "append_metrics", append_metrics)
        yield


@pytest.fixture
def any_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what keeps records, with records of a key or two: they are not held to what is documented."""
    monkeypatch.setattr(outputs, "check", lambda value, record: None)
