import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stackwise.data.batches import Batch
from stackwise.model.architecture import create_simple_rack
from stackwise.model.reading import Reading
from stackwise.objectives import CausalObjective, Example
from stackwise.ops.losses import IGNORE

V, B, T = 37, 5, 11


def batch():
    tokens = np.random.default_rng(0).integers(0, V, (B, T + 1))
    return Batch(tokens, np.arange(B), np.zeros(B, dtype=np.int64))


def test_targets_are_the_next_tokens():
    tokens = np.arange(B * (T + 1)).reshape(B, T + 1)
    example = CausalObjective().corrupt(Batch(tokens, np.arange(B), np.zeros(B, dtype=np.int64)))
    assert torch.equal(example.targets, example.reading.ids + 1)
    assert example.reading.ids[2].tolist() == list(range(24, 35))
    assert example.reading.attention_mask is None and example.n_targets == B * T


def test_the_score_is_the_cross_entropy_of_the_logits_and_has_no_gradient():
    rack, objective = create_simple_rack(2, 1, 26, 19, 13, V), CausalObjective()
    example = objective.corrupt(batch())
    score = objective.score(rack, batch())
    logits = rack(example.reading.ids)
    expected = F.cross_entropy(logits.transpose(1, 2), example.targets, reduction="none")
    assert score.nats == pytest.approx(expected.sum(dim=1).detach().numpy(), rel=1e-6)
    assert score.tokens.tolist() == [T] * B and score.predicted == B * T
    assert score.right == int((logits.argmax(-1) == example.targets).sum())
    assert all(p.grad is None for p in rack.parameters())


def test_the_loss_is_scaled_and_leaves_out_what_does_not_count():
    rack, objective = create_simple_rack(2, 1, 26, 19, 13, V), CausalObjective()
    example = objective.corrupt(batch())
    targets = example.targets.clone()
    targets[1, 3:] = IGNORE
    targets[4] = IGNORE
    got = objective.loss(rack, Example(example.reading, targets), 0.25)
    logits = rack(example.reading.ids)
    expected = sum(
        -logits[b, t].log_softmax(-1)[targets[b, t]] for b in range(B) for t in range(T) if targets[b, t] >= 0
    )
    torch.testing.assert_close(got, expected / 4)


def test_micro_batches_are_slices_that_keep_their_masks():
    inputs, targets = torch.arange(B * T).reshape(B, T), torch.arange(B * T).reshape(B, T) + 1
    mask = inputs % 3 == 0
    parts = list(Example(Reading(inputs, mask), targets).micro_batches(2))
    assert [len(p.reading.ids) for p in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([p.reading.ids for p in parts]), inputs)
    assert torch.equal(torch.cat([p.targets for p in parts]), targets)
    assert torch.equal(torch.cat([p.reading.attention_mask for p in parts]), mask)
    assert all(p.reading.attention_mask is None for p in Example(Reading(inputs), targets).micro_batches(2))
