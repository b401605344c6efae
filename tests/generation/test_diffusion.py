"""Samplers against the exact distributions of hand-made denoisers."""

import itertools
import math

import numpy as np
import pytest
import torch

from stackwise.generation.diffusion import unmask

V, MASK, L = 4, 3, 3
TEXTS = list(itertools.product(range(3), repeat=L))
JOINT = np.random.default_rng(1).dirichlet(np.full(len(TEXTS), 0.6)).reshape(3, 3, 3)
ROWS = 4000


def conditional(tokens):
    """log p of each position given what is there, of the distribution JOINT: (L, V)."""
    index = tuple(slice(None) if token == MASK else slice(token, token + 1) for token in tokens)
    rest = JOINT[index] / JOINT[index].sum()
    out = np.full((L, V), -30.0)
    for i in range(L):
        p = rest.sum(axis=tuple(j for j in range(L) if j != i))
        out[i, : len(p)] = np.log(np.maximum(p, 1e-13))
    return out


class Table:
    """A denoiser that looks its answers up; ``wrong`` gives any logits, of no distribution's conditionals."""

    def __init__(self, wrong=False):
        self.calls = 0
        generator = np.random.default_rng(2)
        self.answers = {
            context: torch.tensor(generator.normal(size=(L, V)) * 1.5 if wrong else conditional(context))
            for context in itertools.product(range(V), repeat=L)
        }
        for answer in self.answers.values():
            answer[:, MASK] = 5.0  # a denoiser that would like to leave everything masked

    def __call__(self, tokens, level):
        self.calls += 1
        assert level.shape == (len(tokens),) and bool(((level > 0) & (level <= 1)).all())
        return torch.stack([self.answers[tuple(row)] for row in tokens.tolist()])

    def p(self, context, i, token, temperature=1.0):
        logits = self.answers[context][i].clone() / temperature
        logits[MASK] = -math.inf
        return float(logits.softmax(-1)[token])


def gaps(rows=ROWS):
    return torch.full((rows, L), MASK)


def last(steps):
    *_, tokens = steps
    return tokens


def fits(samples, exact):
    """Whether the frequencies of TEXTS fit: χ² within five standard deviations of its mean."""
    places = {text: i for i, text in enumerate(TEXTS)}
    counts = np.bincount([places[tuple(row)] for row in samples.tolist()], minlength=len(TEXTS))
    expected = len(samples) * np.asarray(exact)
    assert expected.sum() == pytest.approx(len(samples))
    keep = expected > 4
    statistic = ((counts - expected)[keep] ** 2 / expected[keep]).sum() + np.maximum(0, counts[~keep] - 25).sum()
    freedom = keep.sum() - 1
    return statistic < freedom + 5 * (2 * freedom) ** 0.5


def context_of(text, gone):
    return tuple(MASK if i in gone else token for i, token in enumerate(text))


def any_order(table, text):
    orders = list(itertools.permutations(range(L)))
    return sum(
        math.prod(table.p(context_of(text, set(order[k:])), i, text[i]) for k, i in enumerate(order))
        for order in orders
    ) / len(orders)


def ancestral(table, text, levels, gone=frozenset(range(L))):
    """p(text) when a gap is filled at each level with its probability, all of a step from the same context."""
    if len(levels) == 1:
        return float(not gone)
    share = (levels[0] - levels[1]) / levels[0]
    total, context = 0.0, context_of(text, gone)
    for n in range(len(gone) + 1):
        for shown in itertools.combinations(sorted(gone), n):
            p = share**n * (1 - share) ** (len(gone) - n)
            if p:
                p *= math.prod(table.p(context, i, text[i]) for i in shown)
                total += p * ancestral(table, text, levels[1:], gone - set(shown))
    return total


def test_first_hitting_with_true_conditionals_draws_from_the_distribution_itself():
    assert fits(last(unmask(Table(), gaps(), mask_id=MASK, order="first_hitting")), JOINT.ravel())


