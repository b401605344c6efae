"""The picture of a run, drawn from the files of a run that never was."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from stackwise.config.base import StackWiseConfig
from stackwise.errors import UserError
from stackwise.report.picture import FROZEN, NEW, TRAINED, draw_run, smoothed
from stackwise.store.rundir import RunDir

NAMES = ["stack 0", "stack 1", "stack 2", "joint"]


def made_up_run(folder: Path, *, steps: int = 7, **training: Any) -> Path:
    """Three Stacks, frozen trunk, a joint phase: ``steps`` steps each, step FLOPs 3, 4, 5 and 9."""
    config = StackWiseConfig.from_dict(
        {
            "model": {"architecture": {"n_stacks": 3, "blocks_per_stack": 1}},
            "training": {
                "max_steps": 4 * steps,
                "progressive": {"trunk_strategy": "frozen", "joint_fraction": 0.25},
                **training,
            },
        }
    )
    run = RunDir.create(folder, config.to_yaml())
    records, step, flops = [], 0, 0.0
    for k, (name, cost) in enumerate(zip(NAMES, (3e9, 4e9, 5e9, 9e9))):
        for _ in range(steps):
            step, flops = step + 1, flops + cost
            run.append_metrics({"step": step, "phase": name, "loss": 5 - math.log(step), "flops": flops})
        record = {"name": name, "steps": steps, "flops": steps * cost}
        records.append({**record, "validation_loss": 4.5 - 0.6 * k, "bits_per_byte": 2.125 - 0.25 * k})
    run.write_summary({"flops": flops, "phases": records})
    return folder


def drawn(run: Path) -> str:
    out = run.parent / f"{run.name}.svg"
    draw_run(run, out)
    return out.read_text()


def test_the_picture_is_a_small_svg_whose_words_say_the_phases_what_trains_and_bits_per_byte(tmp_path: Path) -> None:
    svg = drawn(made_up_run(tmp_path / "run", steps=997))
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(svg.encode()) < 60_000
    words = {"".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"2.125", "1.875", "1.625", "1.375"} <= words
    assert set(NAMES) <= words and {"1 of 2 trains", "1 of 3 trains", "all trains"} <= words


def test_every_stack_of_every_phase_is_a_box_in_the_colour_of_its_state(tmp_path: Path) -> None:
    svg = drawn(made_up_run(tmp_path / "run"))
    in_legend = 1
    # New: one a phase of growth. Frozen: stack 0 beside stack 1, both beside stack 2. Training: all three at the end.
    assert [svg.count(f"fill: {colour}") - in_legend for colour in (NEW, FROZEN, TRAINED)] == [3, 3, 3]


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "run")
    assert drawn(run) == drawn(run)


def test_a_budget_in_flops_is_cut_into_the_phases_that_the_run_had(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "run", max_steps=None, max_flops=7 * 21e9)
    assert drawn(run) == drawn(made_up_run(tmp_path / "steps"))


def test_a_masked_run_shows_nats_since_it_has_no_bits_per_byte(tmp_path: Path) -> None:
    run = RunDir(made_up_run(tmp_path / "run"))
    summary = run.read_summary()
    for record in summary["phases"]:
        record["bits_per_byte"] = None
    run.write_summary(summary)
    svg = drawn(run.path)
    assert "validation, in nats per token" in svg and ">4.500<" in svg


def test_a_folder_that_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such run"):
        draw_run(tmp_path / "none", tmp_path / "p.svg")
    with pytest.raises(UserError, match=r"is not a run: it has no config\.yaml"):
        draw_run(tmp_path, tmp_path / "p.svg")
    run = made_up_run(tmp_path / "run")
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match=r"its training has not finished"):
        draw_run(run, tmp_path / "p.svg")
    assert not (tmp_path / "p.svg").exists()


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"No such file or directory"):
        draw_run(run, tmp_path / "none" / "p.svg")
    with pytest.raises(UserError, match=r"cannot be written as \.docx"):
        draw_run(run, tmp_path / "p.docx")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"pip install 'stackwise\[report\]'"):
        draw_run(tmp_path, tmp_path / "p.svg")


def test_smoothing_keeps_a_constant_and_averages_what_came_before() -> None:
    assert smoothed(np.full(5, 3.0), 4.0) == pytest.approx(np.full(5, 3.0))
    # decay 1/2: weights 1; 1/2, 1; 1/4, 1/2, 1
    expected = [2.0, (1 + 8) / 1.5, (0.5 + 4 + 5) / 1.75]
    assert smoothed(np.array([2.0, 8.0, 5.0]), 2.0) == pytest.approx(expected)
    assert smoothed(np.array([2.0, 8.0]), 0.5).tolist() == [2.0, 8.0]
