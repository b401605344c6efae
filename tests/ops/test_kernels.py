import math
from typing import get_args

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from stackwise.config.attention import KernelType
from stackwise.model.attention import AttentionBuilder
from stackwise.ops.attention import attend
from stackwise.ops.kernels import KERNELS as RECORDS
from stackwise.ops.kernels import (
    LAPLACIAN_TIP,
    _block_mask,
    _laplacian,
    _laplacian_backward,
    _laplacian_flex,
    fourier_features,
    gaussian_weight_columns,
    laplacian_weight_attention,
)
from stackwise.ops.rope import apply_rope, rope_table

D = 6
KERNELS = [("gaussian", "l2"), ("laplacian", "l2"), ("laplacian", "l1"), ("uniform", "l2")]


def named(kind, norm="l2"):
    return RECORDS["laplacian_l1" if norm == "l1" else kind]


def frequencies(kind, n, size, s, norm, g, tip=0.0):
    return named(kind, norm).frequencies(n, size, s, g, tip)


def kernel(q, k, kind, s, norm="l2"):
    return named(kind, norm)(q, k, s)


def default_bandwidth(kind, meaning, size):
    return named(kind).default_bandwidth(meaning, size)


def default_temperature(kind, s, size):
    return named(kind).temperature(s, size)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pairs(n=40, dtype=torch.float64):
    g = generator(1)
    q, k = (torch.randn(n, D, generator=g, dtype=dtype) for _ in range(2))
    k[: n // 2] = q[: n // 2] + 0.3 * k[: n // 2]  # near pairs too
    return q, k


@pytest.mark.parametrize("kind, norm", KERNELS)
def test_features_converge_to_the_closed_form_of_their_kernel(kind, norm):
    """Each term is bounded, so by Hoeffding the worst of 40 errors is below 4 √(2/n)."""
    q, k = pairs()
    exact = kernel(q, k, kind, 1.7, norm)
    for n in (100, 1_600, 25_600):
        w = frequencies(kind, n, D, 1.7, norm, generator(n)).double()
        approximate = (fourier_features(q, w) * fourier_features(k, w)).sum(-1)
        bound = 4 * (2 / n) ** 0.5
        assert (approximate - exact).abs().max() < bound
    assert bound < 0.08
    others = [kernel(q, k, *other[:1], 1.7, other[1]) for other in KERNELS if other != (kind, norm)]
    assert all((approximate - other).abs().max() > bound for other in others), "the bound tells the kernels apart"


def far_from(samples, distribution):
    """The largest gap between the distribution of the samples and ``distribution``, in units of 1/√n.

    Above 3 with probability 2 exp(−18) (Dvoretzky, Kiefer and Wolfowitz).
    """
    n = len(samples)
    steps = torch.arange(1, n + 1).double() / n
    return n**0.5 * (distribution(samples.double().sort().values) - steps).abs().max()


def normal(x):
    return 0.5 + 0.5 * torch.erf(x / 2**0.5)


def cauchy(x):
    return 0.5 + x.atan() / math.pi


def flat(x):
    return (0.5 + x / 2).clamp(0, 1)


def test_frequencies_follow_the_spectral_density_of_their_kernel():
    n, s = 10_000, 1.7
    direction = torch.randn(D, generator=generator(9))
    direction /= direction.norm()
    for (kind, norm), density in zip(KERNELS, (normal, cauchy, cauchy, flat)):
        w = frequencies(kind, n, D, s, norm, generator(11)) * s
        assert all(far_from(w[:, i], density) < 3 for i in range(D))
        isotropic = (kind, norm) in (("gaussian", "l2"), ("laplacian", "l2"))
        assert (far_from(w @ direction, density) < 3) == isotropic
        # |w₀| < 1 and |w₁| < 1 together: 1/3 for the bivariate Cauchy, 1/4 for two Cauchy numbers.
        both = ((w[:, 0].abs() < 1) & (w[:, 1].abs() < 1)).double().mean().item()
        if kind == "laplacian":
            assert both == pytest.approx(1 / 3 if norm == "l2" else 1 / 4, abs=5 * (0.25 / n) ** 0.5)


def test_angles_of_16_bit_inputs_are_exact():
    x = (100 * torch.randn(31, D, generator=generator())).bfloat16()
    w = frequencies("gaussian", 7, D, 0.1, "l2", generator(1))
    expected = fourier_features(x.double(), w)
    assert fourier_features(x, w).dtype == torch.bfloat16
    assert (fourier_features(x, w) - expected).abs().max() < 2e-3  # rounding of the features alone
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Angles are up to some thousands: fp32 rounds them by up to 5e-4; products in bfloat16 would be off by turns.
        assert (fourier_features(x.float(), w) - expected).abs().max() < 1e-3


def test_a_config_may_name_every_kernel_and_every_way_to_project():
    assert set(RECORDS) == {*get_args(KernelType), "laplacian_l1"}


@pytest.mark.parametrize("field, value, allowed", [
    ("kernel_type", "cosine", "linear, gaussian, laplacian, uniform"),
    ("kernel_norm", "l3", "l2, l1"),
    ("kernel_meaning", "key", "logit, weight"),
])  # fmt: skip
def test_names_that_are_no_kernel_are_refused_with_those_that_are(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field} is '{value}'; allowed: {allowed}$"):
        AttentionBuilder(8, 2, **{field: value}).build()


@pytest.mark.parametrize("fields, message", [
    ({"kernel_type": "uniform"}, "exact for gaussian, laplacian; not for uniform"),
    ({"kernel_type": "laplacian", "kernel_norm": "l1"}, "exact for gaussian, laplacian; not for laplacian_l1"),
    ({"kernel_type": "laplacian", "dropout": 0.1}, "laplacian as weight has no dropout"),
    ({"kernel_type": "gaussian", "learned_temperature": True}, "learned_temperature needs a kernel as logit"),
])  # fmt: skip
def test_only_an_exact_kernel_is_a_weight(fields, message):
    with pytest.raises(ValueError, match=message):
        AttentionBuilder(8, 2, kernel_meaning="weight", **fields).build()


def test_the_closed_forms_are_the_kernels_of_the_table():
    q, k = torch.tensor([0.3, -1.2, 2.0]).double(), torch.tensor([1.0, 0.4, 2.5]).double()
    d = [0.7, 1.6, 0.5]
    assert kernel(q, k, "gaussian", 2.0).item() == pytest.approx(math.exp(-sum(x * x for x in d) / 8))
    assert kernel(q, k, "laplacian", 2.0).item() == pytest.approx(math.exp(-math.sqrt(sum(x * x for x in d)) / 2))
    assert kernel(q, k, "laplacian", 2.0, "l1").item() == pytest.approx(math.exp(-sum(d) / 2))
    assert kernel(q, k, "uniform", 2.0).item() == pytest.approx(math.prod(math.sin(x / 2) / (x / 2) for x in d))
    for kind, norm in KERNELS:
        assert kernel(q, q, kind, 2.0, norm).item() == 1.0


@pytest.mark.parametrize("kind, norm", KERNELS)
def test_features_see_differences_alone_and_have_length_one(kind, norm):
    q, k = pairs()
    w = frequencies(kind, 13, D, 1.7, norm, generator()).double()
    near = (fourier_features(q, w) * fourier_features(k, w)).sum(-1)
    shift = torch.randn(D, generator=generator(5), dtype=torch.float64)
    moved = (fourier_features(q + shift, w) * fourier_features(k + shift, w)).sum(-1)
    torch.testing.assert_close(near, moved, atol=1e-9, rtol=0)
    torch.testing.assert_close(near, (w @ (q - k).T).cos().mean(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(fourier_features(q, w).square().sum(-1), torch.ones(len(q)).double())


def test_frequencies_come_from_the_generator_alone():
    for kind, norm in KERNELS:
        a, b, c = (frequencies(kind, 5, D, 1.0, norm, generator(seed)) for seed in (3, 3, 4))
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert torch.allclose(frequencies(kind, 5, D, 4.0, norm, generator(3)), a / 4)


def test_a_rounded_tip_bounds_the_frequencies_and_changes_the_kernel_by_less_than_its_probability():
    n, s = 40_000, 1.7
    w = frequencies("laplacian", n, D, s, "l2", generator(), LAPLACIAN_TIP).double()
    z = frequencies("gaussian", n, D, 1.0, "l2", generator()).double()
    assert (w.norm(dim=1) <= z.norm(dim=1) / (LAPLACIAN_TIP * s) + 1e-6).all()
    distance = torch.linspace(0, 6, 50, dtype=torch.float64)
    points = distance[:, None] * torch.eye(D, dtype=torch.float64)[0]
    rounded = (w @ points.T).cos().mean(0)
    difference = (rounded - (-distance / s).exp()).abs()
    probability = math.erf(LAPLACIAN_TIP / 2**0.5)
    assert 0.02 < difference.max() < probability  # 0.085 at 0.19 s; the bound is 0.20
    assert difference[distance > 4 * s * LAPLACIAN_TIP].max() < 0.03


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_the_default_temperature_makes_near_logits_those_of_dot_products(kind):
    d = 64
    s = default_bandwidth(kind, "logit", d)
    q = torch.randn(d, generator=generator(), dtype=torch.float64)
    k = q + 0.05 * torch.randn(7, d, generator=generator(1), dtype=torch.float64)
    logits = default_temperature(kind, s, d) * (kernel(q, k, kind, s) - 1)
    torch.testing.assert_close(logits, -(q - k).square().sum(-1) / 2 / d**0.5, atol=0, rtol=1e-3)


def test_the_default_temperature_of_the_laplacian_gives_its_tip_slope_one():
    s = default_bandwidth("laplacian", "logit", 64)
    q, k = torch.zeros(64).double(), torch.full((64,), 1e-4).double()
    slope = default_temperature("laplacian", s, 64) * (1 - kernel(q, k, "laplacian", s)) / (q - k).norm()
    assert slope.item() == pytest.approx(1, rel=1e-4)


def test_default_gaussian_weights_are_the_softmax_of_dot_products_for_keys_of_equal_length():
    q, k = (torch.randn(n, 16, generator=generator(n), dtype=torch.float64) for n in (5, 7))
    k = 3 * k / k.norm(dim=-1, keepdim=True)
    weights = kernel(q[:, None], k[None], "gaussian", default_bandwidth("gaussian", "weight", 16))
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), (q @ k.T / 16**0.5).softmax(-1))


B, H, G, T, E = 2, 4, 2, 11, 5


def qkv(dtype=torch.float64):
    g = generator(7)
    shapes = ((B, H, T, D), (B, G, T, D), (B, G, T, E))
    return [torch.randn(shape, generator=g, dtype=dtype, requires_grad=True) for shape in shapes]


def mean_by_kernel(q, k, v, kind, s, causal, mask, window=None):
    """Σ k(q, k) v / Σ k(q, k), with every kernel value written out."""
    k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    weights = kernel(q[:, :, :, None], k[:, :, None], kind, s)
    t, i = torch.arange(T)[:, None], torch.arange(T)[None]
    allowed = i <= t if causal else torch.ones(T, T, dtype=torch.bool)
    if window is not None:
        allowed = allowed & ((i > t - window) if causal else ((i - t).abs() <= window // 2))
    if mask is not None:
        allowed = allowed & mask[:, None, None]
    weights = weights * allowed
    return weights @ v / weights.sum(-1, keepdim=True)


def padding(side):
    mask = torch.ones(B, T, dtype=torch.bool)
    if side == "right":
        mask[1, 10:] = False
    return None if side is None else mask


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("side", [None, "right"])
@pytest.mark.parametrize("causal", [True, False])
def test_gaussian_weights_equal_the_mean_weighted_by_the_kernel(causal, side, dtype, atol):
    q, k, v = qkv(dtype)
    mask, s = padding(side), 1.3
    columns = gaussian_weight_columns(q, k, s)
    actual = attend(*columns, v, causal=causal, key_mask=mask, scale=s**-2)
    torch.testing.assert_close(actual, mean_by_kernel(q, k, v, "gaussian", s, causal, mask), atol=atol, rtol=0)


def test_the_second_column_holds_what_bfloat16_rounds_away():
    q, k, v = (x.detach().bfloat16() for x in qkv(torch.float32))
    expected = mean_by_kernel(q.float(), k.float(), v.float(), "gaussian", 1.3, True, None)
    q_columns, k_columns = gaussian_weight_columns(q, k, 1.3)
    both = attend(q_columns, k_columns, v, causal=True, scale=1.3**-2)
    one = attend(q_columns[..., :-1], k_columns[..., :-1], v, causal=True, scale=1.3**-2)
    error, rounded = ((out.float() - expected).abs().max() for out in (both, one))
    assert error < 0.005 < rounded


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("side", [None, "right"])
@pytest.mark.parametrize("causal", [True, False])
def test_laplacian_weights_and_their_gradients_equal_the_mean_weighted_by_the_kernel(causal, side, window, monkeypatch):
    monkeypatch.setattr("stackwise.ops.kernels.TILE_QUERIES", 3)
    inputs, mask, s = qkv(), padding(side), 0.9
    actual = laplacian_weight_attention(*inputs, s, causal=causal, key_mask=mask, window=window)
    expected = mean_by_kernel(*inputs, "laplacian", s, causal, mask, window)
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)
    weight = torch.randn(expected.shape, generator=generator(2), dtype=torch.float64)
    for a, e in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (actual, expected))):
        torch.testing.assert_close(a, e, atol=1e-9, rtol=1e-7)


