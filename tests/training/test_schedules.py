"""Learning rates against values worked out by hand."""

import math

import pytest

from stackwise.config import StackWiseConfig
from stackwise.growth.curricula import build_phases
from stackwise.growth.phases import Schedule
from stackwise.training.schedules import lr_ratio


def ratios(steps, n_stacks=2, **schedule):
    """The share of the peak rate at each step of each phase."""
    config = StackWiseConfig.from_dict(
        {
            "model": {"d_model": 26, "n_heads": 13, "architecture": {"n_stacks": n_stacks}},
            "training": {"strategy": "progressive", "max_steps": steps, "schedule": schedule},
        }
    )
    return [[lr_ratio(p.schedule, s) for s in range(p.steps)] for p in build_phases(config)]


def test_wsd_over_one_phase():
    (got,) = ratios(10, 1, kind="wsd", warmup_steps=4, decay_fraction=0.3, min_lr_ratio=0.1)
    assert got == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.7, 0.4, 0.1])


def test_wsd_over_the_run_decays_once_and_warms_up_again():
    got = ratios(10, kind="wsd", span="run", warmup_steps=2, rewarmup_steps=2, decay_fraction=0.4, min_lr_ratio=0.2)
    assert got[0] == pytest.approx([0.5, 1, 1, 1, 1])
    assert got[1] == pytest.approx([0.5, 0.8, 0.6, 0.4, 0.2])


def test_a_decay_that_starts_in_an_earlier_phase_goes_on_in_the_next():
    got = ratios(10, kind="wsd", span="run", warmup_steps=0, rewarmup_steps=2, decay_fraction=0.8, min_lr_ratio=0.2)
    assert got[0] == pytest.approx([1, 1, 0.9, 0.8, 0.7])
    assert got[1] == pytest.approx([0.6 / 2, 0.5, 0.4, 0.3, 0.2])


def test_wsd_within_every_phase():
    got = ratios(10, kind="wsd", span="phase", warmup_steps=1, rewarmup_steps=2, decay_fraction=0.4, min_lr_ratio=0.0)
    assert got[0] == pytest.approx([1, 1, 1, 0.5, 0])
    assert got[1] == pytest.approx([0.5, 1, 1, 0.5, 0])


def cosine(progress, low):
    return low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2


def test_cosine_over_one_phase():
    (got,) = ratios(6, 1, kind="cosine", warmup_steps=2, min_lr_ratio=0.1)
    assert got == pytest.approx([0.5, 1, cosine(0.25, 0.1), 0.55, cosine(0.75, 0.1), 0.1])


def test_cosine_over_the_run_is_one_curve_times_the_warm_ups():
    got = ratios(10, kind="cosine", span="run", warmup_steps=2, rewarmup_steps=3, min_lr_ratio=0.1)
    curve = [cosine(max(0, s - 1) / 8, 0.1) for s in range(10)]
    assert got[0] == pytest.approx([curve[0] / 2, *curve[1:5]])
    assert got[1] == pytest.approx([curve[5] / 3, curve[6] * 2 / 3, *curve[7:]])


def test_cosine_within_every_phase():
    got = ratios(10, kind="cosine", span="phase", warmup_steps=1, rewarmup_steps=3, min_lr_ratio=0.2)
    assert got[0] == pytest.approx([1, cosine(1 / 4, 0.2), 0.6, cosine(3 / 4, 0.2), 0.2])
    assert got[1] == pytest.approx([1 / 3, 2 / 3, 1, 0.6, 0.2])


@pytest.mark.parametrize("span", ["run", "phase"])
def test_constant_only_warms_up(span):
    got = ratios(6, kind="constant", span=span, warmup_steps=3, rewarmup_steps=2, min_lr_ratio=0.1)
    assert got[0] == pytest.approx([1 / 3, 2 / 3, 1])
    assert got[1] == pytest.approx([1 / 2, 1, 1])


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
@pytest.mark.parametrize("span", ["run", "phase"])
@pytest.mark.parametrize("steps", [7, 23, 101])
def test_the_last_step_has_the_smallest_ratio_exactly(kind, span, steps):
    got = ratios(
        steps, 3 if steps > 7 else 1, kind=kind, span=span, warmup_steps=3, rewarmup_steps=2, min_lr_ratio=0.13
    )
    assert got[-1][-1] == pytest.approx(0.13, abs=1e-12)
    if span == "phase":
        assert [phase[-1] for phase in got] == pytest.approx([0.13] * len(got), abs=1e-12)


def test_no_step_of_a_warm_up_has_rate_zero_and_none_exceeds_the_peak():
    for warmup in (0, 1, 2, 3, 5, 50):
        got = ratios(22, kind="wsd", warmup_steps=warmup, rewarmup_steps=warmup, min_lr_ratio=0.1)
        assert all(0 < ratio <= 1 for phase in got for ratio in phase)


def test_a_warm_up_longer_than_its_phase_ends_with_it():
    got = ratios(8, kind="constant", warmup_steps=50, rewarmup_steps=50)
    assert got == [[0.25, 0.5, 0.75, 1.0]] * 2


def test_a_decay_of_no_steps_keeps_the_peak():
    assert lr_ratio(Schedule(0, "linear", 5, 5, 0.1), 4) == 1.0
