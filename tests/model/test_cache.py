import pytest
import torch

from stackwise.model.cache import KVCache, LayerCache, positions_of
from stackwise.ops.attention import attend

B, T = 2, 11


def stream(seed, heads, size):
    return torch.randn(B, heads, T, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prompt", [1, 2, 5, 8])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 20])
def test_what_is_kept_is_the_prompt_and_then_the_last_tokens(window, prompt):
    """Of tensors with different heads and sizes, as keys and values or latents and rotary keys are."""
    k, v = stream(1, 3, 5), stream(2, 1, 7)
    cache = LayerCache(T, window)
    first = cache.append(k[:, :, :prompt], v[:, :, :prompt])
    assert all(torch.equal(a, b[:, :, :prompt]) for a, b in zip(first, (k, v)))
    for t in range(prompt, T):
        held = cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        start = 0 if window is None else max(0, t + 1 - window)
        assert all(torch.equal(a, b[:, :, start : t + 1]) for a, b in zip(held, (k, v)))
        columns = torch.arange(t + 1).expand(B, -1)
        assert torch.equal(cache.mask(columns), columns[:, start:])
    assert cache.length == T
    assert cache.nbytes == B * min(T, window or T) * (3 * 5 + 7) * 4


def test_a_full_cache_refuses_one_more_token():
    cache = LayerCache(4)
    cache.append(stream(1, 1, 2)[:, :, :4])
    with pytest.raises(ValueError, match="the cache holds 4 tokens; 5 do not fit"):
        cache.append(stream(1, 1, 2)[:, :, :1])


def test_several_tokens_at_once_after_the_prompt_need_a_cache_without_a_window():
    k = stream(1, 3, 5)
    whole, local = LayerCache(T), LayerCache(T, 4)
    whole.append(k[:, :, :5])
    local.append(k[:, :, :5])
    assert torch.equal(whole.append(k[:, :, 5:8])[0], k[:, :, :8])
    with pytest.raises(ValueError, match="one token at a time after the prompt, not 3"):
        local.append(k[:, :, 5:8])


def test_attention_over_what_a_cache_holds_equals_attention_over_all_tokens():
    q, k, v = stream(1, 6, 10), stream(2, 2, 10), stream(3, 2, 7)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :3] = False
    for window in (None, 1, 4, 20):
        whole = attend(q, k, v, causal=True, key_mask=mask, window=window)
        cache, outputs = LayerCache(T, window), []
        for start, end in ((0, 6), *((t, t + 1) for t in range(6, T))):
            keys, values = cache.append(k[:, :, start:end], v[:, :, start:end])
            outputs.append(
                attend(
                    q[:, :, start:end],
                    keys,
                    values,
                    causal=True,
                    key_mask=cache.mask(mask[:, :end]),
                    window=None if start else window,
                )
            )
        actual = torch.cat(outputs, dim=2)
        torch.testing.assert_close(actual[0, :, 3:], whole[0, :, 3:])
        torch.testing.assert_close(actual[1], whole[1])


def test_positions_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]]).bool()
    expected = [[0, 0, 0, 1, 2], [0, 1, 2], [0, 0, 1, 1, 2]]
    positions = positions_of(mask).tolist()
    assert positions[0] == expected[0] and positions[1][:3] == expected[1] and positions[2] == expected[2]


def test_a_mask_grows_with_what_is_read():
    cache = KVCache([None, 3], 9)
    assert cache.extend_mask(None, B, 4, torch.device("cpu")) is None
    for layer in cache.layers:
        layer.append(stream(1, 1, 2)[:, :, :4])
    assert cache.length == 4
    later = torch.tensor([[True, False], [False, True]])
    grown = cache.extend_mask(later, B, 2, torch.device("cpu"))
    assert grown[:, :4].all() and torch.equal(grown[:, 4:], later)
    assert cache.extend_mask(None, B, 1, torch.device("cpu"))[:, -1].all()
