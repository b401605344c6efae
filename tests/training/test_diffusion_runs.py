"""Runs of masked diffusion: every way to use time trains what it says, resumes exactly, and costs what was planned."""

import json
import random
from itertools import pairwise
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import stackwise
from stackwise.cli.main import main
from stackwise.config import StackWiseConfig
from stackwise.errors import ConfigError, UserError
from stackwise.growth.curricula import build_phases
from stackwise.planning.cost import RUNTIME_BYTES
from stackwise.planning.dry_step import Ledger
from stackwise.planning.plan import plan_run
from stackwise.runs.run import load, resume_run, train_run
from stackwise.training.progress import SilentReporter
from stackwise.training.saving import Saver
from stackwise.training.step import take_step

FROZEN = ["training.strategy=progressive", "training.progressive.trunk_strategy=frozen"]
DEPTH = "training.progressive.time_interpretation=depth"
KINDS = {
    "plain": [],
    "exact counts": ["training.diffusion.weighting=exact_counts"],
    "blocks": ["training.diffusion.block_length=4"],
    "input": ["training.progressive.time_interpretation=input", "training.diffusion.time_dim=6"],
    **{name: [DEPTH, f"training.diffusion.depth_variant={name}"] for name in ("experts", "suffix", "prefix")},
    "experts, grown": [DEPTH, *FROZEN],
    "suffix, unequal": [
        DEPTH, "training.diffusion.depth_variant=suffix", "training.diffusion.levels=[1.0, 0.6, 0.25, 0.0]",
    ],
    "suffix, grown": [
        DEPTH, *FROZEN, "training.diffusion.depth_variant=suffix", "training.progressive.building_mode=prepend",
        "training.progressive.new_stack_init=identity",
    ],
    "prefix, grown": [DEPTH, *FROZEN, "training.diffusion.depth_variant=prefix"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("diffusion")
    words = ["".join(random.Random(i).choices("abcdefgh", k=1 + i % 5)) for i in range(40)]
    (path / "text.txt").write_text(" ".join(random.Random(7).choices(words, k=2500)))
    return path


def config(folder, *overrides):
    return StackWiseConfig.from_dict(
        {
            "model": {
                "vocab_size": 23, "d_model": 20, "n_heads": 2, "d_ff": 36,
                "architecture": {"n_stacks": 3, "blocks_per_stack": 1},
            },
            "training": {
                "strategy": "end_to_end", "batch_size": 6, "seq_len": 16, "max_steps": 6, "device": "cpu",
                "progressive": {"training_objective": "diffusion"},
                "schedule": {"kind": "constant", "warmup_steps": 0, "rewarmup_steps": 0},
                "evaluation": {"max_tokens": 200}, "checkpoint": {"every_steps": 1, "keep_last": 9},
            },
            "data": {
                "source": "files", "path": str(folder / "text.txt"), "cache_dir": str(folder / "store"),
                "tokenizer": {"kind": "characters"},
            },
        }, overrides
    )  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_run_resumes_exactly_and_ends_with_a_bound(folder, tmp_path, name):
    settings = config(folder, *KINDS[name])
    whole = train_run(settings, tmp_path / "whole", SilentReporter())
    assert whole["nelbo"]["nats_per_token"] == whole["validation"]["loss"] > 0
    assert whole["validation"]["bits_per_byte"] > 0

    class Killed(Exception):
        pass

    save = Saver.save

    def dying(saver, stage, state):
        save(saver, stage, state)
        if state.step == 4:
            raise Killed

    with mock.patch.object(Saver, "save", dying), pytest.raises(Killed):
        train_run(settings, tmp_path / "killed", SilentReporter())
    resumed = resume_run(tmp_path / "killed", SilentReporter())
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    for key in ("validation", "nelbo", "tokens", "flops"):
        assert resumed[key] == whole[key]


def counted(settings, out):
    """FLOPs and peak bytes of what the last step of each phase made, by torch's counter and by a ledger."""
    aten, steps = torch.ops.aten, []

    def forward(query, key, value, *rest, out_shape=None, **options):
        return sdpa_flop_count(query, key, value)

    def backward(grad, query, key, value, *rest, out_shape=None, **options):
        return sdpa_backward_flop_count(grad, query, key, value)

    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }

    def counting(stage, state):
        with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
            result = take_step(stage, state)
        steps.append((state.phase, counter.get_total_flops()))
        return result

    with mock.patch("stackwise.training.loop.take_step", counting):
        train_run(settings, out, SilentReporter())
    return steps


@pytest.mark.parametrize("name", KINDS)
def test_planned_flops_are_those_of_the_steps(folder, tmp_path, name):
    """Of stacks with intervals of equal width, 6 sequences share evenly: each step costs what the plan says."""
    settings = config(folder, *KINDS[name])
    planned = [cost.flops for cost in plan_run(settings, folder).costs]
    found = counted(settings, tmp_path / "run")
    assert {phase for phase, _ in found} == set(range(len(planned)))
    if name == "suffix, unequal":  # shares that are no whole sequences: right on average
        mean = sum(flops for _, flops in found) / len(found)
        assert mean == pytest.approx(planned[0], rel=0.1)
        return
    for phase, flops in found:
        assert flops == planned[phase]


@pytest.mark.parametrize("name", ["blocks", "input", "experts", "suffix", "prefix, grown"])
def test_the_planned_peak_is_what_a_real_step_holds(folder, tmp_path, name):
    settings = config(folder, *KINDS[name], "model.d_model=60", "model.d_ff=100")
    planned = plan_run(settings, folder).costs[-1]
    peaks = []

    def measured(stage, state):
        example, rack = stage.source.example(state.step), stage.context.rack
        ledger = Ledger()
        for _, _, tensor in rack.part_tensors():
            ledger.ignore(tensor)
        with ledger:
            stage.objective.loss(rack, example, 1.0 / example.n_targets).backward()
        for parameter in stage.parameters.values():
            parameter.grad = None
        peaks.append(ledger.peak)
        return take_step(stage, state)

    with mock.patch("stackwise.training.loop.take_step", measured):
        train_run(settings.changed({"training.max_steps": 3}), tmp_path / "run", SilentReporter())
    held = planned.weights + planned.optimizer + max(peaks[-1:])
    assert planned.peak - RUNTIME_BYTES == pytest.approx(held, rel=0.03)


@pytest.mark.parametrize("variant, mode", [("experts", "append"), ("suffix", "prepend"), ("prefix", "append")])
def test_growing_over_time_trains_each_stack_on_its_own_levels_with_what_is_shared_frozen(folder, variant, mode):
    overrides = [DEPTH, *FROZEN, f"training.diffusion.depth_variant={variant}"]
    settings = config(folder, *overrides, f"training.progressive.building_mode={mode}")
    phases = build_phases(settings)
    assert phases[0].trains == ("embedding", "stack.0", "norm", "head")
    assert [p.trains for p in phases[1:]] == [("stack.1",), ("stack.2",)]
    thirds = [(2 / 3, 1.0), (1 / 3, 2 / 3), (0.0, 1 / 3)]
    for n, phase in enumerate(phases, 1):
        there = thirds[-n:] if variant == "suffix" else thirds[:n]
        for interval, (low, high) in zip(phase.noise, there, strict=True):
            assert (interval.low, interval.high) == pytest.approx((low, high))
        new = 0 if variant == "suffix" else n - 1
        assert [interval.trains for interval in phase.noise] == [k == new for k in range(n)]
        stops = {"experts": [k + 1 for k in range(n)], "suffix": [n] * n, "prefix": [k + 1 for k in range(n)]}
        assert [interval.stop for interval in phase.noise] == stops[variant]
    joint = build_phases(settings.changed({"training.strategy": "end_to_end"}))
    assert all(interval.trains for interval in joint[0].noise)


def test_what_was_trained_stays_bit_identical_while_the_next_expert_trains(folder, tmp_path):
    settings = config(folder, *KINDS["experts, grown"])
    train_run(settings, tmp_path / "run", SilentReporter())
    racks = [load(tmp_path / "run", step).rack for step in (2, 4, 6)]
    for before, after in pairwise(racks):
        old, new = (dict(rack.named_parameters()) for rack in (before, after))
        assert len(new) > len(old)
        for name, parameter in old.items():
            assert torch.equal(parameter, new[name]), name


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([DEPTH, "training.batch_size=2"], r"training\.batch_size: 2 leaves a Stack without a sequence"),
        ([DEPTH, "training.diffusion.levels=[1.0, 0.4, 0.2, 0.15]"], r"must be 4 rates that fall from 1 to 0"),
        (
            [DEPTH, *FROZEN, "training.diffusion.depth_variant=suffix"],
            r"cannot be combined with depth_variant: suffix; allowed: prepend",
        ),
        (["training.diffusion.block_length=5"], r"5 does not divide seq_len \(16\)"),
        (
            ["training.diffusion.block_length=8", "training.progressive.cache_activations=true"],
            r"cache_activations: true cannot be combined with diffusion.block_length",
        ),
        (
            ["training.diffusion.depth_variant=prefix"],
            r"'prefix' is only used when training.progressive.time_int",
        ),
        ([DEPTH, "training.diffusion.levels=equal_difficulty"], r"difficulty: must be set when"),
        (
            [DEPTH, "training.diffusion={levels: equal_difficulty, difficulty: [[0.2, 1.0], [0.2, 2.0]]}"],
            r"difficulty: \[\[0.2, 1.0\], \[0.2, 2.0\]\] must be pairs \[rate, cross-entropy\]: different rates",
        ),
        (
            [*KINDS["prefix"], "training.diffusion.weighting=exact_counts"],
            r"weighting: 'exact_counts' has no effect when",
        ),
        (
            [*KINDS["exact counts"], "training.diffusion.min_rate=0.1"],
            r"min_rate: 0.1 is only used when weighting is strat",
        ),
        (
            ["training.progressive.training_objective=mlm", DEPTH],
            r"'depth' is only used when the objective is diffusion",
        ),
        (
            ["training.progressive.training_objective=mlm", "training.evaluation.draws=2"],
            r"draws: 2 is only used when the objective is diffusion",
        ),
        (["model.attention_preset=gpt_style"], r"causal, but diffusion needs bidirectional attention"),
        (["training.diffusion.weighting=exact"], r"weighting: 'exact' is not allowed.*exact_counts"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_their_key(folder, overrides, message):
    with pytest.raises((ConfigError, UserError), match=message):
        build_phases(config(folder, *overrides))


def test_equal_difficulty_takes_the_curve_that_eval_prints(folder, tmp_path, capsys):
    train_run(config(folder), tmp_path / "run", SilentReporter())
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    curve = json.loads(capsys.readouterr().out)["curve"]
    pairs = [[rate, nats] for rate, nats, _ in curve]
    settings = config(
        folder, DEPTH, "training.diffusion.levels=equal_difficulty", f"training.diffusion.difficulty={pairs}"
    )
    (phase,) = build_phases(settings)
    assert len(phase.noise) == 3 and phase.noise[-1].low == 0.0


@pytest.mark.parametrize("name", ["plain", "blocks", "experts", "suffix", "prefix", "input"])
def test_generate_fills_a_template_and_goes_on_from_a_prompt(folder, tmp_path, capsys, name):
    out = str(tmp_path / "run")
    train_run(config(folder, *KINDS[name]), out, SilentReporter())
    texts = []
    for seed in ("3", "3", "4"):
        assert main(["generate", out, "--template", "abc {5} de{2}", "--seed", seed, "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] and len(texts[0]) == 14
    assert all(text.startswith("abc ") and text[9:12] == " de" for text in texts)
    assert main(["generate", out, "--prompt", "ab", "--prompt", "abcd", "--tokens", "9", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["text"].startswith("ab") and len(first["text"]) == 11 and len(second["text"]) == 13
    assert main(["generate", out, "--prompt", "ab", "--tokens", "40", "--show"]) == 0
    printed = capsys.readouterr()
    assert "░" in printed.err and "░" not in printed.out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--top-k", "3"], "--top-k is only used for runs trained with clm"),
        (["--order", "confidance"], "did you mean confidence?"),
        (["--template", "abc"], "has no gap; write {20}"),
        (["--template", "{3}", "--prompt", "a"], "are both given"),
    ],
)
def test_generate_says_what_does_not_fit(folder, tmp_path_factory, capsys, options, message):
    out = folder / "refused"
    if not out.exists():
        train_run(config(folder), out, SilentReporter())
    assert main(["generate", str(out), *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_generate_in_python_gives_the_text_of_the_command(folder, capsys):
    out = folder / "from_python"
    train_run(config(folder), out, SilentReporter())
    for options, arguments in (
        ({"prompt": "ab", "tokens": 9, "seed": 5}, ["--prompt", "ab", "--tokens", "9", "--seed", "5"]),
        ({"template": "abc {5} de", "seed": 3}, ["--template", "abc {5} de", "--seed", "3"]),
    ):
        assert main(["generate", str(out), *arguments, "--json"]) == 0
        assert stackwise.generate(out, **options) == json.loads(capsys.readouterr().out)["text"]
    with pytest.raises(UserError, match="template and prompt are both given"):
        stackwise.generate(out, "a", template="{3}")


def test_a_model_of_both_directions_goes_on_left_to_right_by_one_setting(folder, tmp_path, capsys):
    train_run(config(folder), tmp_path / "pretrained", SilentReporter())
    file = tmp_path / "finetune.yaml"
    file.write_text(
        "training: {strategy: end_to_end, max_steps: 3, batch_size: 4, seq_len: 16, device: cpu}\n"
        f"data: {{source: files, path: {folder / 'text.txt'}, cache_dir: {folder / 'store'}}}\n"
    )
    out, clm = str(tmp_path / "finetuned"), "training.progressive.training_objective=clm"
    assert main(["train", str(file), clm, "--from", str(tmp_path / "pretrained"), "--out", out]) == 0
    before, after = load(tmp_path / "pretrained").rack, load(out).rack
    assert {block.attention.attention_mode for block in before.blocks()} == {"bidirectional"}
    assert {block.attention.attention_mode for block in after.blocks()} == {"causal"}
    capsys.readouterr()
    assert main(["generate", out, "--prompt", "ab", "--tokens", "4"]) == 0


@pytest.mark.parametrize("name", ["input", "experts", "blocks"])
def test_what_transformers_cannot_run_is_not_exported(folder, tmp_path, capsys, name):
    train_run(config(folder, *KINDS[name], "training.max_steps=1"), tmp_path / "run", SilentReporter())
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "always runs all its layers once" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_experts_trained_apart_are_joined_and_bound_the_whole(folder, tmp_path, capsys):
    def train(expert, *more):
        settings = config(folder, DEPTH, *FROZEN, f"training.diffusion.expert={expert}", "training.max_steps=3", *more)
        train_run(settings, tmp_path / f"expert {expert}", SilentReporter())
        return load(tmp_path / f"expert {expert}").rack

    shared = f"model.initial={tmp_path / 'expert 0'}"
    racks = {0: train(0), 2: train(2, shared), 1: train(1, shared)}
    assert [stack.stack_id for stack in racks[2].stacks] == [0, 2]
    runs = [str(tmp_path / f"expert {k}") for k in (0, 2, 1)]
    assert main(["join", *runs[:2], "--out", str(tmp_path / "short")]) == 2
    assert "the run of expert 1 is missing" in capsys.readouterr().err and not (tmp_path / "short").exists()
    assert main(["join", *runs, "--out", str(tmp_path / "joined")]) == 0
    joined = load(tmp_path / "joined").rack
    for k, rack in racks.items():
        theirs = rack.tensors_by_part()[f"stack.{k}"]
        for name, tensor in joined.tensors_by_part()[f"stack.{k}"].items():
            assert torch.equal(tensor, theirs[name])
    for part in ("embedding", "norm", "head"):
        for name, tensor in joined.tensors_by_part()[part].items():
            assert all(torch.equal(tensor, rack.tensors_by_part()[part][name]) for rack in racks.values())
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "joined"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nelbo"]["nats_per_token"] > 0
    assert main(["eval", runs[1], "--json"]) == 0
    assert "nelbo" not in json.loads(capsys.readouterr().out)  # two of three intervals bound nothing
    assert main(["generate", str(tmp_path / "joined"), "--template", "a{4}b"]) == 0


def test_an_experts_phase_is_about_its_own_levels_alone(folder):
    (phase,) = build_phases(
        config(folder, DEPTH, *FROZEN, "training.diffusion.expert=2", "model.initial=somewhere"), present=(0,)
    )
    assert phase.stacks == (0, 2) and phase.trains == ("stack.2",) and phase.steps == 6
    assert [(i.start, i.stop, i.trains) for i in phase.noise] == [(0, 1, False), (1, 2, True)]
    assert phase.noise[1].high == pytest.approx(1 / 3) and phase.growth[0].source == 0


@pytest.mark.parametrize("name", ["experts", "suffix"])
def test_updating_inside_the_backward_pass_reaches_stacks_that_the_last_micro_batch_does_not(folder, tmp_path, name):
    settings = config(folder, *KINDS[name], "training.grad_clip=null", "training.micro_batch_size=2")
    inside = settings.changed({"training.optimizer.in_backward": True})
    plain, found = load_after(settings, tmp_path / "plain"), load_after(inside, tmp_path / "inside")
    assert all(torch.equal(plain[part], found[part]) for part in plain)


@pytest.mark.parametrize(
    "name",
    [
        "blocks",
        "prefix",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("input", "experts, grown", "suffix")),
    ],
)
def test_compiled_stacks_take_the_same_steps(folder, tmp_path, name):
    settings = config(folder, *KINDS[name], "training.optimizer.eps=1e-3")  # so that rounding stays rounding
    plain = load_after(settings, tmp_path / "plain")
    compile_, built = torch.nn.Module.compile, []

    def eagerly(module, **options):
        built.append(module)
        return compile_(module, backend="aot_eager", **options)

    with mock.patch.object(torch.nn.Module, "compile", eagerly):
        compiled = load_after(settings.changed({"training.compile": True}), tmp_path / "compiled")
    assert len(built) >= 3
    for part, tensor in plain.items():
        torch.testing.assert_close(compiled[part], tensor, rtol=1e-3, atol=1e-4)


def load_after(settings, out):
    train_run(settings, out, SilentReporter())
    return {name: p.detach() for name, p in load(out).rack.named_parameters()}


@pytest.mark.parametrize("name", ["experts, grown", "suffix, grown", "prefix, grown"])
def test_a_joint_phase_after_growing_trains_all_levels_and_all_weights(folder, tmp_path, name):
    settings = config(folder, *KINDS[name], "training.progressive.joint_fraction=0.4", "training.max_steps=10")
    phases = build_phases(settings)
    assert [phase.name for phase in phases] == ["stack 0", "stack 1", "stack 2", "joint"]
    joint = phases[-1]
    assert all(interval.trains for interval in joint.noise) and "embedding" in joint.trains and "head" in joint.trains
    assert sorted((i.low, i.high) for i in joint.noise) == sorted((i.low, i.high) for i in phases[2].noise)
    summary = train_run(settings, tmp_path / "run", SilentReporter())
    starts = sum(phase.steps for phase in phases[:-1])
    before, after = (dict(load(tmp_path / "run", step).rack.named_parameters()) for step in (starts, 10))
    for key, parameter in after.items():
        assert not torch.equal(parameter, before[key]), key
    assert summary["validation"]["bits_per_byte"] > 0 and summary["nelbo"]["draws"] == 1


@pytest.mark.slow
def test_recipes_compare_with_diffusion(folder, tmp_path, capsys):
    settings = config(folder, "training.max_flops=4e8", "training.max_steps=null")
    settings = settings.changed({"training.strategy": "progressive"})
    file = tmp_path / "base.yaml"
    file.write_text(settings.to_yaml())
    recipes = "end-to-end,grown,append-frozen,stackwise"
    assert main(["compare", str(file), "--recipes", recipes, "--out", str(tmp_path / "all"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bound"] and {row["recipe"] for row in result["recipes"]} == set(recipes.split(","))
    for run in (run for row in result["recipes"] for run in row["runs"]):
        assert run["nelbo"]["standard_error"] > 0 and run["validation"]["bits_per_byte"] > 0
        assert run["flops"] == pytest.approx(4e8, rel=0.1)
