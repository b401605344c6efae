import math

import pytest
import torch

from stackwise.config import StackWiseConfig
from stackwise.model.attention import AttentionBuilder, CoreAttention
from stackwise.ops.attention import attend

B, T, H, G, D = 3, 13, 6, 2, 10
C = H * D


def explicit(q, k, v, causal, key_mask):
    """softmax over a written-out score matrix, heads repeated by hand."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
    allowed = allowed.expand(q.shape[0], 1, -1, -1)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    return scores.masked_fill(~allowed, -1e30).softmax(-1) @ v


def padding(side):
    mask = torch.ones(B, T, dtype=torch.bool)
    if side == "left":
        mask[0, :4] = mask[2, :1] = False
    else:
        mask[0, 9:] = mask[1, 12:] = False
    return mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_grouped_attention_with_padding_equals_explicit_repetition(causal, side):
    g = torch.Generator().manual_seed(2)
    q = torch.randn(B, H, T, D, generator=g, requires_grad=True)
    k, v = (torch.randn(B, G, T, D, generator=g, requires_grad=True) for _ in range(2))
    mask = None if side is None else padding(side)
    real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    weight = torch.randn(B, H, T, D, generator=g) * real[:, None, :, None]
    expected = explicit(q, k, v, causal, mask).masked_fill(~real[:, None, :, None], 0)
    actual = attend(q, k, v, causal=causal, key_mask=mask).masked_fill(~real[:, None, :, None], 0)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)
    # rows that see nothing real are 0/0 in the explicit form: leave them out of its backward pass
    rows = real[:, None, :, None].expand_as(expected)
    expected_grads = torch.autograd.grad((explicit(q, k, v, causal, mask)[rows] * weight[rows]).sum(), (q, k, v))
    grads = torch.autograd.grad((actual * weight).sum(), (q, k, v))
    for a, e in zip(grads, expected_grads):
        torch.testing.assert_close(a, e, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("n_kv_heads", [H, G, 1])
@pytest.mark.parametrize("use_rope", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_no_future_token_changes_a_past_output(n_kv_heads, use_rope, masked):
    layer = AttentionBuilder(C, H, attention_mode="causal", use_rope=use_rope).with_gqa(n_kv_heads).build()
    x = torch.randn(B, T, C)
    mask = padding("right") if masked else None
    changed = x.clone()
    changed[:, 8:] += 1.0
    before, after = layer(x, mask), layer(changed, mask)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.isclose(before[:, 8:], after[:, 8:]).all()


def test_bidirectional_attention_sees_the_future_but_no_padding():
    layer = AttentionBuilder(C, H).with_gqa(G).build()
    x, mask = torch.randn(B, T, C), padding("right")
    changed = torch.where(mask[..., None], x, x + 1.0)
    torch.testing.assert_close(layer(x, mask)[mask], layer(changed, mask)[mask], atol=0, rtol=0)
    changed = x.clone()
    changed[:, 8] += 1.0
    assert not torch.isclose(layer(x, mask)[:, :8], layer(changed, mask)[:, :8]).all()


def test_a_row_of_padding_only_stays_finite():
    layer = AttentionBuilder(C, H, attention_mode="causal").with_gqa(G).build()
    mask = padding("left")
    mask[1] = False
    x = torch.randn(B, T, C, requires_grad=True)
    out = layer(x, mask)
    out[mask].sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all() and not x.grad[1].any()


def test_from_config_builds_what_the_config_says():
    config = StackWiseConfig.from_dict(
        {"model": {"d_model": C, "n_heads": H, "n_kv_heads": G, "dropout": 0.1, "use_rope": False}}
    )
    layer = CoreAttention.from_config(config)
    assert (layer.n_heads, layer.n_kv_heads, layer.dropout, layer.rope_key) == (H, G, 0.1, None)
    assert layer.attention_mode == "causal"
    assert layer.k_proj.weight.shape == (G * D, C)


@pytest.mark.parametrize("heads", [(7, 7), (6, 4)])
def test_heads_that_do_not_divide_are_refused(heads):
    with pytest.raises(ValueError, match="must divide"):
        AttentionBuilder(C, heads[0]).with_gqa(heads[1]).build()
