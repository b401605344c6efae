"""Bounds of masked diffusion against sums over everything, on texts short enough for that."""

import itertools
import math

import numpy as np
import pytest
import torch

from stackwise.config import StackWiseConfig
from stackwise.config.objectives import DiffusionConfig
from stackwise.data.batches import Batch
from stackwise.errors import ConfigError
from stackwise.generation.denoisers import RackDenoiser, generate_blocks
from stackwise.generation.diffusion import unmask
from stackwise.model.architecture import create_rack_from_config
from stackwise.model.reading import Reading
from stackwise.objectives.depth import intervals_of
from stackwise.objectives.diffusion import DiffusionObjective
from stackwise.objectives.scoring import validate
from stackwise.ops.losses import IGNORE

V, MASK, SPECIAL = 4, 2, 3  # tokens 0 and 1, the mask, and a special token that texts here do not have
TEXT = (1, 0, 0)
L = len(TEXT)
LEVELS = (1.0, 0.45, 0.2, 0.0)


def config(n_stacks=3, length=L, **diffusion):
    time = diffusion.pop("time", None)
    progressive = {"training_objective": "diffusion", "time_interpretation": time}
    return StackWiseConfig.from_dict(
        {
            "model": {
                "d_model": 12, "n_heads": 2, "attention_preset": "bert_style",
                "architecture": {"n_stacks": n_stacks, "blocks_per_stack": 1},
            },
            "training": {
                "strategy": "end_to_end", "batch_size": 6, "seq_len": length, "seed": 3, "progressive": progressive,
                "diffusion": diffusion,
            },
        }
    )  # fmt: skip


def rack_of(settings):
    """A Rack whose logits differ a lot from context to context."""
    rack = create_rack_from_config(settings, vocab_size=V).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for p in rack.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.5)
    return rack.double()


def objective_of(settings, **changes):
    training = settings.training
    given = {
        "seed": 3, "mask_id": MASK, "special_ids": frozenset({MASK, SPECIAL}), "vocab_size": V,
        "variant": training.depth_variant, "levels": LEVELS if training.depth_variant else (1.0, 0.0), **changes,
    }  # fmt: skip
    return DiffusionObjective(training.diffusion, **given).during(())


def batch_of(text, rows, epoch=0):
    tokens = np.tile(np.array([*text, 0]), (rows, 1))
    return Batch(tokens, np.arange(rows), np.full(rows, epoch))


def log_probabilities(rack, objective, tokens, level):
    """(L, V) log p of each position given tokens (MASK at the gaps) at a level."""
    logits = RackDenoiser(rack, objective)(torch.tensor([tokens]), torch.tensor([level], dtype=torch.float64))[0]
    logits[:, MASK] = -math.inf
    return logits.log_softmax(-1)


def hidden(text, gone):
    return [MASK if i in gone else token for i, token in enumerate(text)]


def exact_bound(rack, objective, text):
    """L · E over n uniform on 1 … L, and over which n are masked, of the mean cross-entropy of the masked."""
    n_tokens, total = len(text), 0.0
    for n in range(1, n_tokens + 1):
        subsets = list(itertools.combinations(range(n_tokens), n))
        for gone in subsets:
            log_p = log_probabilities(rack, objective, hidden(text, gone), n / n_tokens)
            total -= sum(float(log_p[i, text[i]]) for i in gone) / n / len(subsets)
    return total


def any_order_probability(rack, objective, text):
    """p(text) when one gap after another is filled, in a uniformly random order."""
    n_tokens, total = len(text), 0.0
    orders = list(itertools.permutations(range(n_tokens)))
    for order in orders:
        log_p = 0.0
        for k, i in enumerate(order):
            gone = set(order[k:])
            log_p += float(log_probabilities(rack, objective, hidden(text, gone), len(gone) / n_tokens)[i, text[i]])
        total += math.exp(log_p) / len(orders)
    return total


def stage_terms(rack, objective, text):
    """For each way to give every token a stage: its probability, and log p of the tokens, each at its own stage."""
    noise = objective.noise
    for stages in itertools.product(range(len(noise)), repeat=len(text)):
        probability = math.prod(noise[k].width for k in stages)
        denoise, log_p = RackDenoiser(rack, objective), 0.0
        for k, interval in enumerate(noise):
            tokens = hidden(text, {i for i, stage in enumerate(stages) if stage >= k})
            logits = denoise(torch.tensor([tokens]), torch.tensor([interval.high], dtype=torch.float64))[0]
            logits[:, MASK] = -math.inf
            log_p += sum(float(logits.log_softmax(-1)[i, text[i]]) for i, stage in enumerate(stages) if stage == k)
        yield probability, log_p


