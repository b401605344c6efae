"""Runs that start from the Rack of another run."""

import json
import random

import pytest
import torch

import stackwise
from stackwise.cli.main import main
from stackwise.config import StackWiseConfig
from stackwise.data.store import prepare
from stackwise.errors import UserError
from stackwise.model.architecture import create_rack_from_config
from stackwise.objectives import create_objective
from stackwise.training import ArchitectureTrainer, ProgressiveDataLoader, ProgressiveRackBuilder, ProgressiveTrainer

BASE = """
model: {{d_model: 20, n_heads: 2, d_ff: 36, tie_embeddings: {tied}, architecture: {{n_stacks: 2, blocks_per_stack: 2}}}}
training: {{batch_size: 3, seq_len: 14, max_steps: 12, strategy: end_to_end, device: cpu}}
data: {{source: files, path: {path}, cache_dir: {cache}, tokenizer: {{kind: characters}}}}
"""
EXPAND = """
model: {{architecture: {{blocks_per_stack: [2, 2, 1, 1]}}}}
training:
  batch_size: 3
  seq_len: 14
  max_steps: 10
  seed: 4
  device: cpu
  progressive: {{building_mode: {mode}, target_stacks: 4, trunk_strategy: frozen, new_stack_init: identity}}
  logging: {{every_steps: 1}}
data: {{source: files, path: {path}, cache_dir: {cache}}}
"""


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def work(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    draw = random.Random(5)
    (folder / "text.txt").write_text("".join(draw.choices("abcdefgh ", k=4000)))
    places = {"path": folder / "text.txt", "cache": folder / "cache", "tied": str(request.param).lower()}
    (folder / "base.yaml").write_text(BASE.format(**places))
    for mode in ("append", "prepend", "interleave"):
        (folder / f"{mode}.yaml").write_text(EXPAND.format(mode=mode, **places))
    assert main(["train", str(folder / "base.yaml"), "--out", str(folder / "base")]) == 0
    return folder


def first_loss(run, config):
    """The loss of ``run`` on the first batch of a run of ``config``."""
    data = prepare(config.data)
    objective = create_objective(config, data.tokenizer)
    example = objective.corrupt(ProgressiveDataLoader(data.train, config).batch(0))
    return objective.loss(run.rack, example, 1 / example.n_targets).item()


ORDERS = {"append": [0, 1, 2, 3], "prepend": [3, 2, 0, 1], "interleave": [0, 2, 1, 3]}


@pytest.mark.parametrize("mode", ORDERS)
def test_identity_stacks_over_a_frozen_trunk_start_at_its_loss_and_leave_it_as_it_was(work, mode):
    out = work / mode
    assert main(["train", str(work / f"{mode}.yaml"), "--from", str(work / "base"), "--out", str(out)]) == 0
    base, grown = stackwise.load(work / "base"), stackwise.load(out)
    assert [stack.stack_id for stack in grown.rack.stacks] == ORDERS[mode]
    assert [len(stack.blocks) for stack in grown.rack.stacks] == [2 if k < 2 else 1 for k in ORDERS[mode]]
    started = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert started == pytest.approx(first_loss(base, grown.config), abs=1e-6)
    before, after = ({s.stack_id: s.state_dict() for s in run.rack.stacks} for run in (base, grown))
    for k in (0, 1):
        for name, tensor in before[k].items():
            assert torch.equal(tensor, after[k][name]), (k, name)
    for k in (2, 3):
        assert all(after[k][f"blocks.0.{part}.weight"].any() for part in ("attention.o_proj", "ffn.down_proj"))
    tied = grown.config.model.tie_embeddings
    heads = [run.rack.embedding.weight if tied else run.rack.head.weight for run in (base, grown)]
    assert tied == torch.equal(*heads)
    assert grown.tokenizer.fingerprint == base.tokenizer.fingerprint
    assert not torch.equal(base.rack.norm.weight, grown.rack.norm.weight)


def test_an_end_to_end_run_goes_on_with_the_weights_of_another(work):
    out = work / "on"
    overrides = ["training.strategy=end_to_end", "model.architecture.blocks_per_stack=2"]
    assert main(["train", str(work / "append.yaml"), *overrides, "--from", str(work / "base"), "--out", str(out)]) == 0
    base, on = stackwise.load(work / "base"), stackwise.load(out)
    started = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert started == pytest.approx(first_loss(base, on.config), abs=1e-6)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.d_model=24"], "model.d_model: 24, but the run that model.initial names has 20"),
        (
            ["model.architecture.blocks_per_stack=[2,3,1,1]"],
            "model.architecture.blocks_per_stack: 3 for Stack 1, which has 2 Blocks in the run that model.initial "
            "names",
        ),
        (
            ["training.progressive.target_stacks=2"],
            "training.progressive.target_stacks: 2 leaves no Stack to add to the 2 of the Rack; raise it",
        ),
    ],
)
def test_what_does_not_fit_the_run_is_refused_in_one_line(work, capsys, overrides, message):
    for command in (["train", "--out", str(work / "never")], ["plan"]):
        code = main([command[0], str(work / "append.yaml"), *overrides, "--from", str(work / "base"), *command[1:]])
        assert code == 2 and not (work / "never").exists()
        assert capsys.readouterr().err.splitlines()[-1] == f"stackwise: {message}"