@pytest.mark.parametrize("order", ["first_hitting", "ancestral"])
def test_samplers_draw_from_their_own_distribution_whatever_the_denoiser(order):
    table = Table(wrong=True)
    levels = (1.0, 0.6, 0.25, 0.0)
    how = {"levels": levels} if order == "ancestral" else {}
    exact = [ancestral(table, text, levels) if how else any_order(table, text) for text in TEXTS]
    assert fits(last(unmask(table, gaps(), mask_id=MASK, order=order, **how)), exact)


def test_ancestral_steps_leave_the_share_of_gaps_that_their_level_says():
    levels = (1.0, 0.6, 0.25, 0.1, 0.0)
    for level, tokens in zip(levels[1:], unmask(Table(), gaps(), mask_id=MASK, levels=levels), strict=True):
        left = float((tokens == MASK).double().mean())
        assert left == pytest.approx(level, abs=4 * (level * (1 - level) / (ROWS * L)) ** 0.5)


def test_one_step_fills_every_gap_independently():
    table = Table()
    exact = [math.prod(table.p((MASK,) * L, i, token) for i, token in enumerate(text)) for text in TEXTS]
    assert fits(last(unmask(table, gaps(), mask_id=MASK, steps=1)), exact)
    assert not fits(last(unmask(table, gaps(), mask_id=MASK, steps=1)), JOINT.ravel())


def test_infilling_draws_from_the_conditional_distribution_and_leaves_the_rest():
    start = torch.tensor([[MASK, 1, MASK]]).repeat(ROWS, 1)
    samples = last(unmask(Table(), start, mask_id=MASK, order="first_hitting"))
    assert (samples[:, 1] == 1).all()
    exact = np.zeros((3, 3, 3))
    exact[:, 1] = JOINT[:, 1] / JOINT[:, 1].sum()
    assert fits(samples, exact.ravel())


def test_temperature_and_top_p_change_each_draw_as_computed():
    table, context = Table(wrong=True), (MASK,) * L
    for temperature in (0.5, 2.0):
        exact = [math.prod(table.p(context, i, t, temperature) for i, t in enumerate(text)) for text in TEXTS]
        assert fits(last(unmask(table, gaps(), mask_id=MASK, steps=1, temperature=temperature)), exact)
    likeliest = tuple(max(range(3), key=lambda t, i=i: table.p(context, i, t)) for i in range(L))
    for how in ({"temperature": 0.0}, {"top_p": 0.0}):
        assert set(map(tuple, last(unmask(table, gaps(9), mask_id=MASK, steps=1, **how)).tolist())) == {likeliest}


def test_guidance_leans_away_from_what_is_said_without_the_prompt():
    table, scale = Table(wrong=True), 1.5
    start = torch.tensor([[2, MASK, MASK]]).repeat(ROWS, 1)
    told, blind = table.answers[2, MASK, MASK], table.answers[MASK, MASK, MASK]
    logits = blind + (1 + scale) * (told - blind)
    logits[:, MASK] = -math.inf
    p = logits.softmax(-1)[:, :3].numpy()
    exact = np.zeros((3, 3, 3))
    exact[2] = np.outer(p[1], p[2])
    guided = unmask(table, start, mask_id=MASK, steps=1, guidance=(scale, start == 2))
    assert fits(last(guided), exact.ravel()) and table.calls == 2
    last(unmask(table, start, mask_id=MASK, steps=1, guidance=(0.0, start == 2)))
    assert table.calls == 3


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
def test_orders_fill_the_surest_gap_first(order):
    """Position 1 has the likeliest token and the lowest entropy; position 2 is nearly as sure, but torn between two."""
    p = {
        "confidence": [[0.5, 0.3, 0.2], [0.8, 0.1, 0.1], [0.6, 0.4, 0.0]],
        "margin": [[0.5, 0.3, 0.2], [0.6, 0.2, 0.2], [0.52, 0.48, 0.0]],
        "entropy": [[0.4, 0.3, 0.3], [0.7, 0.15, 0.15], [0.5, 0.5, 0.0]],
    }[order]
    wanted = {"confidence": [1, 2, 0], "margin": [1, 0, 2], "entropy": [2, 1, 0]}[order]
    logits = torch.tensor([[*row, 0.0] for row in p]).double().log()
    steps = list(unmask(lambda tokens, level: logits[None], gaps(1), mask_id=MASK, order=order, temperature=0.0))
    filled = [int((a != b).nonzero()[0, 1]) for a, b in itertools.pairwise([gaps(1), *steps])]
    assert filled == wanted
    two = list(unmask(lambda tokens, level: logits[None], gaps(1), mask_id=MASK, order=order, steps=2, temperature=0.0))
    assert [int((tokens == MASK).sum()) for tokens in two] == [1, 0]
    assert int((two[0] == MASK).nonzero()[0, 1]) == wanted[2]