def draws_of(rack, objective, text, rows=3000):
    score = objective.score(rack, batch_of(text, rows))
    assert (score.tokens == len(text)).all()
    return score.nats


CASES = {
    "all Stacks": {},
    "the masked share as input": {"time": "input", "condition": "masked"},
    "experts": {"time": "depth", "depth_variant": "experts", "levels": list(LEVELS)},
    "suffix": {"time": "depth", "depth_variant": "suffix", "levels": list(LEVELS)},
}


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_the_bound_and_the_bound_is_above_what_the_sampler_draws_from(name):
    settings = config(**CASES[name])
    rack = rack_of(settings)
    told = settings.training.diffusion.condition if name == "the masked share as input" else None
    objective = objective_of(settings, conditioned=told)
    bound = exact_bound(rack, objective, TEXT)
    found = draws_of(rack, objective, TEXT)
    assert abs(found.mean() - bound) < 4 * found.std() / len(found) ** 0.5 + 1e-6
    assert found.std() > 0.01
    assert bound > -math.log(any_order_probability(rack, objective, TEXT)) + 1e-6
    texts = itertools.product((0, 1, SPECIAL), repeat=L)
    assert sum(any_order_probability(rack, objective, text) for text in texts) == pytest.approx(1.0, abs=1e-9)


def test_one_pass_is_an_unbiased_draw_of_the_bound_of_as_many_steps_as_stacks():
    settings = config(time="depth", depth_variant="prefix", levels=list(LEVELS))
    rack, objective = rack_of(settings), None
    objective = objective_of(settings)
    terms = list(stage_terms(rack, objective, TEXT))
    assert sum(p for p, _ in terms) == pytest.approx(1.0)
    bound = -sum(p * log_p for p, log_p in terms)
    found = draws_of(rack, objective, TEXT)
    assert abs(found.mean() - bound) < 4 * found.std() / len(found) ** 0.5 + 1e-6
    assert bound > -math.log(sum(p * math.exp(log_p) for p, log_p in terms)) + 1e-6


def chi_squared_fits(counts, expected):
    """Whether counts of outcomes fit: χ² within five standard deviations of its mean."""
    keep = expected > 5
    statistic = ((counts - expected)[keep] ** 2 / expected[keep]).sum()
    freedom = keep.sum() - 1
    return statistic < freedom + 5 * (2 * freedom) ** 0.5


def frequencies(samples, texts):
    places = {text: i for i, text in enumerate(texts)}
    return np.bincount([places[tuple(row)] for row in samples.tolist()], minlength=len(texts))


def last(steps):
    *_, tokens = steps
    return tokens


def test_the_one_pass_sampler_draws_from_the_model_that_its_bound_is_of():
    settings = config(time="depth", depth_variant="prefix", levels=list(LEVELS))
    rack, objective = rack_of(settings), objective_of(settings)
    texts = list(itertools.product((0, 1, SPECIAL), repeat=L))
    exact = np.array([sum(p * math.exp(log_p) for p, log_p in stage_terms(rack, objective, x)) for x in texts])
    assert exact.sum() == pytest.approx(1.0)
    rows = 4000
    gaps = torch.full((rows, L), MASK)
    denoise = RackDenoiser(rack, objective)
    drawn = last(unmask(denoise, gaps, mask_id=MASK, levels=LEVELS))
    assert denoise.block_calls == 3 * rows * L  # every Stack once
    assert chi_squared_fits(frequencies(drawn, texts), rows * exact)


def test_the_any_order_sampler_of_the_experts_draws_from_the_model_that_their_bound_is_of():
    settings = config(time="depth", depth_variant="experts", levels=list(LEVELS))
    rack, objective = rack_of(settings), objective_of(settings)
    texts = list(itertools.product((0, 1, SPECIAL), repeat=L))
    exact = np.array([any_order_probability(rack, objective, x) for x in texts])
    rows = 4000
    denoise = RackDenoiser(rack, objective)
    drawn = last(unmask(denoise, torch.full((rows, L), MASK), mask_id=MASK, order="first_hitting"))
    assert denoise.block_calls == L * rows * L  # one Block of one Stack a step
    assert chi_squared_fits(frequencies(drawn, texts), rows * exact)