def test_single_precision_laplacian_weights_are_those_of_double_precision():
    q, k, v = (x.detach() for x in qkv(torch.float32))
    actual = laplacian_weight_attention(q, k, v, 0.9, causal=True)
    expected = mean_by_kernel(q.double(), k.double(), v.double(), "laplacian", 0.9, True, None)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0)


def test_the_gradients_of_laplacian_weights_are_the_slopes_of_finite_differences():
    inputs = [x.detach()[:1, :2, :4].requires_grad_() for x in qkv()]
    mask = torch.tensor([[True, True, False, True]])
    assert torch.autograd.gradcheck(
        lambda *x: laplacian_weight_attention(*x, 0.9, causal=False, key_mask=mask), inputs, atol=1e-7
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_query_at_its_key_has_distance_zero_and_no_slope_there(dtype):
    q, v = (torch.randn(3, 1, n, d, generator=generator(d), dtype=dtype) for n, d in ((17, 64), (17, 5)))
    inputs = [x.requires_grad_() for x in (q, q.clone().detach(), v)]
    out = laplacian_weight_attention(*inputs, 2.0, causal=False)
    actual = torch.autograd.grad(out.square().sum(), inputs)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    square = (doubles[0][:, :, :, None] - doubles[1][:, :, None]).square().sum(-1)
    apart = ~torch.eye(17, dtype=torch.bool)
    distance = torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)
    expected = (-distance / 2.0).softmax(-1) @ doubles[2]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
    for a, e in zip(actual, torch.autograd.grad(expected.square().sum(), doubles)):
        torch.testing.assert_close(a.double(), e, atol=1e-5, rtol=1e-4)


