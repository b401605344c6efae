"""The picture of a run, drawn from the files of a run that never was."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from stackwise.cli.main import main
from stackwise.config.base import StackWiseConfig
from stackwise.errors import RunError, UserError
from stackwise.report.chart import Axis, Chart, short, smoothed, thinned
from stackwise.report.document import write_report
from stackwise.report.theme import COLOURS, picture_css
from stackwise.store.rundir import RunDir
from stackwise.store.state import PhaseRecord

NAMES = ["stack 0", "stack 1", "stack 2", "joint"]
UNKNOWN = {"tokens_per_second": 1.0, "mfu": None, "memory_bytes": None}
SPACE = "{http://www.w3.org/2000/svg}"


def made_up_run(folder: Path, *, steps: int = 7, **training: Any) -> Path:
    """Three Stacks, frozen trunk, a joint phase: ``steps`` steps each, step FLOPs 3, 4, 5 and 9."""
    config = StackWiseConfig.from_dict(
        {
            "model": {"vocab_size": 37, "architecture": {"n_stacks": 3, "blocks_per_stack": 1}},
            "training": {
                "max_steps": 4 * steps,
                "device": "cpu",
                "progressive": {"trunk_strategy": "frozen", "joint_fraction": 0.25},
                **training,
            },
        }
    )
    run = RunDir.create(folder, config.to_yaml())
    records, step, flops = [], 0, 0.0
    for k, (name, cost) in enumerate(zip(NAMES, (3e9, 4e9, 5e9, 9e9))):
        for left in reversed(range(steps)):
            step, flops = step + 1, flops + cost
            line = {"step": step, "phase": name, "loss": 5 - math.log(step), "flops": flops, "tokens": 11 * step}
            line |= {} if left else {"validation_loss": 4.5 - 0.6 * k}
            run.append_metrics({**line, "stack": None, "lr": 0.01, "grad_norm": 1.0, **UNKNOWN})
        record = asdict(PhaseRecord(name, None, steps, tokens=11 * steps, flops=steps * cost))
        records.append({**record, "validation_loss": 4.5 - 0.6 * k, "bits_per_byte": 2.125 - 0.25 * k})
    scores = {"loss": 2.7, "perplexity": math.exp(2.7), "bits_per_byte": 1.375}
    totals = {"flops": flops, "tokens": 11 * step, "wall_seconds": 1.5, "peak_memory_bytes": None, "best": None}
    run.write_summary({**totals, "weights_sha256": "", "validation": scores, "phases": records})
    return folder


def drawn(run: Path) -> str:
    out = run.parent / f"{run.name}.svg"
    assert main(["report", str(run), "--out", str(out)]) == 0
    return out.read_text()


def words(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter(f"{SPACE}text")]


def test_the_picture_is_a_small_svg_whose_words_say_the_phases_and_bits_per_byte(tmp_path: Path) -> None:
    svg = drawn(made_up_run(tmp_path / "run", steps=97))
    assert ElementTree.fromstring(svg).tag == f"{SPACE}svg" and len(svg.encode()) < 40_000
    assert {"2.125", "1.875", "1.625", "1.375", *NAMES, "validation, in bits per byte"} <= set(words(svg))


def test_every_stack_of_every_phase_is_a_box_in_the_colour_of_its_state(tmp_path: Path) -> None:
    svg = drawn(made_up_run(tmp_path / "run"))
    in_legend = 1
    # New: one a phase of growth. Frozen: stack 0 beside stack 1, both beside stack 2. Training: all three at the end.
    boxes = [node.get("class") for node in ElementTree.fromstring(svg).iter(f"{SPACE}rect")]
    assert [boxes.count(f"f-{state}") - in_legend for state in ("new", "frozen", "trained")] == [3, 3, 3]


def test_boxes_are_as_wide_as_their_share_of_the_flops(tmp_path: Path) -> None:
    root = ElementTree.fromstring(drawn(made_up_run(tmp_path / "run")))
    lowest = [n for n in root.iter(f"{SPACE}rect") if (n.findtext(f"{SPACE}title") or "").count("Stack 0,") == 1]
    gap = 1.6
    widths = np.array([float(node.get("width") or 0) + gap for node in lowest])
    assert widths / widths.sum() == pytest.approx(np.array([3, 4, 5, 9]) / 21, abs=0.002)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "run")
    assert drawn(run) == drawn(run)


def test_a_masked_run_shows_nats_since_it_has_no_bits_per_byte(tmp_path: Path) -> None:
    run = RunDir(made_up_run(tmp_path / "run"))
    summary = run.read_summary()
    for record in summary["phases"]:
        record["bits_per_byte"] = None
    run.write_summary(summary)
    assert {"validation, in nats per token", "4.500"} <= set(words(drawn(run.path)))


def test_a_folder_that_is_no_run_a_run_of_other_phases_and_a_bad_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such run"):
        write_report([tmp_path / "none"], tmp_path / "p.svg")
    with pytest.raises(UserError, match=r"is not a run: it has no config\.yaml"):
        write_report([tmp_path], tmp_path / "p.svg")
    run = made_up_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"a picture is of one run"):
        write_report([run, run], tmp_path / "p.svg")
    with pytest.raises(UserError, match=r"No such file or directory"):
        write_report([run], tmp_path / "none" / "p.svg")
    other = StackWiseConfig.from_yaml(run / "config.yaml").changed({"training.strategy": "end_to_end"})
    (run / "config.yaml").write_text(other.to_yaml())
    with pytest.raises(RunError, match=r"their phases differ"):
        write_report([run], tmp_path / "p.svg")
    assert not (tmp_path / "p.svg").exists()


# ---- parts of charts


def test_smoothing_keeps_a_constant_and_averages_what_came_before() -> None:
    assert smoothed(np.full(5, 3.0), 4.0) == pytest.approx(np.full(5, 3.0))
    # decay 1/2: weights 1; 1/2, 1; 1/4, 1/2, 1
    expected = [2.0, (1 + 8) / 1.5, (0.5 + 4 + 5) / 1.75]
    assert smoothed(np.array([2.0, 8.0, 5.0]), 2.0) == pytest.approx(expected)
    assert smoothed(np.array([2.0, 8.0]), 0.5).tolist() == [2.0, 8.0]


def test_a_thinned_line_has_the_means_of_neighbours() -> None:
    x, y = thinned(np.arange(900.0), np.arange(900.0) ** 2)
    assert len(x) == 300 and x[:2].tolist() == [1.0, 4.0] and y[1] == pytest.approx((9 + 16 + 25) / 3)
    assert [column.tolist() for column in thinned(np.array([5.0]), np.array([7.0]))] == [[5.0], [7.0]]


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0.0, 1e12), ["0", "200G", "400G", "600G", "800G", "1T"]),
        (Axis(1.83, 2.01), ["1.85", "1.9", "1.95", "2"]),
        (Axis(0.0, 13 * 2**20, scale=2**20), ["0", "5", "10"]),
        (Axis(1e3, 3e6, log=True), ["1000", "10k", "100k", "1M"]),
        (Axis(-0.0001, 0.0011), ["0", "0.0002", "0.0004", "0.0006", "0.0008", "0.001"]),
    ],
)
def test_ticks_are_round_and_within_the_axis(axis: Axis, ticks: list[str]) -> None:
    found = axis.ticks(6 if axis.low == 0.0 or axis.low < 0 else 5)
    assert [short(value / axis.scale) for value in found][: len(ticks)] == ticks
    assert all(axis.low <= value <= axis.high for value in found)


def test_a_point_lies_where_its_numbers_say() -> None:
    chart = Chart("", Axis(0.0, 10.0), Axis(1.0, 100.0, log=True), width=258.0, height=166.0)  # 200 by 100 within
    assert chart.at(0.0, 1.0) == (46.0, 128.0)
    assert chart.at(5.0, 10.0) == pytest.approx((146.0, 78.0))
    assert chart.at(10.0, 100.0) == pytest.approx((246.0, 28.0))


def test_names_of_close_points_do_not_lie_on_each_other() -> None:
    chart = Chart("", Axis(0.0, 1.0), Axis(0.0, 1.0))
    chart.names([(0.5, 0.5, "first", "s0"), (0.5, 0.501, "second", "s1"), (0.51, 0.499, "third", "s2")])
    places = [
        (float(node.get("x") or 0), float(node.get("y") or 0), len(node.text or ""))
        for node in ElementTree.fromstring(chart.svg()).iter("text")
        if node.text in ("first", "second", "third")
    ]
    assert len(places) == 3
    for i, (x, y, letters) in enumerate(places):
        for other_x, other_y, others in places[i + 1 :]:
            beside = x + 6 * letters <= other_x or other_x + 6 * others <= x
            assert beside or abs(y - other_y) >= 11


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [0, 1])
def test_words_and_lines_stand_out_from_the_paper(dark: int) -> None:
    paper = luminance(COLOURS["paper"][dark])
    for name, least in (("ink", 12.0), ("faint", 4.5), *((f"s{i}", 3.5) for i in range(8))):
        there = luminance(COLOURS[name][dark])
        contrast = (max(paper, there) + 0.05) / (min(paper, there) + 0.05)
        assert contrast >= least, f"{name}: {contrast:.2f}"
        assert COLOURS[name][dark] in picture_css()
