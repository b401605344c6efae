"""One run, several objectives: each phase has the loss, the masks and the direction of its own."""

import random
from unittest import mock

import pytest
import torch

from stackwise.config import StackWiseConfig
from stackwise.data.store import prepare
from stackwise.errors import ConfigError
from stackwise.growth.curricula import build_phases
from stackwise.objectives import create_objective
from stackwise.planning.plan import plan_run
from stackwise.runs.run import load, resume_run, train_run
from stackwise.training.progress import SilentReporter
from stackwise.training.saving import Saver
from stackwise.training.sources import ProgressiveDataLoader
from stackwise.training.step import take_step

STEPS = 9
ORDERS = {
    "masked, then causal": ("mlm", "clm"),
    "diffusion, then causal": ("diffusion", "clm"),
    "causal, then diffusion": ("clm", "diffusion"),
    "all three": ("clm", "mlm", "diffusion"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("objectives")
    words = ["".join(random.Random(i).choices("abcdefgh", k=1 + i % 5)) for i in range(40)]
    (path / "text.txt").write_text(" ".join(random.Random(7).choices(words, k=2500)))
    return path


def config(folder, objectives, *overrides):
    """A Rack of two Stacks, a phase for each of ``objectives``; the last one is the run's, and is not said again."""
    first, *rest = objectives[:-1]
    phases = [{"add": "rest", "objective": first}, *({"trains": "all", "objective": name} for name in rest)]
    return StackWiseConfig.from_dict(
        {
            "model": {"d_model": 20, "n_heads": 2, "d_ff": 36, "architecture": {"n_stacks": 2, "blocks_per_stack": 1}},
            "training": {
                "strategy": "phases", "phases": [*phases, {"trains": "all"}],
                "batch_size": 5, "seq_len": 16, "max_steps": STEPS, "device": "cpu",
                "progressive": {"training_objective": objectives[-1]},
                "schedule": {"kind": "constant", "warmup_steps": 0, "rewarmup_steps": 0},
                "evaluation": {"max_tokens": 200}, "checkpoint": {"every_steps": 1, "keep_last": STEPS},
                "logging": {"every_steps": 1},
            },
            "data": {
                "source": "files", "path": str(folder / "text.txt"), "cache_dir": str(folder / "store"),
                "tokenizer": {"kind": "characters"},
            },
        }, overrides
    )  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_each_step_has_the_loss_of_its_phases_objective(folder, tmp_path, name):
    settings = config(folder, ORDERS[name])
    losses = []

    def watched(stage, state):
        taken = take_step(stage, state)
        losses.append(taken.loss)
        return taken

    with mock.patch("stackwise.training.loop.take_step", watched):
        summary = train_run(settings, tmp_path / "run", SilentReporter())
    data = prepare(settings.data, need_mask=True)
    loader = ProgressiveDataLoader(data.train, settings)
    phases = build_phases(settings)
    starts = [sum(p.steps for p in phases[:i]) for i in range(len(phases))]
    for i, (phase, objective_name) in enumerate(zip(phases, ORDERS[name])):
        last = starts[i] + phase.steps - 1  # the last step, from the checkpoint before it
        rack = load(tmp_path / "run", step=last).rack
        rack.set_attention_mode("causal" if objective_name == "clm" else "bidirectional")
        objective = create_objective(settings, data.tokenizer, objective_name)
        example = objective.corrupt(loader.batch(last))
        expected = objective.loss(rack, example, 1.0 / example.n_targets)
        torch.testing.assert_close(losses[last], float(expected), rtol=1e-5, atol=0)
        record = summary["phases"][i]
        assert record["objective"] == objective_name
        assert (record["bits_per_byte"] is None) == (objective_name == "mlm")
    assert ("nelbo" in summary) == (ORDERS[name][-1] == "diffusion")


@pytest.mark.parametrize("name", ORDERS)
def test_the_trained_rack_reads_in_the_direction_of_the_last_objective(folder, tmp_path, name):
    train_run(config(folder, ORDERS[name]), tmp_path / "run", SilentReporter())
    loaded = load(tmp_path / "run")
    assert loaded.config.training.objective == ORDERS[name][-1]
    tokens = torch.randint(3, 12, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 11:] = 2
    moved = (loaded.rack(tokens) != loaded.rack(changed))[:, :11].any()
    assert bool(moved) == (ORDERS[name][-1] != "clm")


@pytest.mark.parametrize("name", ["masked, then causal", "all three"])
@pytest.mark.parametrize("at", [2, 5])
def test_it_resumes_exactly_in_every_phase(folder, tmp_path, name, at):
    settings = config(folder, ORDERS[name])
    whole = train_run(settings, tmp_path / "whole", SilentReporter())

    class Killed(Exception):
        pass

    save = Saver.save

    def dying(saver, stage, state):
        save(saver, stage, state)
        if state.step == at:
            raise Killed

    with mock.patch.object(Saver, "save", dying), pytest.raises(Killed):
        train_run(settings, tmp_path / "killed", SilentReporter())
    resumed = resume_run(tmp_path / "killed", SilentReporter())
    for key in ("weights_sha256", "validation", "tokens", "flops"):
        assert resumed[key] == whole[key]


def test_what_a_trunk_is_stored_in_is_measured_by_the_objective_that_it_was_trained_with(folder, tmp_path):
    phases = [
        {"add": 1, "objective": "clm"},
        {"add": 1, "trunk": "frozen", "precision": "int8", "objective": "mlm"},
    ]  # fmt: skip
    settings = config(folder, ("mlm", "clm"), f"training.phases={phases}".replace("'", '"'))
    assert settings.training.objective == "mlm"
    summary = train_run(settings, tmp_path / "run", SilentReporter())
    storage = summary["phases"][1]["storage"]
    assert storage["validation_loss_before"] == summary["phases"][0]["validation_loss"]
    # int8 moves the loss of the first objective a little; that of the second, without training, is far off.
    assert abs(storage["validation_loss_after"] / storage["validation_loss_before"] - 1) < 1e-3


def test_an_entry_without_an_objective_has_that_of_the_run_whatever_the_last_entry_names(folder):
    phases = [{"add": 1}, {"add": 1, "objective": "mlm"}]
    settings = config(folder, ("clm", "clm"), f"training.phases={phases}".replace("'", '"'))
    first, second = build_phases(settings)
    assert [(phase.objective, phase.attention) for phase in (first, second)] == [
        ("clm", "causal"), ("mlm", "bidirectional"),
    ]  # fmt: skip
    assert first.noise == () and [(i.low, i.high) for i in second.noise] == [(0.15, 0.15)]


def test_the_plan_runs_every_phase_with_its_objective(folder, tmp_path):
    plan = plan_run(config(folder, ("diffusion", "clm"), "training.diffusion.block_length=4"), tmp_path)
    first, second = plan.phases
    assert [phase.objective for phase in (first, second)] == ["diffusion", "clm"]
    # Blocks train on [noised, clean] tokens: about twice the work of the same Rack, read from left to right.
    assert 1.8 < plan.costs[0].flops / plan.costs[1].flops < 2.3


@pytest.mark.parametrize(
    ("objectives", "override", "message"),
    [
        (
            ("mlm", "clm"),
            "model.attention_preset=bert_style",
            "is bidirectional, so attention would see the tokens that clm",
        ),
        (("clm", "mlm"), "model.attention_preset=gpt_style", "is causal, but mlm needs bidirectional attention"),
        (("mlm", "diffusion"), "training.progressive.time_interpretation=input", "some phases train mlm"),
        (
            ("mlm", "clm"),
            "training.progressive.time_interpretation=input",
            "is only used when the objective is diffusion",
        ),
        (("causal", "clm"), "training.seed=1", "'causal' is not allowed; allowed: clm, mlm, diffusion"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, objectives, override, message):
    with pytest.raises(ConfigError, match=message):
        config(folder, objectives, override)


def test_a_cache_holds_the_inputs_of_one_objective(folder):
    phases = [{"add": 1, "objective": "mlm"}, {"add": 1, "trunk": "frozen"}]
    with pytest.raises(ConfigError, match="cache_activations: true requires one objective in all phases"):
        config(
            folder, ("mlm", "clm"), f"training.phases={phases}".replace("'", '"'),
            "training.progressive.cache_activations=true",
        )  # fmt: skip
