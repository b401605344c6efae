"""Stored matrices: their bytes, their errors, and plain references."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stackwise.ops.storage import BLOCKS, DTYPES, E2M1, NF4, PRECISIONS, bytes_per_weight, decode, encode


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def size(stored):
    return sum(t.numel() * t.element_size() for t in stored.values())


def through(weight, precision):
    return decode(encode(weight, precision), precision, weight.shape, torch.float32)


def blocks(weight, n):
    flat = weight.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % n)).view(-1, n)


@pytest.mark.parametrize("precision", BLOCKS)
def test_stored_bytes_are_within_five_percent_of_theory(precision):
    weight = drawn(131, 509)
    theory = {"fp8": 1 + 4 / 128, "int8": 1 + 4 / 128, "nf4": 0.5 + 4 / 64, "nvfp4": 0.5 + 1 / 16}[precision]
    assert bytes_per_weight(precision) == theory
    assert size(encode(weight, precision)) / weight.numel() == pytest.approx(theory, rel=0.05)
    exact = blocks(drawn(128, 512), BLOCKS[precision]).numel() * theory + (4 if precision == "nvfp4" else 0)
    assert size(encode(drawn(128, 512), precision)) == exact


def test_four_bits_take_less_than_sixteen_hundredths_of_fp32():
    assert bytes_per_weight("nf4") / bytes_per_weight("full") < 0.16
    assert [bytes_per_weight(p) for p in ("full", "half", "bfloat16")] == [4, 2, 2]
    assert set(BLOCKS) | set(DTYPES) == set(PRECISIONS)


@pytest.mark.parametrize("precision", BLOCKS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 31), (16, 64)])
def test_every_shape_comes_back_and_zeros_are_exact(precision, shape):
    weight = drawn(*shape)
    weight[0, 0] = 0.0
    back = through(weight, precision)
    assert back.shape == weight.shape and back[0, 0] == 0
    assert torch.equal(through(torch.zeros(shape), precision), torch.zeros(shape))
    # What was rounded once is its own nearest.
    assert torch.equal(through(back, precision), back) or precision == "nvfp4"


@pytest.mark.parametrize("precision, error", [("int8", 0.5 / 127), ("nf4", 0.152), ("nvfp4", 0.19)])
def test_the_error_of_a_weight_is_bounded_by_the_largest_of_its_block(precision, error):
    weight = drawn(61, 127) * torch.logspace(-3, 2, 127)
    n = BLOCKS[precision]
    largest = blocks(weight, n).abs().amax(dim=1, keepdim=True)
    wrong = (blocks(weight, n) - blocks(through(weight, precision), n)).abs()
    if precision == "nvfp4":  # scales far below the matrix's largest are e4m3 subnormals
        kept = largest > 2**-6 * weight.abs().max() / 448
        assert (wrong <= error * largest)[kept.squeeze()].all() and wrong.max() <= error * largest.max()
    else:
        assert (wrong <= (error + 1e-6) * largest).all()
    assert wrong.max() > 0.2 * error * largest.max()


def test_fp8_keeps_three_bits_of_every_weight():
    weight = drawn(61, 127)
    back = through(weight, "fp8")
    largest = blocks(weight, 128).abs().amax(dim=1, keepdim=True).expand(-1, 128).flatten()[: weight.numel()]
    bound = torch.maximum(2**-4 * weight.abs().flatten(), largest * 2**-10 / 448)
    assert ((back - weight).abs().flatten() <= bound * (1 + 1e-5)).all()
    assert torch.equal(back.flatten().abs().max(), weight.abs().max())


@pytest.mark.parametrize("precision, table", [("nf4", NF4), ("nvfp4", (*E2M1, *(-x for x in E2M1)))])
def test_a_code_is_the_nearest_value_of_its_table(precision, table):
    weight = drawn(8, 64)
    stored, values = encode(weight, precision), torch.tensor(table)
    scales = stored["scales"].float() * (stored["scale"] if precision == "nvfp4" else 1.0)
    rows = blocks(weight, BLOCKS[precision])
    nearest = (rows[..., None] - (values * scales[:, None])[:, None]).abs().argmin(dim=-1)
    reference = torch.gather(values * scales[:, None], 1, nearest)
    assert torch.allclose(reference.flatten()[:512].view(8, 64), through(weight, precision), atol=1e-7)


def test_the_values_of_nf4_are_normal_quantiles_and_end_at_one():
    """QLoRA 2305.14314 §3: 8 quantiles on the right, 7 on the left, zero between them, scaled to ±1."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    right = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    left = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    table = torch.cat((right, torch.zeros(1), left)).sort().values
    torch.testing.assert_close(table / table.max(), torch.tensor(NF4), rtol=0, atol=2e-5)


@pytest.mark.parametrize("precision", BLOCKS)
def test_nothing_needs_the_data(precision):
    with FakeTensorMode():
        fake = through(torch.empty(7, 19), precision)
    meta = encode(torch.empty(7, 19, device="meta"), precision)
    real = encode(drawn(7, 19), precision)
    assert fake.shape == (7, 19)
    assert {k: (t.shape, t.dtype) for k, t in meta.items()} == {k: (t.shape, t.dtype) for k, t in real.items()}
