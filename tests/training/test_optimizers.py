from dataclasses import replace

import pytest
import torch
from torch import nn

from stackwise.config import StackWiseConfig
from stackwise.config.optimization import OptimizerConfig
from stackwise.growth.phases import Adapter, Growth, Phase, Schedule
from stackwise.growth.preparation import set_trainable
from stackwise.model.architecture import create_rack_from_config, create_simple_rack
from stackwise.optim.create import create_optimizer
from stackwise.training import ArchitectureTrainer, ProgressiveDataLoader
from stackwise.training.optimizers import (
    flatten,
    moments_for_phase,
    moments_of,
    moments_to_keep,
    set_moments,
    trained_parameters,
    unflatten,
)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rack():
    return create_simple_rack(2, 1, 26, 19, 13, 37)


def phase(names_of_state, growth=()):
    return Phase("p", (0, 1), (), 1, Schedule(0, "linear", 0, 0, 1.0), "clm", growth, names_of_state)


def state(seed):
    return {
        "step": torch.tensor(5.0),
        "exp_avg": drawn(3, 2, seed=seed),
        "exp_avg_sq": drawn(3, 2, seed=seed + 50).abs(),
    }


def test_adamw_equals_torchs_unfused_one():
    settings = OptimizerConfig(lr=0.03, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    ours = [nn.Parameter(drawn(5, 3, seed=1)), nn.Parameter(drawn(7, seed=2))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    fused = create_optimizer({str(i): p for i, p in enumerate(ours)}, settings)
    plain = torch.optim.AdamW(
        [{"params": theirs[:1], "weight_decay": 0.2}, {"params": theirs[1:], "weight_decay": 0.0}],
        lr=0.03, betas=(0.8, 0.9), eps=1e-6, fused=False, foreach=False,
    )  # fmt: skip
    for step in range(5):
        for a, b in zip(ours, theirs):
            a.grad = drawn(*a.shape, seed=10 + step)
            b.grad = a.grad.clone()
        fused.step()
        plain.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_matrices_decay_and_vectors_do_not():
    """With zero gradients AdamW only decays: w ← w (1 − lr · decay)."""
    model = rack()
    parameters = trained_parameters(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = create_optimizer(parameters, OptimizerConfig(lr=0.5, weight_decay=0.2))
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in parameters.items():
        torch.testing.assert_close(p.detach(), before[name] * (0.9 if p.dim() == 2 else 1.0))
    assert any(p.dim() == 1 for p in parameters.values())


def test_only_what_trains_is_in_the_optimizer_and_has_state():
    model = rack()
    set_trainable(model, ["stack.1", "norm"])
    parameters = trained_parameters(model)
    assert {name.split("/")[0] for name in parameters} == {"stack.1", "norm"}
    optimizer = create_optimizer(parameters, OptimizerConfig())
    model(torch.zeros(2, 3, dtype=torch.int64)).square().sum().backward()
    optimizer.step()
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in parameters.values()}
    assert {id(p) for p in optimizer.state} == {id(p) for p in parameters.values()}
    assert moments_of(optimizer, parameters).keys() == parameters.keys()


def test_an_optimizer_with_the_moments_of_another_takes_the_same_steps():
    def step(parameter, optimizer, number):
        parameter.grad = drawn(5, 3, seed=number)
        optimizer.step()

    a = nn.Parameter(drawn(5, 3))
    first = create_optimizer({"a": a}, OptimizerConfig())
    for number in range(3):
        step(a, first, number)
    b = nn.Parameter(a.detach().clone())
    second = create_optimizer({"b": b}, OptimizerConfig())
    moments = unflatten({k: v.clone() for k, v in flatten(moments_of(first, {"x/y.weight": a})).items()})
    assert moments.keys() == {"x/y.weight"}
    set_moments(second, {"x/y.weight": b}, moments)
    for number in range(3, 6):
        step(a, first, number)
        step(b, second, number)
    assert torch.equal(a, b)


def test_keep_takes_what_goes_on_training_and_drops_what_is_frozen():
    moments = {"stack.0/w": state(1), "stack.1/w": state(2), "norm/weight": state(3)}
    kept = moments_for_phase(phase("keep", (Growth(2, "copy", 1),)), moments, ["stack.1/w", "stack.2/w", "norm/weight"])
    assert kept.keys() == {"stack.1/w", "norm/weight"}
    assert all(kept[name][key] is moments[name][key] for name in kept for key in kept[name])


def test_reset_drops_everything():
    assert moments_for_phase(phase("reset"), {"norm/weight": state(3)}, ["norm/weight"]) == {}


@pytest.mark.parametrize("source_trains", [True, False])
def test_copy_gives_a_copied_stack_its_sources_moments_in_storage_of_their_own(source_trains):
    moments = {"stack.0/w": state(1), "stack.1/w": state(2), "norm/weight": state(3)}
    names = ["stack.2/w", "norm/weight", *(["stack.1/w"] if source_trains else [])]
    kept = moments_for_phase(phase("copy", (Growth(2, "copy", 1),)), moments, names)
    assert kept.keys() == set(names)
    for key, value in moments["stack.1/w"].items():
        assert torch.equal(kept["stack.2/w"][key], value)
        assert kept["stack.2/w"][key].data_ptr() != value.data_ptr()


def test_at_a_phases_end_only_what_the_next_one_can_use_is_kept():
    names = ["stack.1/blocks.1.w", "stack.1/blocks.10.w", "stack.10/w", "norm/weight", "head/weight", "adapters.3/a"]
    moments = {name: state(i) for i, name in enumerate(names)}

    def kept(*trains, **fields):
        following = replace(phase(fields.pop("state", "keep"), fields.pop("growth", ())), trains=trains, **fields)
        return set(moments_to_keep(moments, [following]))

    assert kept("stack.1", "norm") == {"stack.1/blocks.1.w", "stack.1/blocks.10.w", "norm/weight"}
    assert kept("stack.1/blocks.1", "head") == {"stack.1/blocks.1.w", "head/weight"}
    assert kept("head", adapters=(Adapter(3, "stack", 2, 1.0),)) == {"head/weight", "adapters.3/a"}
    assert kept("stack.2", growth=(Growth(2, "copy", 10),), state="copy") == {"stack.10/w"}
    assert kept("stack.2", growth=(Growth(2, "copy", 10),)) == set()
    assert kept("norm", state="reset") == set() == set(moments_to_keep(moments, []))


def test_flattening_moments_can_be_undone():
    moments = {"stack.0/blocks.0.ffn.up_proj.weight": state(1), "norm/weight": state(2)}
    flat = flatten(moments)
    assert flat["norm/weight/exp_avg"] is moments["norm/weight"]["exp_avg"]
    assert unflatten(flat) == moments


def test_rates_fall_from_block_to_block():
    """One step of plain descent: what each weight moves by halves with each Block below the head."""
    moved = {}
    for decay in (1.0, 0.5):
        config = StackWiseConfig.from_dict(
            {
                "model": {"vocab_size": 37, "d_model": 26, "n_heads": 13, "d_ff": 19,
                          "architecture": {"n_stacks": 2, "blocks_per_stack": [2, 1]}},
                "training": {
                    "strategy": "end_to_end", "max_steps": 1, "batch_size": 3, "seq_len": 7, "device": "cpu",
                    "grad_clip": None, "schedule": {"kind": "constant", "warmup_steps": 0},
                    "optimizer": {"optimizer_type": "sgd", "lr": 0.5, "weight_decay": 0.0, "momentum": 0.0,
                                  "layer_decay": decay},
                },
            }
        )  # fmt: skip
        model = create_rack_from_config(config)
        before = {f"{part}/{name}": p.detach().double() for part, name, p in model.part_parameters()}
        tokens = torch.arange(3 * 7 * 2) % 37
        ArchitectureTrainer(config).train_architecture(model, ProgressiveDataLoader(tokens.numpy(), config))
        moved[decay] = {f"{part}/{name}": p.detach().double() - before[f"{part}/{name}"]
                        for part, name, p in model.part_parameters()}  # fmt: skip
    below = {"head/": 0, "norm/": 0, "stack.1/blocks.0.": 1, "stack.0/blocks.1.": 2, "stack.0/blocks.0.": 3, "embed": 4}
    for name, full in moved[1.0].items():
        (height,) = [height for start, height in below.items() if name.startswith(start)]
        # Weights are rounded to fp32, so a step is known to about a millionth.
        torch.testing.assert_close(moved[0.5][name], full * 0.5**height, rtol=1e-3, atol=2e-7)
