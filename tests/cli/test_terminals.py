"""Tables on terminals of 80 and 120 columns: fewer columns, and no number cut."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stackwise.cli import results
from stackwise.cli.main import main

PHASE = {
    "name": "stack 2, from the cache", "stack": 2, "steps": 1200, "tokens": 4915200, "flops": 1.234e15,
    "first_loss": 4.5678,
    "last_loss": 2.3456, "objective": "clm", "validation_loss": 2.4567, "bits_per_byte": 1.3579, "storage": None,
    "trainable_parameters": 123456789, "peak_memory_bytes": 1234567890, "seconds": 4321.0,
    "stopped_early": None,
}  # fmt: skip
SUMMARY: dict[str, Any] = {
    "validation": {"loss": 2.4567, "perplexity": 11.67, "bits_per_byte": 1.3579}, "tokens": 4915200, "flops": 1.2e15,
    "wall_seconds": 5000.0, "peak_memory_bytes": 1234567890, "weights_sha256": "0" * 64, "best": None,
    "phases": [PHASE] * 3,
}  # fmt: skip
CONFIG = """
model: {d_model: 26, n_heads: 13, d_ff: 34, vocab_size: 31, architecture: {n_stacks: 3, blocks_per_stack: 1}}
training: {batch_size: 6, seq_len: 11, max_steps: 60000, device: cpu}
"""


@pytest.fixture(params=[80, 120])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A terminal of so many columns."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(request.param))
    width: int = request.param
    return width


def lines(text: str, columns: int) -> list[str]:
    """What is shown; every line of a table must fit, and no cell may be cut."""
    shown = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    header = next(i for i, line in enumerate(shown) if re.match(r"(phase|recipe)\b", line))
    end = next((i for i in range(header, len(shown)) if not shown[i].strip() or shown[i].startswith("(")), len(shown))
    assert all(len(line.rstrip()) <= columns for line in shown[header:end]), "\n".join(shown)
    assert "…" not in text.replace("RUN…", "")
    return shown


def test_the_table_at_the_end_of_a_run(columns: int, capsys: pytest.CaptureFixture[str]) -> None:
    results.show_summary(SUMMARY, Path("runs/a"), as_json=False)
    shown = lines(capsys.readouterr().err, columns)
    row = next(line for line in shown if line.startswith("stack 2"))
    assert "2.4567" in row and "1.3579" in row
    assert ("123,456,789" in row) == (columns == 120)
    assert any(re.match(r"\(a wider terminal shows .*trains.* too\)", line) for line in shown) == (columns == 80)


def test_the_table_of_a_plan(columns: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    assert main(["plan", str(tmp_path / "c.yaml"), "--recipes", "append-frozen", "--memory", "100kB"]) == 0
    shown = lines(capsys.readouterr().out, columns)
    header, *rows = shown[:4]
    assert header.split()[0] == "phase" and header.split()[-1] == "peak" and "time" in header and "steps" in header
    assert all(re.search(r"\d kB$|\d MB$", row) for row in rows), rows
    assert any(line.startswith("of that, validation: 3 times, at most ") for line in shown)
    recipes = next(i for i, line in enumerate(shown) if line.startswith("recipe"))
    assert "no: device memory" in shown[recipes + 1] and len(shown[recipes + 1].rstrip()) <= columns
