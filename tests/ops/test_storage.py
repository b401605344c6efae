"""Stored matrices: their bytes, their errors, and plain references."""

import math
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stackwise.kinds import STORAGES
from stackwise.ops.storage import E2M1, NF4, storage_of

BLOCKS = {"fp8": 128, "int8": 128, "nf4": 64, "nvfp4": 16}
"""Weights that share a scale, by storage."""
DTYPES = {"full": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


def encode(weight, precision):
    return storage_of(precision).encode(weight)


def bytes_per_weight(precision):
    return storage_of(precision).bytes_per_weight


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def size(stored):
    return sum(t.numel() * t.element_size() for t in stored.values())


def through(weight, precision):
    return storage_of(precision).decode(encode(weight, precision), weight.shape, torch.float32)


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


def test_a_storage_makes_the_tensors_that_it_names_and_those_that_train_are_a_parameter_of_few_rounding_errors():
    assert {*BLOCKS, *DTYPES} == set(STORAGES)
    assert [name for name, kind in STORAGES.items() if kind.trains] == ["full", "bfloat16"]
    for name in STORAGES:
        storage = storage_of(name)
        assert tuple(storage.encode(drawn(3, 5))) == storage.names, name


@pytest.mark.parametrize("precision", BLOCKS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 31), (16, 64)])
def test_every_shape_comes_back_and_zeros_are_exact(precision, shape):
    weight = drawn(*shape)
    weight[0, 0] = 0.0
    back = through(weight, precision)
    assert back.shape == weight.shape and back[0, 0] == 0
    assert torch.equal(through(torch.zeros(shape), precision), torch.zeros(shape))


@pytest.mark.parametrize("precision", BLOCKS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 31), (29, 64)])
def test_what_was_rounded_once_is_its_own_nearest(precision, shape):
    back = through(drawn(*shape), precision)
    torch.testing.assert_close(through(back, precision), back, rtol=3e-7, atol=0)  # scales may differ in their last bit


@pytest.mark.parametrize("precision", BLOCKS)
def test_a_block_of_zeros_and_a_block_cut_short_do_not_touch_their_neighbours(precision):
    n = BLOCKS[precision]
    flat = drawn(3 * n + 5) + 3
    alone = torch.cat([through(flat[i : i + n][None], precision)[0] for i in range(0, len(flat), n)])
    flat[n : 2 * n] = 0
    back = through(flat[None], precision)[0]
    assert not back[n : 2 * n].any()
    if precision == "nvfp4":  # its one scale for the matrix is not that of a block alone
        assert (back - flat).abs().max() <= 17 / 96 * flat.max()
    else:
        assert torch.equal(back[:n], alone[:n]) and torch.equal(back[2 * n :], alone[2 * n :])


@pytest.mark.parametrize("precision, error", [("int8", 0.5 / 127), ("nf4", 0.152), ("nvfp4", 17 / 96)])
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
    assert (wrong / largest).max() > 0.85 * error


def test_fp8_keeps_three_bits_of_every_weight():
    weight = drawn(61, 127)
    back = through(weight, "fp8")
    largest = blocks(weight, 128).abs().amax(dim=1, keepdim=True).expand(-1, 128).flatten()[: weight.numel()]
    bound = torch.maximum(2**-4 * weight.abs().flatten(), largest * 2**-10 / 448)
    assert ((back - weight).abs().flatten() <= bound * (1 + 1e-5)).all()
    assert torch.equal(back.flatten().abs().max(), weight.abs().max())


@pytest.mark.parametrize("precision, error", [("bfloat16", 2**-8), ("half", 2**-11)])
def test_a_dtype_keeps_its_bits_of_every_weight(precision, error):
    weight = drawn(61, 127)
    wrong = ((weight.to(DTYPES[precision]).float() - weight) / weight).abs().max()
    assert 0.95 * error < wrong <= error


def e4m3(x):
    """The nearest 8-bit float with three bits of mantissa, ties to even; ±448 at most, 2⁻⁶ the smallest normal one."""
    if x == 0:
        return 0.0
    step = 2.0 ** (max(math.frexp(abs(x))[1] - 1, -6) - 3)
    return math.copysign(min(round(abs(x) / step) * step, 448.0), x)


def slow_fp8(row):
    scale = max(abs(w) for w in row) / 448 or 1.0
    return [e4m3(w / scale) * scale for w in row]


def slow_nvfp4(row, largest):
    scale = largest / (6 * 448)
    of_block = e4m3(max(abs(w) for w in row) / 6 / scale) * scale
    if of_block == 0:
        return [0.0] * len(row)
    return [math.copysign(min(E2M1, key=lambda v: abs(abs(w) / of_block - v)) * of_block, w) for w in row]


@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
def test_floats_of_few_bits_equal_a_plain_reference(precision):
    weight = drawn(7, 53) * torch.logspace(-4, 1, 53)
    flat, n = weight.flatten().tolist(), BLOCKS[precision]
    rows = [flat[i : i + n] for i in range(0, len(flat), n)]
    largest = max(abs(w) for w in flat)
    wanted = [w for row in rows for w in (slow_fp8(row) if precision == "fp8" else slow_nvfp4(row, largest))]
    torch.testing.assert_close(
        through(weight, precision).flatten(), torch.tensor(wanted), rtol=1e-6, atol=1e-12 * largest
    )


def test_the_plain_reference_of_e4m3_is_that_of_the_format():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = sorted({abs(x) for x in codes.tolist() if not math.isnan(x)})
    assert [e4m3(x) for x in values] == values and len(values) == 127
    middles = [(a + b) / 2 for a, b in pairwise(values)]
    assert all(e4m3(m * (1 - 1e-9)) == a for m, a in zip(middles, values))
    assert all(e4m3(m * (1 + 1e-9)) == b for m, b in zip(middles, values[1:]))


def test_nf4_codes_are_the_code_book_of_qlora_in_its_order_and_two_make_a_byte():
    stored = encode(torch.tensor(NF4 * 4) * 2.5, "nf4")
    assert stored["codes"].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 4
    assert stored["scales"].tolist() == [2.5]
    # Where bitsandbytes' kernel changes code, from above and below.
    edges = [0.8614784181118011, 0.3893125355243683, 0.03979014977812767, -0.13791173323988914, -0.8480964004993439]
    block = torch.tensor([1.0, 0.0] + [e + d for e in edges for d in (1e-5, -1e-5)] + [0.0] * 52)
    codes = encode(block, "nf4")["codes"].tolist()
    assert codes[:6] == [0xF7, 0xFE, 0xCB, 0x87, 0x65, 0x10]


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
