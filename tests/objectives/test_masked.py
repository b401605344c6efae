import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stackwise.config import StackWiseConfig
from stackwise.config.objectives import MaskingConfig
from stackwise.data.batches import Batch, Batches
from stackwise.data.tokenizers import ByteTokenizer
from stackwise.errors import ConfigError, UserError
from stackwise.evaluation.pseudo import pseudo_perplexity
from stackwise.growth.curricula import build_phases
from stackwise.model.architecture import create_simple_rack
from stackwise.model.reading import Reading
from stackwise.objectives import CausalObjective, MaskedObjective, create_objective
from stackwise.objectives.depth import Interval
from stackwise.ops.losses import IGNORE

V, SPECIALS, MASK = 37, frozenset({0, 1, 2}), 2


def objective(seed=0, **masking):
    return MaskedObjective(MaskingConfig(**masking), seed=seed, mask_id=MASK, special_ids=SPECIALS, vocab_size=V)


def batch(B=211, T=101, epoch=0, low=3):
    tokens = np.random.default_rng(0).integers(low, V, (B, T + 1))
    return Batch(tokens, np.arange(B), np.full(B, epoch))


def shares(example, tokens):
    """Of all tokens: picked; of the picked: masked, replaced by another token, left."""
    picked = example.targets != IGNORE
    masked = (example.reading.ids == MASK) & picked
    left = (example.reading.ids == tokens) & picked
    n = picked.sum()
    return [
        float(x)
        for x in (picked.float().mean(), masked.sum() / n, (picked & ~masked & ~left).sum() / n, left.sum() / n)
    ]


def test_inputs_hide_the_targets_at_the_shares_of_the_config():
    source = batch()
    tokens = torch.from_numpy(source.tokens[:, :-1])
    example = objective(rate=0.3, mask_share=0.6, random_share=0.3).corrupt(source)
    picked, masked, replaced, left = shares(example, tokens)
    assert picked == pytest.approx(0.3, abs=0.01)
    assert masked == pytest.approx(0.6, abs=0.03)
    assert replaced == pytest.approx(0.3 * 33 / 34, abs=0.03)  # a random token is the same one in 34
    assert left == pytest.approx(0.1 + 0.3 / 34, abs=0.03)
    counted = example.targets != IGNORE
    assert torch.equal(example.targets[counted], tokens[counted])
    assert torch.equal(example.reading.ids[~counted], tokens[~counted])


def test_specials_are_neither_picked_nor_changed():
    source = batch(low=0)
    tokens = torch.from_numpy(source.tokens[:, :-1])
    example = objective(rate=0.9).corrupt(source)
    special = torch.isin(tokens, torch.tensor(sorted(SPECIALS)))
    assert special.sum() > 100
    assert (example.targets[special] == IGNORE).all()
    assert torch.equal(example.reading.ids[special], tokens[special])


def test_masks_differ_between_batches_epochs_and_seeds_and_repeat():
    first = objective().corrupt(batch()).targets
    assert torch.equal(first, objective().corrupt(batch()).targets)
    assert not torch.equal(first, objective().corrupt(batch(epoch=1)).targets)
    assert not torch.equal(first, objective(seed=1).corrupt(batch()).targets)
    source = batch()
    others = Batch(source.tokens, source.sample + 211, source.epoch)
    assert not torch.equal(first, objective().corrupt(others).targets)


