import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stackwise.config.schema import MaskingConfig
from stackwise.growth.rack_builder import set_trainable
from stackwise.model.architecture import create_simple_rack
from stackwise.objectives import CausalObjective, MaskedObjective
from stackwise.objectives.scoring import bits_per_byte, validate

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
