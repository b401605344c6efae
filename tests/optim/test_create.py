"""Each optimizer does what its name says, with the state that is planned for it, inside the backward pass too."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stackwise.config import StackWiseConfig
from stackwise.config.optimization import OptimizerConfig
from stackwise.errors import ConfigError
from stackwise.growth.adapters import add_adapter
from stackwise.growth.phases import Adapter
from stackwise.kinds import OPTIMIZERS
from stackwise.model.architecture import create_simple_rack
from stackwise.optim import stored_adamw
from stackwise.optim.create import InBackward, Several, create_optimizer
from stackwise.optim.kinds import optimizer_of
from stackwise.optim.stored_adamw import StoredAdamW, round_at_random
from stackwise.training.optimizers import flatten, moments_of, set_moments, trained_parameters, unflatten

IDS = torch.arange(33).reshape(3, 11) % 37
SETTINGS = {
    "adamw": {},
    "adamw bfloat16": {"moments": "bfloat16"},
    "adamw int8": {"moments": "int8"},
    "muon": {"optimizer_type": "muon", "momentum": 0.8},
    "muon int8": {"optimizer_type": "muon", "moments": "int8"},
    "sgd": {"optimizer_type": "sgd"},
    "sgd plain": {"optimizer_type": "sgd", "momentum": 0.0},
}


def settings(name, **more):
    return OptimizerConfig(lr=0.01, **SETTINGS[name], **more)


def rack():
    made = create_simple_rack(2, 1, 26, 19, 13, 37)
    add_adapter(made.stacks[0], Adapter(0, "stack", 3, 4.0), 0)
    return made


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def backward(model, step):
    ids = (IDS + step) % 37
    torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def steps(model, optimizer, first, n):
    for step in range(first, first + n):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


class Watched:
    """Settings that note which of them are read."""

    def __init__(self, settings):
        self.settings, self.read = settings, set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self.settings, name)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_config_refuses_the_settings_that_an_optimizer_does_not_read(kind):
    parameters = trained_parameters(rack())
    watched = Watched(OptimizerConfig(optimizer_type=kind, moments="float32" if kind == "sgd" else "bfloat16"))
    made = optimizer_of(watched)
    made.make(parameters, 0)
    refused = set()
    for key, value in {"betas": [0.5, 0.6], "eps": 0.5, "moments": "int8", "momentum": 0.5}.items():
        try:
            StackWiseConfig.from_dict({"training": {"optimizer": {"optimizer_type": kind, key: value}}})
        except ConfigError:
            refused.add(key)
    assert (
        watched.read - {"optimizer_type", "layer_decay"}
        == {"lr", "weight_decay", "betas", "eps", "moments", "momentum"} - refused
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_the_state_takes_the_bytes_that_are_planned(name):
    model = rack()
    parameters = trained_parameters(model)
    optimizer = create_optimizer(parameters, settings(name))
    steps(model, optimizer, 0, 2)
    for full, p in parameters.items():
        held = [
            t for t in optimizer.state[p].values() if (isinstance(t, torch.Tensor) and t.numel() > 1) or p.numel() == 1
        ]
        assert sum(t.numel() * t.element_size() for t in held) == pytest.approx(
            optimizer_of(settings(name)).state_bytes(full, p), abs=8
        )


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_split_anywhere_ends_bit_identical(name):
    whole, split = rack(), rack()
    steps(whole, create_optimizer(trained_parameters(whole), settings(name), 5), 0, 5)
    parameters, saved = trained_parameters(split), {}
    for first, n in ((0, 2), (2, 3)):
        optimizer = create_optimizer(parameters, settings(name), 5)
        set_moments(optimizer, parameters, unflatten(saved))
        steps(split, optimizer, first, n)
        saved = {key: value.clone() for key, value in flatten(moments_of(optimizer, parameters)).items()}
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), split.parameters()))


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_updating_inside_the_backward_pass_gives_the_same_weights(name, micro):
    plain, inside = rack(), rack()
    optimizer = create_optimizer(trained_parameters(plain), settings(name), 2)
    at_once = InBackward(trained_parameters(inside), settings(name), 2)
    for step in range(3):
        for i in range(micro):
            backward(plain, step + i)
            if i == micro - 1:
                at_once.start()
            backward(inside, step + i)
        norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        assert at_once.norm() == pytest.approx(float(norm), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        assert at_once.seen == set(trained_parameters(inside))
        assert all(p.grad is None for p in inside.parameters())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), inside.parameters()))


def test_gradients_inside_the_backward_pass_never_exist_all_at_once():
    model = rack()
    inside = InBackward(trained_parameters(model), settings("adamw"))
    alive = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad.numel() for q in model.parameters() if q.grad is not None))
        )
    inside.start()
    backward(model, 0)
    assert max(alive) < 0.5 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_gradient_that_is_not_finite_counts_as_zero(name, value):
    """After a step with a momentum: the next one moves the parameter as a gradient of zeros would."""
    ended = []
    for factor in (value, 0.0):
        model = rack()
        inside = InBackward(trained_parameters(model), settings(name))
        inside.start()
        backward(model, 0)
        assert torch.isfinite(torch.tensor(inside.norm()))
        weight = model.stacks[0].blocks[0].ffn.gate_proj.weight
        weight.register_hook(lambda grad, factor=factor: torch.full_like(grad, factor))
        inside.start()
        backward(model, 1)
        assert bool(torch.isfinite(torch.tensor(inside.norm()))) == (factor == 0.0)
        ended.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) and torch.isfinite(a).all() for a, b in zip(*ended))


class Waits(TorchDispatchMode):
    """Counts the values that the host reads, but for counters of steps, which are in its own memory on every device."""

    def __init__(self, state):
        super().__init__()
        self.count, self.state = 0, state

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += all(args[0] is not self.state[p].get("step") for p in self.state)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SETTINGS)
def test_updates_inside_the_backward_pass_wait_for_the_device_at_the_norm_only(name):
    model = rack()
    inside = InBackward(trained_parameters(model), settings(name))
    for step in range(2):
        inside.start()
        with Waits(inside.optimizer.state) as waits:
            backward(model, step)
        assert waits.count == 0
        with waits:
            inside.norm()
        assert waits.count == 1


def test_muon_takes_the_matrices_of_stacks_and_adamw_the_rest():
    model = rack()
    parameters = trained_parameters(model)
    optimizer = create_optimizer(parameters, settings("muon"))
    assert isinstance(optimizer, Several)
    muon, adamw = optimizer.optimizers
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    owned = {name for name, p in parameters.items() if any(p is q for q in muon.param_groups[0]["params"])}
    assert owned == {name for name, p in parameters.items() if name.startswith("stack.") and p.dim() == 2}
    assert len(owned) == 14
    # The orthogonal update of a matrix has the root mean square that AdamW's has, 0.2 lr.
    before = {name: p.detach().clone() for name, p in parameters.items()}
    steps(model, create_optimizer(parameters, OptimizerConfig(optimizer_type="muon", weight_decay=0.0, lr=0.01)), 0, 1)
    moved = before["stack.1/blocks.0.ffn.gate_proj.weight"] - parameters["stack.1/blocks.0.ffn.gate_proj.weight"]
    assert 0.1 < float(moved.detach().square().mean().sqrt()) / 0.01 < 0.3


def test_stored_adamw_in_fp32_is_adamw():
    ours, theirs = (nn.Parameter(drawn(7, 5)) for _ in range(2))
    a = StoredAdamW([ours], 0.03, (0.8, 0.9), 1e-6, 0.2)
    b = torch.optim.AdamW([theirs], 0.03, (0.8, 0.9), 1e-6, 0.2)
    for step in range(6):
        ours.grad, theirs.grad = drawn(7, 5, seed=step + 1), drawn(7, 5, seed=step + 1)
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "int8"])
def test_updating_in_chunks_reads_and_keeps_every_value(moments, dtype, monkeypatch):
    """Values far apart in size in every block, the last chunk and the last block not full: as in one piece."""
    size, chunk = torch.logspace(-1, 0.5, 29 * 61).reshape(29, 61), 2 * stored_adamw.BLOCK
    moved = []
    for limit in (1 << 21, chunk):
        monkeypatch.setattr(stored_adamw, "CHUNK", limit)
        p = nn.Parameter(size.to(dtype, copy=True))
        optimizer = StoredAdamW([p], 0.02, (0.8, 0.9), 1e-6, 0.2, moments=moments)
        for step in range(4):
            p.grad = ((drawn(29, 61, seed=step) + 3) * size).to(dtype)
            optimizer.step()
        moved.append((p.detach().float() / size.to(dtype).float() - 1).flatten())
    if moments == "float32" and dtype == torch.float32:
        assert torch.equal(*moved)
    for whole, parts in zip(moved[0].split(chunk), moved[1].split(chunk)):  # the draws differ, their means do not
        assert float(parts.mean()) == pytest.approx(float(whole.mean()), abs=0.003)
        assert abs(float(whole.mean())) > 0.03


@pytest.mark.parametrize("moments, tolerance", [("bfloat16", 0.02), ("int8", 0.08)])
def test_moments_in_fewer_bits_follow_those_in_fp32(moments, tolerance):
    """A thousand steps of noisy gradients of very unequal size: updates stay near those of exact moments."""
    scale = torch.logspace(-4, 0, 31)
    exact, stored = (nn.Parameter(torch.zeros(101, 31)) for _ in range(2))
    a = StoredAdamW([exact], 1e-3, (0.9, 0.999), 1e-12)
    b = StoredAdamW([stored], 1e-3, (0.9, 0.999), 1e-12, moments=moments)
    draw = torch.Generator().manual_seed(0)
    for _ in range(1000):
        grad = (torch.randn(101, 31, generator=draw) + 0.5) * scale
        exact.grad, stored.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    ratio = stored.mean(dim=0) / exact.mean(dim=0)
    assert (ratio[12:] - 1).abs().max() < tolerance  # down to a 250th of the largest in the block


def test_parameters_of_one_shape_are_rounded_independently():
    """Of a shared draw the errors of two matrices have a correlation of 1/2."""
    parameters = {f"stack.{k}/weight": nn.Parameter(torch.zeros(61, 67)) for k in range(2)}
    optimizer = create_optimizer(parameters, OptimizerConfig(moments="bfloat16", betas=(0.5, 0.5)))
    errors = []
    for k, p in enumerate(parameters.values()):
        p.grad = drawn(61, 67, seed=k)
    optimizer.step()
    for p in parameters.values():
        exact, unit = 0.5 * p.grad, torch.exp2((0.5 * p.grad.abs()).log2().floor() - 7)
        errors.append(((optimizer.state[p]["exp_avg"].float().abs() - exact.abs()) / unit).flatten())
    assert all(float(e.abs().max()) < 1 and float(e.std()) == pytest.approx(6**-0.5, rel=0.1) for e in errors)
    assert abs(float(torch.corrcoef(torch.stack(errors))[0, 1])) < 0.1


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_the_second_moment_does_not_stall(moments):
    """At β₂ = 0.999 each change is far below half a unit of its format: rounding to the nearest would keep it."""
    p = nn.Parameter(torch.zeros(64, 16))
    optimizer = StoredAdamW([p], 0.0, (0.9, 0.999), 1e-8, moments=moments)
    for _ in range(1500):
        p.grad = torch.ones_like(p)
        optimizer.step()
    for _ in range(700):
        p.grad = torch.full_like(p, 0.1)
        optimizer.step()
    state = optimizer.state[p]
    if moments == "bfloat16":
        v = float(state["exp_avg_sq"].float().mean())
    else:
        v = float(((state["exp_avg_sq_codes"].float() / 255) ** 4).mean() * state["exp_avg_sq_scales"].mean())
    expected = 1 - 0.999**1500
    for _ in range(700):
        expected = 0.999 * expected + 0.001 * 0.01
    assert v == pytest.approx(expected, rel=0.05)


def test_bfloat16_weights_move_by_steps_far_below_their_unit():
    p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = create_optimizer({"stack.0/w": p}, OptimizerConfig(lr=1e-5, weight_decay=0.0))
    assert isinstance(optimizer, StoredAdamW)
    for _ in range(200):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert float(p.detach().float().mean()) == pytest.approx(1 - 200e-5, rel=2e-4)
    assert p.dtype == torch.bfloat16 and (p.float() - 1).abs().max() > 0


def test_rounding_at_random_is_unbiased_and_exact_where_it_can_be():
    x = torch.full((100_000,), 1.0 + 2**-7 / 4)
    rounded = round_at_random(x, torch.Generator().manual_seed(0)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert float((rounded > 1).float().mean()) == pytest.approx(0.25, abs=0.01)
    exact = torch.tensor([1.0, -2.5, 0.0, 3e-30]).to(torch.bfloat16).float()
    assert torch.equal(round_at_random(exact, torch.Generator().manual_seed(1)).float(), exact)