def test_a_run_that_is_not_there_is_named(work, capsys, tmp_path):
    assert (
        main(["train", str(work / "append.yaml"), "--from", str(tmp_path / "none"), "--out", str(tmp_path / "o")]) == 2
    )
    assert "none" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_the_plan_starts_from_the_stacks_that_are_there(work, capsys):
    assert main(["plan", str(work / "interleave.yaml"), "--from", str(work / "base"), "--json"]) == 0
    (phase,) = json.loads(capsys.readouterr().out)["phases"]
    assert phase["stacks"] == [0, 2, 1, 3] and phase["trains"][:2] == ["stack.2", "stack.3"]


def test_settings_of_the_model_come_from_the_run(work):
    from stackwise.cli.train import read_config

    config = read_config(work / "append.yaml", ["training.seed=9"], work / "base")
    base = StackWiseConfig.from_yaml(work / "base" / "config.yaml")
    assert config.model.initial == str(work / "base") and config.training.seed == 9
    assert config.model.d_ff == base.model.d_ff == 36 and config.model.architecture.n_stacks == 2
    assert config.data.tokenizer.kind == "pretrained"


# ---- from Python


def python_config(work, mode, *overrides):
    config = StackWiseConfig.from_yaml(work / f"{mode}.yaml").to_dict()
    tied = StackWiseConfig.from_yaml(work / "base.yaml").model.tie_embeddings
    config["model"] |= {"d_model": 20, "n_heads": 2, "d_ff": 36, "tie_embeddings": tied, "initial": str(work / "base")}
    return StackWiseConfig.from_dict(config, overrides)


@pytest.mark.parametrize("mode, left_to_right", [("append", [0, 1, 2]), ("prepend", [2, 0, 1])])
def test_a_builder_starts_from_the_rack_that_model_initial_names(work, mode, left_to_right):
    base = stackwise.load(work / "base").rack
    builder = ProgressiveRackBuilder(python_config(work, mode))
    ids = torch.arange(8).view(2, 4) % base.vocab_size
    assert torch.equal(builder.rack.eval()(ids), base(ids))
    assert all(p.requires_grad for p in builder.rack.parameters())
    builder.add_stack()
    assert [stack.stack_id for stack in builder.rack.stacks] == left_to_right
    assert torch.equal(builder.rack.eval()(ids), base(ids))  # it joins as the identity
    with pytest.raises(UserError, match=r"d_ff: 34, but the run that model\.initial names has 36"):
        ProgressiveRackBuilder(python_config(work, mode, "model.d_ff=34"))
    with pytest.raises(UserError, match="no such run"):
        ProgressiveRackBuilder(python_config(work, mode, f"model.initial={work}/none"))


def test_an_initial_rack_gets_its_adapters_too(work):
    qlora = ("training.progressive.trunk_strategy=qlora", "training.qlora.enabled=true")
    builder = ProgressiveRackBuilder(python_config(work, "append", *qlora, "training.qlora.progressive_enabled=true"))
    builder.append_stack()
    kinds = {
        (stack.stack_id, name.split(".adapters.")[1].split(".")[0])
        for stack in builder.rack.stacks
        for name, _ in stack.named_parameters()
        if ".adapters." in name
    }
    assert kinds == {(0, "stack"), (1, "stack"), (2, "stack"), (0, "progressive"), (1, "progressive")}


@pytest.mark.parametrize("trunk", ["frozen", "qlora"])
def test_a_trainer_grows_the_rack_that_model_initial_names_as_a_run_does(work, tmp_path, trunk):
    settings = ["training.progressive.trunk_strategy=" + trunk]
    settings += ["training.qlora.enabled=true", "training.qlora.progressive_enabled=true"] * (trunk == "qlora")
    run = tmp_path / "run"
    args = ["train", str(work / "append.yaml"), "--from", str(work / "base"), "--out", str(run), *settings]
    assert main(args) == 0
    config = StackWiseConfig.from_yaml(run / "config.yaml")
    builder = ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_rack(builder, ProgressiveDataLoader(prepare(config.data).train, config))
    theirs = dict(stackwise.load(run).rack.named_parameters())
    ours = dict(builder.rack.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_end_to_end_training_starts_from_the_weights_that_model_initial_names(work):
    settings = StackWiseConfig.from_yaml(work / "base.yaml").changed(
        {"model.initial": str(work / "base"), "training.max_steps": 1, "training.optimizer.lr": 1e-30}
    )
    base = stackwise.load(work / "base").rack
    rack = create_rack_from_config(settings, vocab_size=base.vocab_size)
    before = dict(base.named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in rack.named_parameters())
    loader = ProgressiveDataLoader(prepare(settings.data).train, settings)
    ArchitectureTrainer(settings).train_architecture(rack, loader)
    for name, p in rack.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=0, atol=1e-12)
    other = create_rack_from_config(settings, n_stacks=1, vocab_size=base.vocab_size)
    with pytest.raises(UserError, match=r"model\.initial: the Rack has other Stacks"):
        ArchitectureTrainer(settings).train_architecture(other, loader)
