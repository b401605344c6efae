"""Norms and gated feed-forwards equal torch's composites, and keep less for the backward pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stackwise.model.architecture import create_simple_rack
from stackwise.model.block import Context
from stackwise.model.feed_forward import GeGLUFFN, SwiGLUFFN
from stackwise.model.norms import RMSNorm

B, T, C = 3, 7, 20


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kept(run):
    """Bytes of distinct storages that autograd keeps, by dtype, of tensors with T among their sizes."""
    found = {}

    def keep(tensor):
        if T in tensor.shape or B * T in tensor.shape:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too: its address stays taken
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run()
    return sum(size for size, _ in found.values()), out


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_rms_norm_and_its_gradients_are_torchs(dtype, close):
    ours, theirs = RMSNorm(C, 1e-3), nn.RMSNorm(C, 1e-3)
    weight = drawn(C, seed=1)
    results = []
    for norm in (ours, theirs):
        norm.weight = nn.Parameter(weight.to(dtype, copy=True))
        x = drawn(B, T, C, seed=2).to(dtype).requires_grad_()
        out = norm(x)
        assert out.dtype == dtype
        out.backward(drawn(B, T, C, seed=3).to(dtype))
        results.append((out, x.grad, norm.weight.grad))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=close, atol=close)


def test_rms_norm_passes_gradcheck_and_keeps_its_input_alone():
    norm = RMSNorm(C, 1e-3).double()
    norm.weight.data.copy_(drawn(C, seed=4, dtype=torch.float64))
    x = drawn(2, 3, C, seed=5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight))
    frozen = RMSNorm(C, 1e-3)
    frozen.weight.requires_grad_(False)
    x = drawn(B, T, C).requires_grad_()
    size, out = kept(lambda: frozen(x))
    assert size == (C + 1) * B * T * 4
    out.sum().backward()
    assert x.grad is not None and frozen.weight.grad is None


@pytest.mark.parametrize("kind, activation", [(SwiGLUFFN, F.silu), (GeGLUFFN, F.gelu)])
@pytest.mark.parametrize("frozen", [False, True])
def test_gated_feed_forward_equals_its_formula_and_keeps_one_tensor_less(kind, activation, frozen):
    ffn = kind(C, 33, freeze_up_proj=frozen).double()
    for i, p in enumerate(ffn.parameters()):
        p.data.copy_(drawn(*p.shape, seed=i, dtype=torch.float64) / 4)
    results, sizes = [], []
    for run in (ffn, lambda x: ffn.down_proj(activation(ffn.gate_proj(x)) * ffn.up_proj(x))):
        x = drawn(B, T, C, seed=9, dtype=torch.float64).requires_grad_()
        size, out = kept(lambda x=x, run=run: run(x))
        sizes.append(size)
        wanted = [x, *(p for p in ffn.parameters() if p.requires_grad)]
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert sizes[1] - sizes[0] == B * T * 33 * 8
    assert torch.autograd.gradcheck(ffn, (drawn(1, 2, C, seed=8, dtype=torch.float64).requires_grad_(),))


def test_what_a_block_keeps_under_autocast():
    """Two fp32 residuals and 1 / rms of each; in bf16, once, what products, attention and the gate read."""
    h, kv, ff = 5, 1, 44
    rack = create_simple_rack(1, 1, C, ff, h, 50, n_kv_heads=kv)
    block = rack.blocks()[0]
    x = drawn(B, T, C).requires_grad_()
    rope = rack._rope_tables(T, 0, x.device, None)
    tables = sum(table.untyped_storage().nbytes() for pair in rope.values() for table in pair)
    with torch.autocast("cpu", torch.bfloat16):
        size, _ = kept(lambda: block(x, Context(rope=rope)))
    values = 2 * C  # what the norms return
    values += C + 2 * C // h * kv + C  # queries, keys and values, what attention returns
    values += 3 * ff  # gate, up, and their product
    attention = 4 * h  # of the softmax, fp32
    assert size - tables <= B * T * (2 * values + 2 * 4 * (C + 1) + attention) + 64
