import itertools
import math

import numpy as np
import pytest

from stackwise.data.masking import bert_mask, count_mask, mask_uniforms, protected, rate_mask

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


STARTS = np.arange(VOCAB) % 3 == 0


@pytest.mark.parametrize("unit", ["token", "word", "span"])
@pytest.mark.parametrize("rate", [0.07, 0.5, 0.93])
def test_the_share_of_masked_tokens_is_the_rate_for_every_unit(unit: str, rate: float) -> None:
    ids = tokens(307, 101, low=0)
    special = np.isin(ids, sorted(SPECIALS))
    _, targets = mask(ids, rate=rate, unit=unit, starts=STARTS)
    shares = (targets != IGNORE).sum(axis=1) / (~special).sum(axis=1)
    assert abs(shares.mean() - rate) < 4 * shares.std() / 307**0.5
    assert shares.std() / 307**0.5 < 0.01


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_masks_of_every_epoch_are_independent(unit: str) -> None:
    B, rate, epochs = 307, 0.3, 7
    ids = tokens(B, 101)
    picked = np.stack([mask(ids, epoch=e, rate=rate, unit=unit, starts=STARTS)[1] != IGNORE for e in range(epochs)])
    for one, other in itertools.combinations(picked, 2):
        assert not (one == other).all(axis=1).any()
    for n in range(epochs + 1):
        shares = (picked.sum(axis=0) == n).mean(axis=1)  # of the tokens picked in n epochs, by row
        binomial = math.comb(epochs, n) * rate**n * (1 - rate) ** (epochs - n)
        assert abs(shares.mean() - binomial) < 4 * max(shares.std(), 0.01) / B**0.5


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_a_mask_does_not_depend_on_what_its_neighbours_say(unit: str) -> None:
    ids = tokens(17, 61)
    kept = np.random.default_rng(4).random(ids.shape) < 0.5
    others = np.where(kept, ids, 3 + (ids - 3 + 30) % 90)  # steps of 3: what began a word still does
    assert (others[~kept] != ids[~kept]).all()
    before, after = (mask(x, rate=0.4, unit=unit, starts=STARTS) for x in (ids, others))
    assert np.array_equal(before[0][kept], after[0][kept])
    assert np.array_equal(before[1] != IGNORE, after[1] != IGNORE)


def test_what_a_lower_rate_hides_a_higher_one_hides_alike() -> None:
    ids = tokens()
    low, high = mask(ids, rate=0.2), mask(ids, rate=0.7)
    picked = low[1] != IGNORE
    assert np.array_equal(low[0][picked], high[0][picked]) and np.array_equal(low[1][picked], high[1][picked])


def test_spans_are_predicted_whole_but_for_specials() -> None:
    ids = tokens(43, 97, low=0)
    special = np.isin(ids, sorted(SPECIALS))
    u = uniforms(ids, unit="span", span_length=5.0)
    _, targets = mask(ids, unit="span", span_length=5.0, rate=0.3)
    whole = 0
    for numbers, found, fixed in zip(u, targets != IGNORE, special):
        assert not found[fixed].any()
        for span in np.split(np.arange(97), np.flatnonzero(np.diff(numbers)) + 1):
            ordinary = found[span][~fixed[span]]
            assert ordinary.all() or not ordinary.any()
            whole += len(ordinary) > 1 and ordinary.all()
    assert whole > 100


@pytest.mark.parametrize("length", [1.5, 3.0, 7.0])
def test_spans_are_of_geometric_length(length: float) -> None:
    T = 1009
    u = uniforms(np.zeros((97, T), dtype=np.int64), unit="span", span_length=length)
    found = [np.array([len(list(group)) for _, group in itertools.groupby(row)]) for row in u]
    assert np.mean(np.concatenate(found)) == pytest.approx(T / (1 + (T - 1) / length), rel=0.02)  # a row cuts its last
    uncut = np.concatenate([row[np.cumsum(row) - row < T - 3] for row in found])  # those that can have 4 tokens
    for n in (1, 2, 3):
        assert within((uncut == n).sum(), len(uncut), (1 - 1 / length) ** (n - 1) / length)


def test_a_span_below_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"span_length is 0\.9; allowed: 1 and above"):
        uniforms(tokens(2, 5), unit="span", span_length=0.9)


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_no_special_is_picked_or_drawn_at_any_rate_in_any_unit(unit: str) -> None:
    ids, specials = tokens(41, 73, low=0), frozenset((0, 2, 50, 102))
    special = np.isin(ids, sorted(specials))
    assert np.array_equal(protected(ids, specials, VOCAB), special) and special.any()
    inputs, targets = mask(
        ids, rate=1.0, unit=unit, starts=STARTS, special_ids=specials, mask_share=0.0, random_share=1.0
    )
    assert np.array_equal(targets != IGNORE, ~special)
    assert np.array_equal(inputs[special], ids[special])
    assert not np.isin(inputs[~special], sorted(specials)).any()


def test_without_specials_every_token_can_be_picked() -> None:
    ids = tokens(5, 7, low=0)
    inputs, targets = mask(ids, rate=1.0, mask_share=1.0, random_share=0.0, special_ids=frozenset())
    assert np.array_equal(targets, ids) and (inputs == MASK).all()


def test_shares_of_zero_leave_the_inputs_and_keep_the_targets() -> None:
    ids = tokens(11, 13)
    inputs, targets = mask(ids, rate=0.5, mask_share=0.0, random_share=0.0)
    assert np.array_equal(inputs, ids) and (targets != IGNORE).any()


def test_a_count_masks_the_positions_with_the_smallest_numbers() -> None:
    ids = tokens(29, 47)
    u, fixed = uniforms(ids, unit="span"), ids % 5 == 0
    counts = np.random.default_rng(6).integers(0, (~fixed).sum(axis=1) + 1)
    counts[:2] = 0, (~fixed[1]).sum()
    masked = count_mask(u, counts, fixed)
    for row in range(29):
        free = sorted(np.flatnonzero(~fixed[row]), key=lambda i: (u[row, i], i))
        assert set(np.flatnonzero(masked[row])) == set(free[: counts[row]])
        assert np.array_equal(count_mask(u[[row]], counts[[row]], fixed[[row]])[0], masked[row])
    assert not masked[0].any() and np.array_equal(masked[1], ~fixed[1])


def test_counts_and_rates_follow_one_path() -> None:
    ids = tokens(19, 31)
    u, fixed = uniforms(ids), ids % 4 == 0
    for rate in (0.2, 0.6, 0.95):
        masked = rate_mask(u, rate, fixed)
        assert np.array_equal(count_mask(u, masked.sum(axis=1), fixed), masked)


def test_a_count_below_zero_or_of_more_than_is_free_is_refused() -> None:
    u, fixed = uniforms(tokens(3, 7)), np.zeros((3, 7), dtype=bool)
    fixed[1, :3] = True
    with pytest.raises(ValueError, match="row 1 has 4 positions that can be masked; 5 were asked for"):
        count_mask(u, np.array([7, 5, 0]), fixed)
    with pytest.raises(ValueError, match="row 2 has 7 positions that can be masked; -1 were asked for"):
        count_mask(u, np.array([7, 4, -1]), fixed)


def test_a_prompt_that_is_fixed_is_never_masked() -> None:
    ids = tokens(23, 37)
    u = uniforms(ids)
    prompt = np.arange(37) < np.arange(23)[:, None]  # a longer one in each row
    assert np.array_equal(rate_mask(u, 1.0, prompt), ~prompt)
    assert not (count_mask(u, np.full(23, 11), prompt) & prompt).any()