def test_a_query_that_sees_padded_keys_only_gets_finite_numbers_and_gradients():
    inputs, mask = qkv(torch.float32), torch.ones(B, T, dtype=torch.bool)
    mask[1, :4] = False
    out = laplacian_weight_attention(*inputs, 0.9, causal=True, key_mask=mask)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), inputs))


def test_later_tokens_and_padded_ones_change_no_bit():
    q, k, v = (x.detach() for x in qkv(torch.float32))
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, 2] = False

    def first(k, v):
        return laplacian_weight_attention(q, k, v, 0.9, causal=True, key_mask=mask)[:, :, 3:6]

    before = first(k, v)
    k, v = k.clone(), v.clone()
    k[:, :, 6:], v[:, :, 6:], k[:, :, 2], v[:, :, 2] = 9.0, -7.0, 5.0, 3.0
    assert torch.equal(first(k, v), before)


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_laplacian_weights_make_no_matrix_of_distances(monkeypatch):
    monkeypatch.setattr("stackwise.ops.kernels.TILE", 1 << 14)
    g, n = generator(), 512
    q, k, v = (torch.randn(2, h, n, 10, generator=g) for h in (4, 2, 2))
    far = torch.zeros(2, n)
    with Largest() as largest:  # within the operations themselves, which are one to the dispatcher
        out = _laplacian._init_fn(q, k, v, far, 1.0, n, 0)
        _laplacian_backward._init_fn(out, q, k, v, far, out, 1.0, n, 0)
    assert 1 << 14 <= largest.elements <= max(1 << 14, q.numel()) < n * n / 4