@pytest.mark.parametrize(
    "weighting, variant",
    [
        ("stratified", None), ("exact_counts", None), ("stratified", "experts"), ("exact_counts", "experts"),
        ("stratified", "suffix"), ("exact_counts", "suffix"), ("stratified", "prefix"),
    ],
)  # fmt: skip
def test_the_mean_of_the_training_loss_is_the_bound(weighting, variant):
    """In nats a token; stratified rates are continuous, so the sum over counts becomes an integral over rates."""
    depth = {} if variant is None else {"time": "depth", "depth_variant": variant, "levels": list(LEVELS)}
    settings = config(weighting=weighting, **depth)
    rack, objective = rack_of(settings), objective_of(settings)
    if variant == "prefix":
        wanted = -sum(p * log_p for p, log_p in stage_terms(rack, objective, TEXT))
    elif weighting == "exact_counts":
        wanted = exact_bound(rack, objective, TEXT)
    else:
        wanted = 0.0
        rates = (np.arange(600) + 0.5) / 600
        by_count = {}
        for low in range(len(objective.noise) or 1):
            middle = (LEVELS[low] + LEVELS[low + 1]) / 2 if variant else 0.5
            for gone in itertools.chain.from_iterable(itertools.combinations(range(L), n) for n in range(1, L + 1)):
                log_p = log_probabilities(rack, objective, hidden(TEXT, gone), middle)
                by_count[low, gone] = -sum(float(log_p[i, TEXT[i]]) for i in gone)
        for rate in rates:
            low = sum(rate <= level for level in LEVELS[1:]) if variant else 0
            for (at, gone), nats in by_count.items():
                if at == low:
                    wanted += rate ** len(gone) * (1 - rate) ** (L - len(gone)) * nats / rate / len(rates)
    found = []
    for epoch in range(300):
        example = objective.corrupt(batch_of(TEXT, 12, epoch))
        found.append(float(objective.loss(rack, example, 1.0 / example.n_targets).detach()))
    assert abs(np.mean(found) - wanted / L) < 4 * np.std(found) / len(found) ** 0.5 + 2e-3


@pytest.mark.parametrize("power", [0.0, 0.5])
@pytest.mark.parametrize("weighting", ["stratified", "exact_counts"])
def test_training_may_weigh_the_rates_otherwise_and_the_score_stays_the_bound(weighting, power):
    """Of density (2 − power) · rate^(1 − power); with exact counts n of L tokens are the rate n / L."""
    settings = config(weighting=weighting, weight_power=power)
    rack, objective = rack_of(settings), objective_of(settings)
    subsets = [s for n in range(1, L + 1) for s in itertools.combinations(range(L), n)]
    nats = {}
    for gone in subsets:
        log_p = log_probabilities(rack, objective, hidden(TEXT, gone), 0.5)
        nats[gone] = -sum(float(log_p[i, TEXT[i]]) for i in gone)
    wanted, rates = 0.0, (np.arange(2000) + 0.5) / 2000
    for gone in subsets:
        n = len(gone)
        if weighting == "exact_counts":
            probability, weight = 1 / L / math.comb(L, n), (2 - power) * (L / n) ** power
            wanted += probability * weight * nats[gone]
        else:
            wanted += np.mean(rates**n * (1 - rates) ** (L - n) * (2 - power) / rates**power) * nats[gone]
    found = []
    for epoch in range(300):
        example = objective.corrupt(batch_of(TEXT, 12, epoch))
        found.append(float(objective.loss(rack, example, 1.0 / example.n_targets).detach()))
    assert abs(np.mean(found) - wanted / L) < 4 * np.std(found) / len(found) ** 0.5 + 2e-3
    plain = objective_of(config(weighting=weighting))
    assert (draws_of(rack, objective, TEXT, 50) == draws_of(rack, plain, TEXT, 50)).all()


def test_one_pass_has_one_rate_a_stack_and_no_weights_of_rates():
    with pytest.raises(ConfigError, match=r"weight_power: 0\.5 has no effect when depth_variant is prefix"):
        config(time="depth", depth_variant="prefix", weight_power=0.5)


def test_blocks_are_bounded_block_by_block_and_see_only_what_is_before_them():
    text, block = (1, 0, 0, 1, 1, 0), 2
    settings = config(length=6, block_length=block)
    rack, objective = rack_of(settings), objective_of(settings)

    def log_p_of(start, gone):
        tokens = torch.tensor([[*text[:start], *hidden(text, gone)[start : start + block]]])
        logits = rack.logits(rack(Reading(tokens, block_length=block)))[0].detach()
        logits[:, MASK] = -math.inf
        return logits.log_softmax(-1)

    bound = 0.0
    for start in range(0, 6, block):
        for n in (1, 2):
            subsets = list(itertools.combinations(range(start, start + block), n))
            for gone in subsets:
                log_p = log_p_of(start, gone)
                bound -= sum(float(log_p[i, text[i]]) for i in gone) / n / len(subsets)
    found = draws_of(rack, objective, text)
    assert abs(found.mean() - bound) < 4 * found.std() / len(found) ** 0.5 + 1e-6


