"""What a person sees of a run, at 80 and at 120 columns."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from stackwise.store.state import RunState
from stackwise.training import progress
from stackwise.training.progress import LineReporter, LiveReporter, Pace, clock_time

METRICS = {"step": 12345, "loss": 3.14159, "lr": 4e-3, "tokens_per_second": 123456.7, "mfu": 0.35}


def shown(columns: int, steps: int = 20000) -> str:
    """The last bar that a terminal of so many columns shows, of a run with 1:02:03 to go."""
    written = io.StringIO()
    reporter = LiveReporter(Console(width=columns, force_terminal=True, file=written, legacy_windows=False))
    reporter.phase("phase 1/3", steps, 0)
    reporter.remaining(3723.4)
    reporter.step(steps * 3 // 5, METRICS)
    reporter._bar.refresh()
    frames = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue()))
    reporter.close()
    return [frame.rstrip() for frame in frames if frame.strip()][-1]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("steps", [20, 20000, 2000000])
def test_the_bar_fits_and_cuts_no_number(columns: int, steps: int) -> None:
    line = shown(columns, steps)
    assert len(line) <= columns and "…" not in line
    assert f"{steps * 3 // 5}/{steps}" in line.replace(" /", "/") and "60 %" in line and "run ends in 1:02:03" in line
    assert "loss 3.142" in line or (columns, steps) == (80, 2000000)


def test_a_wide_terminal_shows_all_metrics() -> None:
    assert shown(120).endswith("loss 3.142  123,457 tokens/s  lr 4.00e-03  MFU 35 %")
    assert "MFU" not in shown(80)


def test_plain_lines_say_the_share_of_the_phase_and_when_the_run_ends(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = LineReporter(interval=0.0)
    reporter.phase("phase 1/3", 40, 0)
    reporter.remaining(125.0)
    reporter.step(10, METRICS)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "  10/40  25 %  run ends in 2:05  loss 3.142  123,457 tokens/s  lr 4.00e-03  MFU 35 %"
    )


def test_a_run_ends_when_the_rest_of_its_flops_is_done_at_the_pace_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    state = RunState(flops=30.0)
    pace = Pace(state, 170.0)
    assert pace.left() is None
    state.flops, now = 50.0, 104.0  # 20 FLOPs in 4 seconds, and 120 to go
    assert pace.left() == pytest.approx(24.0)
    state.flops = 171.0
    assert pace.left() == 0.0


def test_times_read_as_on_a_clock() -> None:
    assert [clock_time(s) for s in (0.2, 59.6, 61, 3599, 3723.4, 360000)] == [
        "0:00", "1:00", "1:01", "59:59", "1:02:03", "100:00:00",
    ]  # fmt: skip