@pytest.mark.parametrize("window", [None, 4])
def test_a_dry_run_of_laplacian_weights_makes_no_data_and_counts_the_products(window):
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, k, v = (torch.empty(2, h, 37, d, requires_grad=True) for h, d in ((4, 10), (2, 10), (2, 7)))
        out = laplacian_weight_attention(q, k, v, 1.0, causal=True, window=window)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert out.shape == (2, 4, 37, 7) and [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]
    pairs = 2 * 4 * 37 * (37 if window is None else window)
    assert forward == 2 * pairs * (12 + 7)
    assert counter.get_total_flops() - forward == 2 * pairs * (3 * 12 + 2 * 7)


def test_laplacian_weights_compile_whole():
    inputs = qkv()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :2] = False

    def run(q, k, v):
        return laplacian_weight_attention(q.sin(), k, v, 0.9, causal=False, key_mask=mask).cos()

    expected, actual = run(*inputs), torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(*(torch.autograd.grad(out.sum(), inputs) for out in (actual, expected))):
        torch.testing.assert_close(a, e)


def test_laplacian_weights_are_computed_in_single_precision_under_autocast():
    q, k, v = (x.detach() for x in qkv(torch.float32))
    expected = laplacian_weight_attention(q, k, v, 0.9, causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(laplacian_weight_attention(q, k, v, 0.9, causal=True), expected)
    halves = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    out = laplacian_weight_attention(*halves, 0.9, causal=True)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(out.sum(), halves))


