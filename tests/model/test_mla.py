"""Latent attention beside the one of transformers, with the same weights."""

import pytest
import torch
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from stackwise.model.attention import AttentionBuilder

B, T, C, H, D, R, DV, RQ, RKV = 2, 11, 36, 3, 10, 6, 14, 22, 26


def halves_from_pairs(weight, n_rows):
    """Rows (x0, y0, x1, y1, …) of each head as (x0, x1, …, y0, y1, …): DeepSeek stores rotary pairs side by side."""
    rows = weight.view(-1, n_rows // 2, 2, weight.shape[-1])
    return rows.transpose(1, 2).reshape(-1, weight.shape[-1])


@pytest.mark.parametrize("r_q", [None, RQ])
@pytest.mark.parametrize("causal", [True, False])
def test_latent_attention_equals_deepseek_v3(r_q, causal):
    config = DeepseekV3Config(
        hidden_size=C,
        num_attention_heads=H,
        num_key_value_heads=H,
        q_lora_rank=r_q,
        kv_lora_rank=RKV,
        qk_nope_head_dim=D,
        qk_rope_head_dim=R,
        v_head_dim=DV,
        attention_bias=False,
        max_position_embeddings=64,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(7)
    theirs = DeepseekV3Attention(config, layer_idx=0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (parameter.dim() == 1))
    mode = "causal" if causal else "bidirectional"
    ours = AttentionBuilder(C, H, head_dim=D, attention_mode=mode).with_mla(r_q, RKV, rope_dim=R, v_head_dim=DV).build()
    with torch.no_grad():
        query = theirs.q_proj.weight if r_q is None else theirs.q_b_proj.weight
        query = query.view(H, D + R, -1)
        query = torch.cat((query[:, :D], halves_from_pairs(query[:, D:].flatten(0, 1), R).view(H, R, -1)), 1)
        (ours.q_proj if r_q is None else ours.q_b_proj).weight.copy_(query.flatten(0, 1))
        if r_q is not None:
            ours.q_a_proj.weight.copy_(theirs.q_a_proj.weight)
            ours.q_a_norm.weight.copy_(theirs.q_a_layernorm.weight)
        down = theirs.kv_a_proj_with_mqa.weight
        ours.kv_a_proj.weight.copy_(torch.cat((down[:RKV], halves_from_pairs(down[RKV:], R))))
        ours.kv_a_norm.weight.copy_(theirs.kv_a_layernorm.weight)
        ours.kv_b_proj.weight.copy_(theirs.kv_b_proj.weight)
        ours.o_proj.weight.copy_(theirs.o_proj.weight)
    x = torch.randn(B, T, C)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    positions = torch.arange(T)[None]
    rotary = DeepseekV3RotaryEmbedding(config)(x, positions)
    hidden = torch.full((T, T), float("-inf")).triu(1)[None, None] if causal else None
    expected = theirs(xs[0], position_embeddings=rotary, attention_mask=hidden)[0]
    actual = ours(xs[1])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(B, T, C)
    for out in (expected, actual):
        (out * weight).sum().backward()
    torch.testing.assert_close(xs[1].grad, xs[0].grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.kv_b_proj.weight.grad, theirs.kv_b_proj.weight.grad, atol=1e-4, rtol=1e-4)


def test_the_cache_holds_the_latent_and_one_rotary_key():
    layer = AttentionBuilder(C, H, attention_mode="causal").with_mla(RQ, RKV, rope_dim=R).build()
    from stackwise.model.cache import LayerCache

    cache = LayerCache(T)
    layer(torch.randn(B, T, C), cache=cache)
    assert cache.nbytes == B * T * (RKV + R) * 4
