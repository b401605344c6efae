"""A linear layer in every storage, with adapters."""

import pytest
import torch
import torch.nn.functional as F

from stackwise.kinds import STORAGES
from stackwise.model.linear import Linear, LowRank

N_IN, N_OUT = 37, 23


def layer(precision="full", bias=True):
    torch.manual_seed(0)
    made = Linear(N_IN, N_OUT, bias)
    made.store(precision)
    return made.requires_grad_(False)


def adapted(precision="full", rank=3):
    made = layer(precision)
    for i, kind in enumerate(("stack", "progressive")):
        low = made.adapters[kind] = LowRank(N_IN, N_OUT, rank + i, 5.0 + i)
        torch.nn.init.normal_(low.A)
        torch.nn.init.normal_(low.B)
    return made


def inputs(dtype=torch.float32):
    return torch.randn(2, 7, N_IN, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("precision", STORAGES)
def test_output_and_gradient_are_those_of_the_stored_matrix(precision, bias):
    made, x = layer(precision, bias), inputs()
    expected = F.linear(x, made.dense(), made.bias)
    out = made(x)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    (a,), (b,) = (torch.autograd.grad(y.square().sum(), x) for y in (out, expected))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", STORAGES)
def test_autocast_multiplies_in_its_dtype(precision):
    made, x = layer(precision), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(x)
        expected = F.linear(x, made.dense(), made.bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.01, atol=0.01)
    along = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (a,), (b,) = (torch.autograd.grad((y.float() * along).sum(), x) for y in (out, expected))
    assert a.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("precision", [name for name in STORAGES if name != "full"])
def test_nothing_dense_is_kept_for_the_backward_pass(precision):
    made, x = layer(precision), inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = made(x)
    own = {t.data_ptr() for t in made.state_dict().values()}
    assert saved and {t.data_ptr() for t in saved} <= own
    out.sum().backward()


def test_what_trains_beside_codes_is_the_bias():
    made, x = layer("nf4"), inputs()
    made.bias.requires_grad_()
    made(x).square().sum().backward()
    dense = made.dense()
    torch.testing.assert_close(made.bias.grad, 2 * F.linear(x, dense, made.bias).detach().sum(dim=(0, 1)))
    assert [name for name, p in made.named_parameters() if p.grad is not None] == ["bias"]


@pytest.mark.parametrize("precision", ["full", "nf4"])
def test_gradients_of_factors_are_those_of_finite_differences(precision):
    low = LowRank(5, 3, 2, 3.0).double()
    torch.nn.init.normal_(low.A)
    torch.nn.init.normal_(low.B)
    made = Linear(5, 3).double()
    if precision != "full":
        made.store(precision)
    made.requires_grad_(False)
    made.adapters["stack"] = low
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def output(x, a, b):
        return torch.func.functional_call(made, {"adapters.stack.A": a, "adapters.stack.B": b}, (x,))

    assert torch.autograd.gradcheck(output, (x, low.A.detach().requires_grad_(), low.B.detach().requires_grad_()))


@pytest.mark.parametrize("precision", STORAGES)
def test_adapters_add_what_their_factors_say_and_alone_get_gradients(precision):
    made, x = adapted(precision), inputs()
    matrix = made.dense()
    for low in made.low_rank().values():
        matrix = matrix + (low.alpha / low.rank) * low.B @ low.A
    out, expected = made(x), F.linear(x, matrix, made.bias)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    factors = [p for low in made.low_rank().values() for p in (low.A, low.B)]
    ours, theirs = (torch.autograd.grad(y.square().sum(), [x, *factors]) for y in (out, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made.merged(), matrix.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", STORAGES)
def test_compiled_gives_the_same(precision):
    torch._dynamo.reset()
    made, x = adapted(precision), inputs()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    out, expected = compiled(x), made(x)
    torch.testing.assert_close(out, expected)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), x) for y in (out, expected))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("precision", STORAGES)
def test_a_frozen_layer_whose_input_needs_no_gradient_compiles_whole(precision):
    torch._dynamo.reset()
    made, x = layer(precision).requires_grad_(False), inputs()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x.detach()), made(x).detach())
    assert torch.equal(made(x.detach()), made(x).detach())


@pytest.mark.parametrize("precision", STORAGES)
def test_state_goes_through_a_dictionary_and_back_to_full(precision):
    made, other = adapted(precision), adapted(precision, rank=3)
    for p in other.parameters():
        p.data.zero_()
    other.load_state_dict(made.state_dict())
    x = inputs()
    assert torch.equal(other(x), made(x))
    kept, dense = {n: p.clone() for n, p in made.adapters.named_parameters()}, made.dense()
    made.store("full")
    assert torch.equal(made.weight, dense) and not made.weight.requires_grad
    assert all(torch.equal(p, kept[n]) for n, p in made.adapters.named_parameters())
    assert {n for n in made.state_dict() if "." not in n} == {"weight", "bias"}


def test_dropout_of_an_adapter_is_of_its_input_while_training():
    low = LowRank(N_IN, N_OUT, 3, 3.0, dropout=0.4)
    torch.nn.init.normal_(low.A)
    torch.nn.init.normal_(low.B)
    x = inputs().detach()
    exact = low.eval()(x)
    torch.testing.assert_close(exact, F.linear(x, low.delta()), rtol=1e-4, atol=1e-4)
    low.train()
    assert not torch.equal(low(x), exact)
    mean = torch.stack([low(x) for _ in range(4000)]).mean(dim=0)
    assert (mean - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision is 'int3'; allowed: full, half, bfloat16, fp8, int8, nf4, nvfp4"):
        layer().store("int3")