FLEX_CASES = [(False, None, False), (True, None, True), (True, 70, True), (False, 70, False)]
FLEX_IDS = ["all", "causal_padded", "causal_window_padded", "window"]


def flex_inputs(device="cpu", dtype=torch.float64):
    """Sizes beyond two blocks of FlexAttention."""
    g, n = generator(4), 300
    shapes = ((2, 4, n, 10), (2, 2, n, 10), (2, 2, n, 16))
    mask = torch.ones(2, n, dtype=torch.bool, device=device)
    mask[1, 250:] = False
    inputs = [torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype) for shape in shapes]
    return [x.requires_grad_() for x in inputs], mask


def reach(causal, window):
    """How far before and after a query its keys lie."""
    far = 600 if window is None else (window - 1 if causal else window // 2)
    return far, 0 if causal else far


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal, window, padded", FLEX_CASES, ids=FLEX_IDS)
def test_flex_attention_gives_the_laplacian_weights_and_their_gradients(causal, window, padded, monkeypatch):
    """Its uncompiled form, which can differentiate on a CPU though it refuses to."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *inputs: None)
    monkeypatch.setattr("stackwise.ops.kernels._compiled_flex_attention", lambda: flex_attention)
    inputs, mask = flex_inputs()
    mask = mask if padded else None
    actual = _laplacian_flex(*inputs, 1.3, *reach(causal, window), mask)
    expected = laplacian_weight_attention(*inputs, 1.3, causal=causal, key_mask=mask, window=window)
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)
    weight = torch.randn(expected.shape, generator=generator(2), dtype=torch.float64)
    for a, e in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (actual, expected))):
        torch.testing.assert_close(a, e, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("causal, window", [(True, None), (True, 70), (False, 70), (False, 300), (True, 129)])
def test_flex_attention_skips_exactly_the_blocks_that_no_query_sees(causal, window):
    n, (before, after) = 1000, reach(causal, window)
    blocks = _block_mask(n, n, before, after, None, torch.device("cpu")).to_dense()[0, 0].bool()
    t, s = torch.arange(n)[:, None], torch.arange(n)
    seen = torch.nn.functional.pad((s <= t + after) & (s >= t - before), (0, 24, 0, 24))
    assert torch.equal(blocks, seen.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).any(dim=3).any(dim=1))


@pytest.mark.slow
def test_compiled_flex_attention_gives_the_laplacian_weights():
    inputs, mask = flex_inputs(dtype=torch.float32)
    with torch.no_grad():
        inputs = [x.detach() for x in inputs]
        actual = _laplacian_flex(*inputs, 1.3, *reach(True, 70), mask)
        expected = laplacian_weight_attention(*inputs, 1.3, causal=True, key_mask=mask, window=70)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("causal, window, padded", FLEX_CASES, ids=FLEX_IDS)
def test_laplacian_weights_on_a_gpu_are_those_of_double_precision(causal, window, padded, dtype, tolerance):
    inputs, mask = flex_inputs("cuda", dtype)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    options = {"causal": causal, "key_mask": mask if padded else None, "window": window}
    actual, expected = (laplacian_weight_attention(*x, 1.3, **options) for x in (inputs, doubles))
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)
    gradients = (torch.autograd.grad(out.square().sum(), x) for out, x in ((actual, inputs), (expected, doubles)))
    for a, e in zip(*gradients):
        torch.testing.assert_close(a.double(), e, atol=3 * tolerance, rtol=3 * tolerance)


def test_one_query_sees_all_keys_when_decoding():
    q, k, v = qkv()
    whole = laplacian_weight_attention(q, k, v, 0.9, causal=True)
    torch.testing.assert_close(laplacian_weight_attention(q[:, :, -1:], k, v, 0.9, causal=True), whole[:, :, -1:])


def test_the_l2_laplacian_after_rotation_depends_on_relative_positions_only():
    q, k = (x[None, None, :1].double() for x in pairs())
    cos, sin = rope_table(30, D, 10000.0, torch.device("cpu"))

    def at(x, position):
        return apply_rope(x, cos[position : position + 1], sin[position : position + 1])

    values = {norm: [kernel(at(q, m + 5), at(k, m), "laplacian", 1.0, norm).item() for m in range(0, 25, 4)]
              for norm in ("l2", "l1")}  # fmt: skip
    assert max(values["l2"]) - min(values["l2"]) < 1e-6
    assert max(values["l1"]) - min(values["l1"]) > 1e-3
    assert abs(kernel(at(q, 9), at(k, 0), "laplacian", 1.0).item() - values["l2"][0]) > 1e-3
