import pytest
import torch

from stackwise.model.reading import Reading
from variants import BLOCKS, V, rack_of

B, T = 3, 13
IDS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))


def right_padding():
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 9:] = mask[2, 12:] = False
    return mask


def noisy(rack):
    """Values apart from the initial table's zeros and ones."""
    with torch.no_grad():
        for i, parameter in enumerate(rack.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return rack


def exact(rack):
    """In double precision: features of the laplacian have frequencies of any size, which magnify rounding errors."""
    return noisy(rack).double()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_no_future_token_changes_a_past_logit(name, padded):
    rack = noisy(rack_of(name))
    mask = right_padding() if padded else None
    changed = IDS.clone()
    changed[:, 8] = (changed[:, 8] + 1) % V
    before, after = rack(IDS, mask), rack(changed, mask)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.isclose(before[:, 8], after[:, 8]).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
@pytest.mark.parametrize("learned", [None, T + 4])
@pytest.mark.parametrize("name", BLOCKS)
def test_padding_on_either_side_changes_nothing(name, learned, mode, side):
    rack = exact(rack_of(name, attention_mode=mode, learned_positions=learned))
    pad, blank = torch.full((B, 4), V - 1), torch.zeros(B, 4, dtype=torch.bool)
    real = torch.ones(B, T, dtype=torch.bool)
    parts = ((pad, blank), (IDS, real)) if side == "left" else ((IDS, real), (pad, blank))
    padded, mask = (torch.cat(x, 1) for x in zip(*parts))
    out = rack(padded, mask)[mask].view(B, T, V)
    torch.testing.assert_close(out, rack(IDS), atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("learned", [None, T])
@pytest.mark.parametrize("name", BLOCKS)
def test_cached_decoding_equals_the_full_forward_pass(name, learned, padded):
    rack = exact(rack_of(name, learned_positions=learned)).eval()
    mask = torch.ones(B, T, dtype=torch.bool)
    if padded:
        mask[0, :3] = mask[1, :1] = False
    cache = rack.make_cache(T)
    out = [rack(Reading(IDS[:, :6], mask[:, :6] if padded else None, cache=cache))]
    out += [rack(Reading(IDS[:, t : t + 1], cache=cache)) for t in range(6, T)]
    full = rack(IDS, mask if padded else None)
    torch.testing.assert_close(rack.logits(torch.cat(out, 1))[mask], full[mask], atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_trainable_parameter_gets_a_gradient(name, mode):
    rack = rack_of(name, attention_mode=mode, learned_positions=T)
    (rack(IDS, right_padding()).square() * torch.rand(B, T, V)).mean().backward()
    for key, parameter in rack.named_parameters():
        # The bias of all keys shifts every score of a query alike: its gradient is 0 without rotary positions, and
        # here nearly so.
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert key.endswith("k_proj.bias") or parameter.grad.any(), key


@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", BLOCKS)
def test_compiled_gives_the_same(name, padded):
    """The same code runs for both masks; the one that hides nothing is left to the slow proofs."""
    rack = noisy(rack_of(name, n_blocks=1))
    mask = right_padding() if padded else torch.ones(B, T, dtype=torch.bool)
    torch._dynamo.reset()
    compiled = torch.compile(rack, backend="aot_eager")
    expected, actual = rack(IDS, mask), compiled(IDS, mask)
    torch.testing.assert_close(actual[mask], expected[mask], atol=1e-5, rtol=1e-5)
    weight = torch.randn(B, T, V, generator=torch.Generator().manual_seed(1)) * mask[..., None]
    grads = [torch.autograd.grad((out * weight).mean(), list(rack.parameters())) for out in (expected, actual)]
    for (key, _), a, b in zip(rack.named_parameters(), *grads):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["mlgka", "kernel_attention", "laplacian"])
def test_frequencies_come_from_the_seed_and_go_with_the_weights(name):
    rack, again = rack_of(name), rack_of(name)
    other = rack_of(name)
    with torch.no_grad():
        for block in other.blocks():
            block.attention.draw_frequencies(torch.Generator().manual_seed(99))
    first = rack.blocks()[0].attention.frequencies
    assert torch.equal(first, again.blocks()[0].attention.frequencies)
    assert not torch.equal(first, rack.blocks()[1].attention.frequencies)
    assert not torch.equal(rack(IDS), other(IDS))
    saved = {f"{part}/{key}": tensor for part, key, tensor in rack.part_tensors()}
    assert sum(key.endswith("frequencies") for key in saved) == 4
    other.load_state_dict(rack.state_dict())
    assert torch.equal(rack(IDS), other(IDS))
    assert "frequencies" not in "".join(key for key, _ in rack.named_parameters())


@pytest.mark.parametrize("name", BLOCKS)
def test_a_trained_model_switches_between_the_modes(name):
    rack = noisy(rack_of(name))
    causal = rack(IDS)
    rack.set_attention_mode("bidirectional")
    assert {block.attention.attention_mode for block in rack.spec.blocks} == {"bidirectional"}
    both = rack(IDS)
    assert not torch.isclose(causal[:, 0], both[:, 0]).all()
    rack.set_attention_mode("causal")
    assert torch.equal(rack(IDS), causal)
