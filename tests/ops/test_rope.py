import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from stackwise.ops.rope import apply_rope, rope_rows, rope_table

B, H, T, D = 2, 3, 11, 10


def test_rotary_positions_equal_transformers():
    theta = 5000.0
    q, k = torch.randn(2, B, H, T, D, generator=torch.Generator().manual_seed(0))
    config = LlamaConfig(hidden_size=H * D, num_attention_heads=H, head_dim=D)
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(T)[None])
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    table = rope_table(T, D, theta, q.device)
    torch.testing.assert_close((apply_rope(q, *table), apply_rope(k, *table)), expected)


def test_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, D, generator=torch.Generator().manual_seed(1))
    cos, sin = rope_table(40, D, 100.0, q.device)

    def score(i, j):
        return (apply_rope(q, cos[i : i + 1], sin[i : i + 1]) * apply_rope(k, cos[j : j + 1], sin[j : j + 1])).sum()

    torch.testing.assert_close(score(5, 2), score(33, 30))
    assert not torch.isclose(score(5, 2), score(5, 3))


def test_a_table_that_starts_later_is_the_tail_of_the_whole_one():
    whole, tail = rope_table(T, D, 10000.0, torch.device("cpu")), rope_table(4, D, 10000.0, torch.device("cpu"), 7)
    for a, b in zip(whole, tail):
        torch.testing.assert_close(a[7:], b, atol=0, rtol=0)


def test_rows_of_a_table_are_those_of_each_token_s_position():
    table = rope_table(13, 6, 500.0, torch.device("cpu"))
    positions = torch.tensor([[0, 0, 1, 2], [4, 9, 12, 3]])
    cos, sin = rope_rows(table, positions)
    assert cos.shape == sin.shape == (2, 1, 4, 6)
    x = torch.randn(2, 3, 4, 6)
    rotated = apply_rope(x, cos, sin)
    for b in range(2):
        for t in range(4):
            p = int(positions[b, t])
            alone = apply_rope(x[b : b + 1, :, t : t + 1], table[0][p : p + 1], table[1][p : p + 1])
            assert torch.equal(rotated[b, :, t], alone[0, :, 0])