@pytest.mark.parametrize("order", ["first_hitting", "ancestral", "confidence"])
def test_blocks_with_kept_keys_and_values_give_the_same_tokens(order):
    settings = config(length=6, block_length=3)
    rack = rack_of(settings)
    prompt = torch.tensor([[0, 1, 1, 0] + [MASK] * 7, [1, 1, 0, 0] + [MASK] * 7])
    cached, plain = (
        last(generate_blocks(rack, prompt, 3, mask_id=MASK, order=order, cached=kept, seed=7)) for kept in (True, False)
    )
    assert torch.equal(cached, plain)
    assert torch.equal(cached[:, :4], prompt[:, :4]) and not (cached == MASK).any()


def test_a_rack_that_still_grows_has_no_bound():
    settings = config(time="depth", depth_variant="suffix", levels=list(LEVELS))
    rack, objective = rack_of(settings), objective_of(settings)
    rack.stacks = type(rack.stacks)(list(rack.stacks)[1:])  # the two least noisy
    tokens = np.tile(np.array([0, 1]), 40)
    options = {"seq_len": L, "batch_size": 5, "bytes_per_token": 1.0}
    found = validate(rack, objective, tokens, **options)
    assert found.nelbo is None and found.bits_per_byte is None
    noise = intervals_of("suffix", LEVELS, (1, 0))
    assert [(i.low, i.high, i.start, i.stop) for i in noise] == [(0.2, 0.45, 0, 2), (0.0, 0.2, 1, 2)]
    settings = config(n_stacks=3, time="depth", depth_variant="suffix", levels=list(LEVELS))
    found = validate(rack_of(settings), objective, tokens, draws=3, **options)
    assert found.nelbo["draws"] == 3 and found.nelbo["standard_error"] > 0
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))


def test_the_curve_adds_up_to_the_bound():
    settings = config(length=10)
    rack, objective = rack_of(settings), objective_of(settings)
    tokens = np.random.default_rng(0).integers(0, 2, 4001)
    found = validate(rack, objective, tokens, seq_len=10, batch_size=50, bytes_per_token=1.0, draws=4)
    assert len(found.curve) == 10  # one count a bin here: their mean is the bound
    assert np.mean([mean for _, mean, _ in found.curve]) == pytest.approx(found.loss, rel=0.02)


def test_special_tokens_are_never_masked_and_do_not_count():
    settings = config(length=5)
    objective = objective_of(settings)
    batch = batch_of((SPECIAL, 0, 1, SPECIAL, 1), 40)
    for weighting in ("stratified", "exact_counts"):
        chosen = objective_of(config(length=5, weighting=weighting))
        example = chosen.corrupt(batch)
        assert (example.reading.ids[:, [0, 3]] == SPECIAL).all() and (example.targets[:, [0, 3]] == IGNORE).all()
        assert example.n_targets == 3 * 40
        assert ((example.reading.ids == MASK) == (example.targets != IGNORE)).all()
    assert objective.score(rack_of(settings), batch).tokens.tolist() == [3] * 40


@pytest.mark.parametrize("weighting", ["stratified", "exact_counts"])
def test_training_and_sampling_tell_the_rack_the_same_masked_share(weighting):
    text = (SPECIAL, 0, 1, SPECIAL, 1, 0, 1)
    settings = config(length=len(text), time="input", condition="masked", weighting=weighting)
    rack, objective = rack_of(settings), objective_of(settings, conditioned="masked")
    example = objective.corrupt(batch_of(text, 40))
    shares = [sum(token == MASK for token in row) / 5 for row in example.reading.ids.tolist()]  # five are not special
    assert len(set(shares)) == 5 if weighting == "exact_counts" else len(set(shares)) == 6
    assert example.reading.time.tolist() == pytest.approx(shares)
    told = []
    rack.register_forward_pre_hook(lambda rack, inputs: told.append(inputs[0].time))
    RackDenoiser(rack, objective)(example.reading.ids, torch.full((40,), 0.5))
    assert told[0].tolist() == pytest.approx(shares)


def test_levels_that_stop_above_zero_are_refused():
    with pytest.raises(ValueError, match=r"must be 4 rates that fall from 1 to 0"):
        config(time="depth", levels=[1.0, 0.5, 0.3, 0.15])
    assert DiffusionConfig().levels == "linear"
