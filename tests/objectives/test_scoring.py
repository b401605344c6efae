import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stackwise.config.objectives import DiffusionConfig, MaskingConfig
from stackwise.growth.preparation import set_trainable
from stackwise.model.architecture import create_simple_rack
from stackwise.objectives import CausalObjective, DiffusionObjective, MaskedObjective, Score
from stackwise.objectives.scoring import bits_per_byte, validate
from stackwise.ops.losses import IGNORE

V, T = 37, 11
TOKENS = np.random.default_rng(0).integers(3, V, 7 * T + 5).astype(np.uint16)


def rack(**settings):
    made = create_simple_rack(2, 1, 26, 19, 13, V, **settings)
    with torch.no_grad():
        made.head.weight.mul_(40)  # so that windows differ in their loss
    return made


def score(model, objective=None, tokens=TOKENS, batch_size=3, **settings):
    return validate(
        model, objective or CausalObjective(), tokens, seq_len=T, batch_size=batch_size, bytes_per_token=2.5, **settings
    )


def direct(model, tokens=TOKENS):
    """Window by window, each token but the first predicted once."""
    nats = []
    for start in range(0, len(tokens) - T, T):
        window = torch.from_numpy(tokens[start : start + T + 1].astype(np.int64))
        logits = model(window[None, :-1])[0].detach()
        nats += F.cross_entropy(logits, window[1:], reduction="none").tolist()
    return nats


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_validation_scores_each_token_once_and_equals_a_direct_computation(batch_size):
    nats = direct(rack())
    assert len(nats) == 7 * T
    got = score(rack(), batch_size=batch_size)
    assert got.tokens == 7 * T
    assert got.loss == pytest.approx(np.mean(nats), rel=1e-6)
    assert got.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    assert got.bits_per_byte == pytest.approx(np.mean(nats) / math.log(2) / 2.5, rel=1e-6)


def test_a_part_of_the_tokens_is_whole_windows_spread_over_all():
    nats = direct(rack())
    got = score(rack(), max_tokens=3 * T + 5)
    chosen = [w for start in (0, 2, 4) for w in nats[start * T : start * T + T]]
    assert got.tokens == 3 * T
    assert got.loss == pytest.approx(np.mean(chosen), rel=1e-6)


def test_dropout_is_off_while_scoring_and_every_mode_is_as_before_afterwards():
    model = rack(dropout=0.5)
    set_trainable(model, ["stack.1", "norm"])
    model.stacks[1].blocks[0].ffn.eval()
    modes = [module.training for module in model.modules()]
    assert True in modes and False in modes
    assert score(model).loss == pytest.approx(np.mean(direct(rack())), rel=1e-6)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_masked_validation_always_hides_the_same_tokens_and_has_no_bits_per_byte():
    objective = MaskedObjective(
        MaskingConfig(rate=0.4), seed=0, mask_id=2, special_ids=frozenset({0, 1, 2}), vocab_size=V
    )
    model = rack(attention_mode="bidirectional")
    a, b = score(model, objective, batch_size=2), score(model, objective, batch_size=7)
    assert a.tokens == b.tokens < 7 * T
    assert a.loss == pytest.approx(b.loss, rel=1e-6)
    assert a.bits_per_byte is None


def test_a_huge_loss_has_a_finite_perplexity():
    model = rack()
    with torch.no_grad():
        model.head.weight.mul_(1e5)
    got = score(model)
    assert got.loss > 710 and math.isfinite(got.perplexity)


def test_one_bit_a_token_of_two_bytes_is_half_a_bit_a_byte():
    assert bits_per_byte(math.log(2), 2.0) == 0.5


def test_progress_counts_windows():
    calls = []
    score(rack(), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(3, 7), (6, 7), (7, 7)]


class OfDraws(CausalObjective):
    """A stand-in bound: ``nats(window, draw)`` of each row, all of it on as many tokens as ``tokens(window)`` says."""

    is_bound = True

    def __init__(self, nats, tokens=lambda window: T):
        self.nats, self.tokens = nats, tokens

    def score(self, rack, batch):
        window = batch.sample // T
        nats = np.array([self.nats(int(i), int(d)) for i, d in zip(window, batch.epoch)], dtype=float)
        tokens = np.array([self.tokens(int(i)) for i in window])
        return Score(nats, tokens, 0, 0, rates=np.full(len(nats), 0.55), means=nats / tokens)


def bound_of(objective, draws):
    return score(rack(), objective, batch_size=2, draws=draws)


def test_draws_that_repeat_what_a_sequence_has_make_the_error_no_smaller():
    nats = (11.0, 33.0, 22.0, 44.0, 55.0, 66.0, 0.0)  # 1 to 6 and 0 a token: mean 3, variance 28 / 6 of 7 sequences
    for draws in (1, 2, 5, 16):
        found = bound_of(OfDraws(lambda window, draw: nats[window]), draws)
        assert found.nelbo["nats_per_token"] == pytest.approx(3.0)
        assert found.nelbo["standard_error"] == pytest.approx((28 / 6 / 7) ** 0.5)
        ((rate, mean, error),) = found.curve
        assert (rate, mean, error) == pytest.approx((0.55, 3.0, (28 / 6 / 7) ** 0.5))


def test_sequences_of_unequal_length_count_by_their_tokens():
    # 4 windows of 1 token and 2 nats, 3 of 4 tokens and 16 nats.
    lengths = (1, 4, 1, 4, 1, 4, 1)
    found = bound_of(OfDraws(lambda window, draw: {1: 2.0, 4: 16.0}[lengths[window]], lambda w: lengths[w]), 3)
    ratio = (4 * 2 + 3 * 16) / 16
    squares = 4 * (2 - ratio) ** 2 + 3 * (16 - 4 * ratio) ** 2
    assert found.loss == pytest.approx(ratio)
    assert found.nelbo["standard_error"] == pytest.approx((7 / 6 * squares) ** 0.5 / 16)


class OfPools(DiffusionObjective):
    """The masks of diffusion, with nats of a masked token that are made up: of its sequence, the rate, its own."""

    def terms(self, rack, example):
        there = example.targets != IGNORE
        tokens = torch.where(there, example.targets, example.reading.ids).double()
        rate = there.double().mean(dim=1, keepdim=True)
        return (0.3 * tokens.mean(dim=1, keepdim=True) + 2.0 * rate + 0.2 * tokens) * there, there


@pytest.mark.parametrize(("draws", "low", "high"), [(1, 0.95, 1.6), (3, 0.8, 1.25), (7, 0.8, 1.25)])
def test_the_reported_error_is_the_spread_over_texts(draws, low, high):
    """Of one draw it is larger: rates are spread evenly over sequences, and their spread is in it."""
    generator, n, length, model = np.random.default_rng(2), 23, 11, rack()
    found = []
    for seed in range(150):
        middle = generator.integers(5, V - 2, size=(n, 1))  # each sequence has a pool of its own
        text = np.append((middle + generator.integers(-2, 3, size=(n, length))).ravel(), 3)
        objective = OfPools(DiffusionConfig(), seed=seed, mask_id=2, special_ids=frozenset({0, 1, 2}), vocab_size=V)
        got = validate(model, objective, text, seq_len=length, batch_size=8, bytes_per_token=1.0, draws=draws)
        found.append((got.nelbo["nats_per_token"], got.nelbo["standard_error"]))
    bounds, errors = np.array(found).T
    assert low < (errors**2).mean() ** 0.5 / bounds.std(ddof=1) < high