def test_a_model_learns_nothing_about_random_tokens_that_it_does_not_see():
    """With every picked token hidden, the loss on uniform tokens cannot fall below ln V: it would if targets leaked."""
    torch.manual_seed(0)
    tokens = np.random.default_rng(1).integers(3, V, 20011)
    rack = create_simple_rack(1, 1, 26, 19, 13, V, attention_mode="bidirectional")
    batches = Batches(tokens, 31, 13, seed=0)
    hidden = objective(rate=0.3, mask_share=1.0, random_share=0.0)
    seen = objective(rate=0.3, mask_share=0.0, random_share=0.0)

    def train(objective):
        optimizer = torch.optim.AdamW(rack.parameters(), lr=0.01, weight_decay=0.0)
        losses = []
        for step in range(60):
            example = objective.corrupt(batches.batch(step))
            loss = objective.loss(rack, example, 1 / example.n_targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return float(np.mean(losses[-10:]))

    assert math.log(V - 3) - 0.03 < train(hidden) < math.log(V - 3) + 0.3
    assert train(seen) < 0.5  # the same model does learn where the targets are in its inputs


def test_the_loss_is_at_the_picked_positions_and_on_the_corrupted_inputs():
    rack = create_simple_rack(1, 1, 26, 19, 13, V, attention_mode="bidirectional")
    example = objective().corrupt(batch(5, 11))
    got = objective().loss(rack, example, 1 / example.n_targets)
    picked = example.targets != IGNORE
    torch.testing.assert_close(got, F.cross_entropy(rack(example.reading.ids)[picked], example.targets[picked]))


def test_the_config_names_the_objective_and_the_tokenizer_its_ids():
    config = StackWiseConfig.from_dict({})
    assert isinstance(create_objective(config, ByteTokenizer()), CausalObjective)
    config = config.changed(
        {
            "training.progressive.training_objective": "mlm",
            "model.attention_preset": "bert_style",
            "training.seed": 7,
            "training.masking.rate": 0.4,
        }
    )
    tokenizer = ByteTokenizer()
    made = create_objective(config, tokenizer)
    assert isinstance(made, MaskedObjective)
    assert (made.seed, made.masking.rate, made.mask_id) == (7, 0.4, tokenizer.mask_id)
    assert (made.special_ids, made.vocab_size) == (tokenizer.special_ids, tokenizer.vocab_size)
    tokenizer.mask_id = None
    with pytest.raises(UserError, match="no mask token"):
        create_objective(config, tokenizer)


def trained_on_noise(objective):
    """A Rack after 120 steps of ``objective`` on uniformly random tokens, new ones in every step."""
    torch.manual_seed(0)
    rack = create_simple_rack(2, 1, 24, 40, 3, V, attention_mode="bidirectional")
    optimizer = torch.optim.AdamW(rack.parameters(), lr=3e-3)
    for step in range(120):
        example = objective.corrupt(fresh(step, 24))
        optimizer.zero_grad()
        objective.loss(rack, example, 1.0 / example.n_targets).backward()
        optimizer.step()
    return rack


def fresh(step, B):
    tokens = np.random.default_rng(100 + step).integers(3, V, (B, 14))
    return Batch(tokens, np.arange(B) + step * B, np.zeros(B, dtype=np.int64))


class Seeing(MaskedObjective):
    """The fault to be found: the inputs are the targets."""

    def corrupt(self, batch):
        example = super().corrupt(batch)
        return replace(example, reading=Reading(torch.from_numpy(batch.tokens[:, :-1])))

    def judged(self, example):
        return example.targets != IGNORE


def test_on_random_tokens_accuracy_stays_at_chance_and_a_model_that_sees_its_targets_is_found_out():
    chance, wanted = 1 / (V - len(SPECIALS)), {}
    for kind in (MaskedObjective, Seeing):
        seen = kind(MaskingConfig(rate=0.3), seed=0, mask_id=MASK, special_ids=SPECIALS, vocab_size=V)
        rack = trained_on_noise(seen)
        score = seen.score(rack, fresh(999, 1500))
        wanted[kind] = abs(score.right / score.predicted - chance) < 4 * (chance / score.predicted) ** 0.5
        assert score.predicted > 4000
    assert wanted == {MaskedObjective: True, Seeing: False}


def test_accuracy_is_of_what_was_masked():
    rack, seen = create_simple_rack(1, 1, 26, 19, 13, V, attention_mode="bidirectional"), objective(rate=0.4)
    example = seen.corrupt(batch(B=30))
    score = seen.score(rack, batch(B=30))
    masked = (example.reading.ids == MASK) & (example.targets != IGNORE)
    right = rack(example.reading.ids).argmax(-1) == example.targets
    assert (score.predicted, score.right) == (int(masked.sum()), int((right & masked).sum()))
    assert score.tokens.sum() == int((example.targets != IGNORE).sum()) > score.predicted


def test_each_sequence_has_a_rate_of_its_own_where_a_range_is_given():
    example = objective(rate=0.2, max_rate=0.8).corrupt(batch(B=300))
    shares_of_rows = (example.targets != IGNORE).float().mean(dim=1)
    assert float(shares_of_rows.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(shares_of_rows.std()) == pytest.approx(0.6 / 12**0.5, abs=0.03)


def test_pseudo_perplexity_masks_one_token_at_a_time():
    rack, T = create_simple_rack(1, 1, 26, 19, 13, V, attention_mode="bidirectional"), 7
    tokens = np.random.default_rng(3).integers(2, V, 2 * T + 1)
    tokens[3] = 0
    total, count = 0.0, 0
    for start in (0, T):
        row = torch.from_numpy(tokens[start : start + T])
        for i in range(T):
            if int(row[i]) not in SPECIALS:
                inputs = row.clone()
                inputs[i] = MASK
                total += F.cross_entropy(rack(inputs[None])[0, i], row[i]).item()
                count += 1
    found = pseudo_perplexity(rack, MASK, SPECIALS, tokens, T, batch_size=3)
    assert found["pseudo_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["pseudo_perplexity_tokens"] == count < 2 * T


def test_a_phase_may_have_a_rate_of_its_own():
    seen = objective(rate=0.2)
    of_phase = seen.during((Interval(0.6, 0.6, 0, 1),))
    wider, narrower = ((o.corrupt(batch()).targets != IGNORE) for o in (of_phase, seen))
    assert float(wider.float().mean()) == pytest.approx(0.6, abs=0.01)
    assert float(narrower.float().mean()) == pytest.approx(0.2, abs=0.01)
    assert bool((wider | ~narrower).all())  # nested: what a low rate masks, a higher one masks too
    assert seen.during(()) is seen


MLM = {
    "model": {"vocab_size": V, "d_model": 16, "n_heads": 2, "architecture": {"n_stacks": 3, "blocks_per_stack": 1}},
    "training": {
        "progressive": {"training_objective": "mlm", "joint_fraction": 0.25},
        "masking": {"stack_rates": [0.8, 0.5, 0.1], "rate": 0.3},
        "max_steps": 40,
    },
}


@pytest.mark.parametrize("mode", ["append", "prepend"])
def test_each_new_stack_has_its_rate_and_the_joint_phase_that_of_all(mode):
    config = StackWiseConfig.from_dict(MLM, [f"training.progressive.building_mode={mode}"])
    rates = [[(i.low, i.high) for i in phase.noise] for phase in build_phases(config)]
    assert rates == [[(0.8, 0.8)], [(0.5, 0.5)], [(0.1, 0.1)], [(0.3, 0.3)]]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.masking.stack_rates=[0.5, 0.1]", "has 2 entries for 3 Stacks"),
        ("training.masking.max_rate=0.9", "stack_rates: .* are both set; keep one"),
        ("training.strategy=end_to_end", "is only used when strategy is progressive"),
        ("training.progressive.training_objective=clm", "is only used when the objective is mlm"),
        ("training.masking.stack_rates=[0.5, 0.1, 1.5]", "stack_rates.*out of range"),
    ],
)
def test_rates_of_stacks_that_nothing_reads_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        StackWiseConfig.from_dict(MLM, [override])


def test_rates_of_stacks_do_not_go_with_a_cache():
    overrides = ["training.progressive.trunk_strategy=frozen", "training.progressive.cache_activations=true"]
    with pytest.raises(ConfigError, match="cannot be combined with cache_activations: true; remove stack_rates"):
        StackWiseConfig.from_dict(MLM, ["training.progressive.joint_fraction=0", *overrides])
