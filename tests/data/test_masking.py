import itertools

import numpy as np
import pytest

from stackwise.data.masking import bert_mask, count_mask, mask_uniforms, rate_mask

IGNORE = -100
MASK, SPECIALS, VOCAB = 2, frozenset((0, 1, 2)), 103
SETTINGS = {
    "seed": 5, "rate": 0.15, "mask_share": 0.8, "random_share": 0.1,
    "mask_id": MASK, "special_ids": SPECIALS, "vocab_size": VOCAB,
}  # fmt: skip


def tokens(B: int = 211, T: int = 127, low: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(low, VOCAB, (B, T))


def mask(ids: np.ndarray, epoch: int | np.ndarray = 0, sample: np.ndarray | None = None, **changes):
    sample = np.arange(len(ids)) if sample is None else sample
    return bert_mask(ids, np.broadcast_to(epoch, len(ids)), sample, **{**SETTINGS, **changes})


def within(count: int, n: int, p: float) -> bool:
    """Whether ``count`` is within four standard deviations of a binomial's mean."""
    return abs(count - n * p) < 4 * np.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_the_share_of_predicted_tokens_is_the_rate(rate: float) -> None:
    ids = tokens()
    _, targets = mask(ids, rate=rate)
    assert within((targets != IGNORE).sum(), ids.size, rate)


def test_predicted_tokens_are_masked_random_and_kept_80_10_10() -> None:
    ids = tokens()
    inputs, targets = mask(ids)
    picked = targets != IGNORE
    n = picked.sum()
    masked, kept = inputs[picked] == MASK, inputs[picked] == ids[picked]
    assert within(masked.sum(), n, 0.8)
    assert within(kept.sum(), n, 0.1 + 0.1 / (VOCAB - 3))  # a random token is the original at times
    assert within((~masked & ~kept).sum(), n, 0.1 * (1 - 1 / (VOCAB - 3)))


def test_targets_are_the_originals_and_other_inputs_are_untouched() -> None:
    ids = tokens()
    before = ids.copy()
    inputs, targets = mask(ids)
    picked = targets != IGNORE
    assert np.array_equal(targets[picked], ids[picked])
    assert np.array_equal(inputs[~picked], ids[~picked])
    assert (inputs != ids).sum() > 0.8 * picked.sum()
    assert np.array_equal(ids, before)


def test_random_tokens_are_every_ordinary_token_alike_and_no_special() -> None:
    ids = np.full((211, 127), MASK + 1)
    inputs, targets = mask(ids, rate=0.9, mask_share=0.3, random_share=0.4)
    drawn = inputs[(targets != IGNORE) & (inputs != MASK) & (inputs != ids)]
    counts = np.bincount(drawn, minlength=VOCAB)
    assert counts[:4].sum() == 0 and len(counts) == VOCAB
    expected = drawn.size / (VOCAB - 4)
    assert ((counts[4:] - expected) ** 2 / expected).sum() < 150  # 98 degrees of freedom


def test_specials_are_never_touched() -> None:
    ids = tokens(low=0)
    special = np.isin(ids, sorted(SPECIALS))
    assert special.sum() > 500
    inputs, targets = mask(ids, rate=0.99)
    assert np.array_equal(inputs[special], ids[special])
    assert (targets[special] == IGNORE).all()


def test_masks_differ_between_samples_epochs_and_seeds() -> None:
    ids = np.full((31, 127), 7)
    picked = mask(ids)[1] != IGNORE
    assert len({row.tobytes() for row in picked}) == 31
    for other in (mask(ids, epoch=1)[1] != IGNORE, mask(ids, seed=6)[1] != IGNORE):
        both = (picked & other).sum()
        assert within(both, ids.size, 0.15**2)


def test_masks_do_not_depend_on_what_else_is_in_the_batch() -> None:
    ids = tokens(13, 17)
    sample, epoch = np.arange(13) * 5, np.arange(13) // 7
    inputs, targets = mask(ids, epoch, sample)
    order = np.random.default_rng(1).permutation(13)
    for rows in (order, order[:3], order[7:8]):
        part = mask(ids[rows], epoch[rows], sample[rows])
        assert np.array_equal(part[0], inputs[rows]) and np.array_equal(part[1], targets[rows])


def test_a_position_does_not_depend_on_the_length_of_its_row() -> None:
    ids = tokens(11, 29)
    whole, part = mask(ids), mask(ids[:, :13])
    assert np.array_equal(whole[0][:, :13], part[0]) and np.array_equal(whole[1][:, :13], part[1])


def test_masks_are_nested_in_the_rate() -> None:
    ids = tokens()
    masks = [mask(ids, rate=rate)[1] != IGNORE for rate in (0.1, 0.15, 0.5, 0.9)]
    for smaller, larger in itertools.pairwise(masks):
        assert (larger | ~smaller).all() and larger.sum() > smaller.sum()


def test_how_a_token_is_hidden_is_independent_of_whether_a_lower_rate_picks_it() -> None:
    ids = tokens()
    inputs, targets = mask(ids, rate=0.6)
    picked_low = mask(ids, rate=0.15)[1] != IGNORE
    hidden = (inputs == MASK) & picked_low
    assert within(hidden.sum(), picked_low.sum(), 0.8)
    assert (targets[picked_low] != IGNORE).all()


# ---- units, rates and counts


def uniforms(ids: np.ndarray, epoch: int = 0, sample: np.ndarray | None = None, **settings) -> np.ndarray:
    sample = np.arange(len(ids)) if sample is None else sample
    return mask_uniforms(ids, np.broadcast_to(epoch, len(ids)), sample, seed=5, **settings)


def runs(u: np.ndarray) -> list[int]:
    """Lengths of the runs of equal neighbours in each row."""
    found = []
    for row in u:
        found += [len(list(group)) for _, group in itertools.groupby(row)]
    return found


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_uniforms_are_of_their_place_alone(unit: str) -> None:
    ids = tokens(40, 31)
    starts = np.arange(VOCAB) % 3 == 0
    whole = uniforms(ids, unit=unit, starts=starts)
    assert np.array_equal(whole[7:9], uniforms(ids[7:9], sample=np.array([7, 8]), unit=unit, starts=starts))
    order = np.random.default_rng(3).permutation(40)
    assert np.array_equal(whole[order], uniforms(ids[order], sample=order, unit=unit, starts=starts))
    assert not (whole == uniforms(ids, epoch=1, unit=unit, starts=starts)).any()
    assert whole.min() >= 0 and whole.max() < 1


def test_words_share_one_number_and_spans_have_their_mean_length() -> None:
    ids = tokens(60, 211)
    starts = np.arange(VOCAB) % 4 == 0
    u = uniforms(ids, unit="word", starts=starts)
    for row, numbers in zip(ids, u):
        edges = np.flatnonzero(starts[row])
        for word in np.split(numbers, edges):
            assert len(set(word)) <= 1
        assert len(set(numbers)) == len(set(edges) | {0})
    lengths = runs(uniforms(ids, unit="span", span_length=4.0))
    assert np.mean(lengths) == pytest.approx(4.0, rel=0.05)
    assert np.mean(np.array(lengths) == 1) == pytest.approx(0.25, abs=0.03)  # geometric
    assert set(runs(uniforms(ids, unit="span", span_length=1.0))) == {1}


def test_masks_are_nested_in_the_rate_and_in_the_count() -> None:
    ids = tokens(30, 53)
    u, fixed = uniforms(ids), ids % 7 == 0
    before = np.zeros_like(fixed)
    for rate in (0.1, 0.3, 0.31, 0.9, 1.0):
        now = rate_mask(u, rate, fixed)
        assert not (before & ~now).any() and not (now & fixed).any()
        before = now
    assert np.array_equal(before, ~fixed)
    spans = uniforms(ids, unit="span")  # with ties
    before = np.zeros_like(fixed)
    for count in range(30):
        now = count_mask(spans, np.full(30, count), fixed)
        assert (now.sum(axis=1) == count).all() and not (before & ~now).any() and not (now & fixed).any()
        before = now
    with pytest.raises(ValueError, match=r"row 2 has 5 positions that can be masked; 6 were asked for"):
        count_mask(u[:3, :5], np.array([1, 2, 6]), np.zeros((3, 5), dtype=bool))


def test_each_row_has_its_own_rate() -> None:
    ids = tokens(400, 127)
    rates = np.linspace(0.05, 0.9, 400)
    _, targets = mask(ids, rate=rates)
    shares = (targets != IGNORE).mean(axis=1)
    assert np.abs(shares - rates).max() < 5 * 0.5 / 127**0.5
    assert np.corrcoef(shares, rates)[0, 1] > 0.97


def test_whole_words_are_predicted_whole() -> None:
    ids = tokens(50, 89)
    starts = np.arange(VOCAB) % 3 == 0
    _, targets = mask(ids, unit="word", starts=starts, rate=0.3)
    for row, found in zip(ids, targets != IGNORE):
        for word in np.split(found, np.flatnonzero(starts[row])):
            assert word.all() or not word.any()
    with pytest.raises(ValueError, match="starts"):
        mask(ids, unit="word")
