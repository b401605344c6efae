"""A phase made real: what entering a Stage prepares and leaving it lets go, and the loop around it."""

import gc
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import stackwise.training.loop
from stackwise.config import StackWiseConfig
from stackwise.model.architecture import create_rack_from_config
from stackwise.objectives import CausalObjective
from stackwise.planning.plan import plan_phases
from stackwise.runs.build import create_loop
from stackwise.training.memory import PeakMemory
from stackwise.training.progress import SilentReporter
from stackwise.training.sources import ProgressiveDataLoader, TokenSource
from stackwise.training.stage import Stage
from stackwise.training.step import take_step

V, B, T = 37, 3, 7
TOKENS = np.random.default_rng(0).integers(0, V, 503)


def a_loop(*overrides):
    settings = StackWiseConfig.from_dict(
        {
            "model": {
                "vocab_size": V, "d_model": 26, "n_heads": 13, "d_ff": 19,
                "architecture": {"n_stacks": 2, "blocks_per_stack": 1},
            },
            "training": {"batch_size": B, "seq_len": T, "max_steps": 6, "device": "cpu"},
        },
        overrides,
    )  # fmt: skip
    objective = CausalObjective()
    source = TokenSource(ProgressiveDataLoader(TOKENS, settings), objective)
    rack = create_rack_from_config(settings, n_stacks=0)
    return create_loop(
        settings, rack, plan_phases(settings, V), source, {"clm": objective}, SilentReporter(),
        PeakMemory(torch.device("cpu")),
    )  # fmt: skip


def test_entering_grows_and_freezes_and_leaving_keeps_the_moments_that_a_later_phase_uses():
    loop = a_loop("training.progressive.trunk_strategy=frozen")
    context, state = loop.context, loop.state
    with Stage(context, loop.phases, state) as first:
        assert [stack.stack_id for stack in context.rack.stacks] == [0]
        assert {name.partition("/")[0] for name in first.parameters} == {"embedding", "stack.0", "norm", "head"}
        step = take_step(first, state)
        assert step.tokens == B * T and step.loss == pytest.approx(np.log(V), rel=0.2)
        moments = {name: entry["exp_avg"].clone() for name, entry in first.moments().items()}
        optimizer = weakref.ref(first.optimizer)
    # The second phase trains neither the embedding nor Stack 0.
    assert {name.partition("/")[0] for name in context.moments} == {"norm", "head"}
    del first
    gc.collect()
    assert optimizer() is None
    state.phase = 1
    with Stage(context, loop.phases, state) as second:
        assert [stack.stack_id for stack in context.rack.stacks] == [0, 1]
        assert {name.partition("/")[0] for name in second.parameters} == {"stack.1", "norm", "head"}
        assert context.moments == {}
        kept = second.moments()
        assert set(kept) == {"norm/weight", "head/weight"}
        assert all(torch.equal(kept[name]["exp_avg"], moments[name]) for name in kept)


def test_a_stage_that_fails_keeps_no_moments():
    loop = a_loop()
    with pytest.raises(ZeroDivisionError), Stage(loop.context, loop.phases, loop.state) as stage:
        take_step(stage, loop.state)
        raise ZeroDivisionError
    assert loop.context.moments == {}


def test_the_loop_is_read_in_one_sitting():
    path = Path(stackwise.training.loop.__file__)
    assert len(path.read_text().splitlines()) <= 200
    assert stackwise.training.loop.__doc__ is not None
    words = re.findall(r"\*(\w+)\*", stackwise.training.loop.__doc__)
    assert 1 <= len(words) <= 6 and len(set(words)) == len(words)
