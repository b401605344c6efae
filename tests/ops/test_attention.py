import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from stackwise.ops.attention import attend

B, H, G, D, E = 3, 6, 2, 10, 7


def explicit(q, k, v, *, causal, key_mask=None, window=None, scale=None):
    """The matrix of scores written out."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    T, S = scores.shape[-2:]
    t, s = torch.arange(T)[:, None], torch.arange(S)[None]
    allowed = s <= t if causal else torch.ones(T, S, dtype=torch.bool)
    if window is not None:
        allowed = allowed & ((s > t - window) if causal else ((s - t).abs() <= window // 2))
    allowed = allowed.expand(q.shape[0], 1, T, S)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None]
    return scores.masked_fill(~allowed, -1e30).softmax(-1) @ v, allowed.any(-1)[:, 0]


def inputs(T, seed=2, dtype=torch.float64, n_kv=G):
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, H, T, D), (B, n_kv, T, D), (B, n_kv, T, E))
    return [torch.randn(shape, generator=g, dtype=dtype, requires_grad=True) for shape in shapes]


def padding(T, side):
    if side is None:
        return None
    mask = torch.ones(B, T, dtype=torch.bool)
    if side == "left":
        mask[0, : T // 2] = mask[2, :1] = False
    else:
        mask[0, T // 2 :] = mask[1, T - 1 :] = False
    return mask


@pytest.mark.parametrize("window", [None, 1, 2, 5, 64, 70, 150, 151, 400])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [13, 151])
def test_attention_and_its_gradients_equal_the_explicit_form(T, causal, side, window):
    qkv, mask = inputs(T), padding(T, side)
    expected, sees = explicit(*qkv, causal=causal, key_mask=mask, window=window, scale=0.7)
    actual = attend(*qkv, causal=causal, key_mask=mask, window=window, scale=0.7)
    assert actual.isfinite().all() and actual.shape == (B, H, T, E)
    rows = sees[:, None].expand(B, H, T)
    torch.testing.assert_close(actual[rows], expected[rows], atol=1e-10, rtol=1e-9)
    weight = torch.randn(expected[rows].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for a, e in zip(*(torch.autograd.grad((out[rows] * weight).sum(), qkv) for out in (actual, expected))):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-9)


def test_the_scale_is_that_of_the_given_head_size_by_default():
    q, k, v = inputs(11)
    torch.testing.assert_close(attend(q, k, v, causal=True), attend(q, k, v, causal=True, scale=1 / math.sqrt(D)))
    expected, _ = explicit(q, k, v, causal=True)
    torch.testing.assert_close(attend(q, k, v, causal=True, key_mask=torch.ones(B, 11, dtype=torch.bool)), expected)


def test_the_last_token_alone_sees_all_keys():
    q, k, v = inputs(11)
    whole = attend(q, k, v, causal=True)
    torch.testing.assert_close(attend(q[:, :, -1:], k, v, causal=True), whole[:, :, -1:])


def test_queries_and_keys_of_different_number_are_refused_where_positions_matter():
    q, k, v = inputs(11)
    with pytest.raises(ValueError, match="there are 4 and 11"):
        attend(q[:, :, :4], k, v, causal=True)
    with pytest.raises(ValueError, match="there are 1 and 11"):
        attend(q[:, :, :1], k, v, causal=True, window=3)
    with pytest.raises(ValueError, match="window is 0"):
        attend(q, k, v, causal=True, window=0)
    expected = torch.cat([attend(q[:, :, t : t + 1], k, v, causal=False) for t in range(4)], dim=2)
    torch.testing.assert_close(attend(q[:, :, :4], k, v, causal=False), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("causal", [True, False])
def test_half_precision_masks_as_full_precision_does(causal, window, dtype):
    qkv, mask = [x.detach().to(dtype) for x in inputs(151)], padding(151, "left")
    expected, sees = explicit(*(x.double() for x in qkv), causal=causal, key_mask=mask, window=window)
    actual = attend(*qkv, causal=causal, key_mask=mask, window=window)
    rows = sees[:, None].expand(B, H, 151)
    assert actual.dtype == dtype and actual.isfinite().all()
    torch.testing.assert_close(actual[rows].double(), expected[rows], atol=0.02, rtol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attend(*(x.float() for x in qkv), causal=causal, key_mask=mask, window=window)
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast[rows].double(), expected[rows], atol=0.03, rtol=0.03)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("causal", [True, False])
def test_traced_and_fake_attention_are_the_same(causal, window):
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=False)
    for T in (97, 150):
        qkv, mask = inputs(T), padding(T, "right")
        expected = attend(*qkv, causal=causal, key_mask=mask, window=window)
        actual = compiled(*qkv, causal=causal, key_mask=mask, window=window)
        torch.testing.assert_close(actual, expected)
        for a, e in zip(*(torch.autograd.grad(out.square().sum(), qkv) for out in (actual, expected))):
            torch.testing.assert_close(a, e)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x) for x in (*qkv, mask)]
            out = attend(*fakes[:3], causal=causal, key_mask=fakes[3], window=window)
            grads = torch.autograd.grad(out.sum(), fakes[:3])
        assert out.shape == expected.shape and [g.shape for g in grads] == [x.shape for x in qkv]


class Kernels(TorchDispatchMode):
    """Notes the attention kernels that run, and the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in func.__name__:
            self.names.add(func.__name__.split(".")[0])
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("n_kv", [H, G])
@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_a_fused_kernel_serves_and_no_matrix_of_scores_is_made(causal, padded, window, n_kv):
    T = 1024
    qkv = inputs(T, dtype=torch.float32, n_kv=n_kv)
    mask = padding(T, "left") if padded else None
    with Kernels() as kernels:
        attend(*qkv, causal=causal, key_mask=mask, window=window).sum().backward()
    assert kernels.names and all("flash" in name for name in kernels.names)
    # a head of 10 has a column for the mask; a local chunk of 64 sees at most 96 keys, so that keys are held 1.5 times
    assert kernels.largest <= B * H * T * (D + 1) * (1.5 if window else 1) < B * H * T * T / 60


@pytest.mark.parametrize("window", [None, 5])
def test_dropout_drops_weights_and_keeps_their_mean(window):
    torch.manual_seed(3)
    q, k, v = inputs(13)
    exact = attend(q, k, v, causal=True, window=window)
    draws = torch.stack([attend(q, k, v, causal=True, window=window, dropout=0.3) for _ in range(3000)])
    assert not torch.equal(draws[0], exact)
    error = (draws.mean(0) - exact) / (draws.std(0) / 3000**0.5).clamp(min=1e-9)
    assert error.abs().max() < 6
