import numpy as np
import pytest
import torch

from stackwise.data.batches import Batch
from stackwise.errors import UserError
from stackwise.model.architecture import create_simple_rack
from stackwise.model.reading import Reading
from stackwise.objectives import RegressionObjective
from stackwise.training.sources import IterableSource

V, B, T = 23, 4, 9
NUMBERS = torch.tensor([2.5, -100.0, 0.0, 1.25])


def rack(mode):
    return create_simple_rack(2, 1, 26, 19, 13, V, attention_mode=mode)


def batch():
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(T) < torch.tensor([[9], [4], [1], [6]])
    return {"input_ids": ids, "labels": NUMBERS, "attention_mask": mask}


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_loss_is_the_squared_error_of_each_row_alone_without_its_padding(pooling):
    model, given = rack("causal" if pooling == "last" else "bidirectional"), batch()
    seen = RegressionObjective(1, pooling)
    example = IterableSource([given], seen).example(0)
    assert example.n_targets == B  # −100, which elsewhere means that nothing counts, is a number here
    expected = 0.0
    for ids, label, mask in zip(given["input_ids"], NUMBERS, given["attention_mask"]):
        hidden = model(Reading(ids[mask][None]))[0]
        pooled = hidden[-1] if pooling == "last" else hidden.mean(dim=0)
        expected = expected + (model.head.weight[0] @ pooled - label) ** 2
    torch.testing.assert_close(seen.loss(model, example, 1 / B), expected / B, atol=1e-3, rtol=1e-5)
    seen.loss(model, example, 1.0).backward()
    assert (model.head.weight.grad[1:] == 0).all() and (model.head.weight.grad[0] != 0).all()


def test_micro_batches_add_up_to_the_whole():
    model, seen = rack("bidirectional"), RegressionObjective(1, "mean")
    example = IterableSource([batch()], seen).example(0)
    parts = sum(seen.loss(model, part, 1 / B).item() for part in example.micro_batches(3))
    assert parts == pytest.approx(seen.loss(model, example, 1 / B).item(), rel=1e-5)


def test_the_score_is_the_squared_errors():
    model, seen, rng = rack("bidirectional").eval(), RegressionObjective(1, "mean"), np.random.default_rng(5)
    tokens, labels = rng.integers(0, V, (7, T + 1)), rng.normal(size=7).astype(np.float32)
    score = seen.score(model, Batch(tokens, np.arange(7), np.zeros(7, dtype=np.int64), labels))
    found = seen.logits(model, torch.from_numpy(tokens[:, :-1])).detach().numpy()
    assert found.shape == (7, 1)
    np.testing.assert_allclose(score.nats, (found[:, 0] - labels) ** 2, rtol=1e-4)
    assert score.tokens.tolist() == [1] * 7


def test_a_label_a_position_is_refused():
    given = batch() | {"labels": torch.zeros(B, T)}
    with pytest.raises(UserError, match="regression needs batches with labels: the number of each sequence"):
        IterableSource([given], RegressionObjective(1, "mean")).example(0)
