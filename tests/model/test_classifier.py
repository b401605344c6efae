"""The classifier of sequences, and the two published MLGKA models made with it."""

from __future__ import annotations

import pytest
import torch

from stackwise.config.attention import AttentionSpec
from stackwise.model.architecture import Block, BlockSpec
from stackwise.model.classifier import SequenceClassifier
from stackwise.model.layers import MLGKALayer, never_trained

C, V, K = 24, 37, 3


def classifier(kind: str = "mlgka", *, max_positions: int | None = 19, seed: int = 5) -> SequenceClassifier:
    """Two Blocks of width 24 in double precision."""
    blocks: list[Block] = []
    for i in range(2):
        if kind == "mlgka":
            blocks.append(MLGKALayer(C, 22, 6, 2, 7, 5, kernel_dim=26, seed=i, n_blocks=2))
        else:
            torch.manual_seed(i)
            blocks.append(Block(BlockSpec(AttentionSpec(C, 6, 6, kind), 22)))  # type: ignore[arg-type]
    return SequenceClassifier(V, C, blocks, K, max_positions=max_positions, seed=seed).double().eval()


def rows(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(V, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize(
    ("vocab_size", "d_model", "n_layers", "max_positions", "expected"),
    [(1000, 256, 1, None, 1_183_234), (10000, 512, 6, 512, 26_727_426)],
)
def test_the_two_mlgka_models_have_their_published_sizes(
    vocab_size: int, d_model: int, n_layers: int, max_positions: int | None, expected: int
) -> None:
    blocks = [MLGKALayer(d_model, 4 * d_model, 8, 2) for _ in range(n_layers)]
    model = SequenceClassifier(vocab_size, d_model, blocks, 2, max_positions=max_positions)
    assert sum(p.numel() for p in model.parameters()) == expected
    frozen = {f"blocks.{i}.ffn.up_proj.weight" for i in range(n_layers)}
    assert {name for name, p in model.named_parameters() if p in never_trained(model)} == frozen


@pytest.mark.parametrize("kind", ["mlgka", "causal", "bidirectional"])
@pytest.mark.parametrize("max_positions", [None, 19])
def test_logits_are_the_head_of_the_mean_over_each_texts_own_tokens(kind: str, max_positions: int | None) -> None:
    model = classifier(kind, max_positions=max_positions)
    texts = rows(11, 4, 7)
    mask = torch.arange(11) < torch.tensor([11, 4, 7])[:, None]
    ids = torch.stack([torch.cat([row, torch.full((11 - len(row),), 2)]) for row in texts])
    for row, logits in zip(texts, model(ids, mask)):
        x = model.embedding.weight[row][None]
        if model.embedding.positions is not None:
            x = x + model.embedding.positions[: len(row)]
        for block in model.blocks:
            x = block(x)
        expected = model.head.weight @ x[0].mean(dim=0) + model.head.bias
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlgka", "causal", "bidirectional"])
def test_padding_on_either_side_and_what_stands_in_it_change_nothing(kind: str) -> None:
    model = classifier(kind)
    (text,) = rows(7)
    alone = model(text[None], torch.ones(1, 7, dtype=torch.bool))
    for left, right in ((0, 5), (4, 0), (3, 2)):
        for filler in (0, 31):
            ids = torch.cat([torch.full((left,), filler), text, torch.full((right,), filler)])[None]
            mask = torch.tensor([[False] * left + [True] * 7 + [False] * right])
            torch.testing.assert_close(model(ids, mask), alone, rtol=0, atol=1e-12)


def test_every_parameter_but_the_frozen_ones_is_reached_by_the_gradient() -> None:
    model = classifier()
    texts = torch.stack(rows(13, 13))
    model(texts, torch.ones_like(texts, dtype=torch.bool)).square().sum().backward()
    trained = [(name, p) for name, p in model.named_parameters() if not name.endswith("ffn.up_proj.weight")]
    idle = [name for name, p in trained if p.grad is None or not p.grad.any()]
    assert idle == []


def test_initial_values_follow_the_projects_table_and_the_seed_and_leave_the_blocks_alone() -> None:
    blocks = [MLGKALayer(C, 22, 6, 2, seed=1)]
    before = {name: p.clone() for name, p in blocks[0].named_parameters()}
    model = SequenceClassifier(2003, C, blocks, 11, max_positions=307, seed=5)
    for parameter in (model.embedding.weight, model.embedding.positions, model.head.weight):
        assert parameter is not None and parameter.std().item() == pytest.approx(0.02, rel=0.15)
    assert not model.head.bias.any()
    assert all(torch.equal(p, before[name]) for name, p in model.blocks[0].named_parameters())
    same, other = (SequenceClassifier(2003, C, blocks, 11, seed=seed) for seed in (5, 6))
    assert torch.equal(same.embedding.weight, model.embedding.weight)
    assert torch.equal(same.head.weight, model.head.weight)
    assert not torch.equal(other.embedding.weight, model.embedding.weight)


def test_more_tokens_than_positions_are_refused() -> None:
    ids = torch.stack(rows(20))
    with pytest.raises(ValueError, match="19 learned positions; 20 tokens"):
        classifier()(ids, torch.ones_like(ids, dtype=torch.bool))


def test_dropout_acts_on_the_embedding_while_training_only() -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(V, C, [], K, dropout=0.5, seed=5)
    ids = torch.stack(rows(17))
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert not torch.equal(model(ids, mask), model(ids, mask))
    model.eval()
    assert torch.equal(model(ids, mask), model(ids, mask))