def test_a_threshold_fills_all_gaps_that_are_sure_and_at_least_one():
    logits = torch.tensor([[0.9, 0.05, 0.05, 0], [0.4, 0.3, 0.3, 0], [0.95, 0.03, 0.02, 0]]).double().log()[None]
    steps = list(
        unmask(lambda t, level: logits, gaps(1), mask_id=MASK, order="threshold", threshold=0.85, temperature=0)
    )
    assert [tokens.tolist()[0] for tokens in steps] == [[0, MASK, 0], [0, 0, 0]]


def test_a_row_depends_on_its_own_tokens_and_seed_alone():
    start = torch.tensor([[MASK, MASK, MASK], [MASK, 0, 2], [1, MASK, MASK], [0, 1, 2]])
    for order in ("ancestral", "first_hitting", "confidence"):
        table = Table(wrong=True)
        together = last(unmask(table, start, mask_id=MASK, order=order, seed=[5, 6, 7, 8]))
        for i, seed in enumerate((5, 6, 7)):
            alone = list(unmask(table, start[i : i + 1], mask_id=MASK, order=order, seed=[seed]))
            if order != "ancestral":  # whose number of steps is that of the row with most gaps
                assert torch.equal(alone[-1][0], together[i])
        again = last(unmask(table, start, mask_id=MASK, order=order, seed=[5, 6, 7, 8]))
        assert torch.equal(again, together) and torch.equal(together[3], start[3])
        others = [last(unmask(table, start, mask_id=MASK, order=order, seed=s)).tolist() for s in range(9)]
        assert len(set(map(str, others))) > 1


def test_a_denoiser_that_does_not_see_the_level_is_asked_only_when_tokens_changed():
    for free in (False, True):
        table = Table()
        steps = list(unmask(table, gaps(1), mask_id=MASK, steps=40, time_free=free))
        changed = 1 + sum(not torch.equal(a, b) for a, b in itertools.pairwise([gaps(1), *steps]))
        assert table.calls == (changed - 1 if free else len(steps))
        assert len(steps) > 4


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"order": "confidense"}, r"did you mean confidence\?$"),
        ({"steps": 0}, r"steps is 0"),
        ({"order": "threshold"}, r"threshold is None"),
        ({"order": "threshold", "threshold": 1.5}, r"threshold is 1.5"),
        ({"threshold": 0.5}, r"threshold is only used with order threshold \(order is"),
        (
            {"order": "first_hitting", "steps": 3},
            r"steps is only used with order ancestral, confidence, margin, entropy \(order is first_hitting\)$",
        ),
        ({"levels": (1.0, 0.5)}, r"stop above 0"),
        ({"levels": (1.0, 0.0), "steps": 2}, r"both given"),
        ({"guidance": (-1.0, None)}, r"guidance is -1"),
        ({"seed": [1, 2]}, r"2 seeds for 3"),
        ({"temperature": -1.0}, r"temperature"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_the_call(settings, message):
    with pytest.raises(ValueError, match=message):
        unmask(Table(), gaps(3), mask_id=MASK, **settings)
