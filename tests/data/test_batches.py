import numpy as np
import pytest

from stackwise.data.batches import Batches, validation_windows, windows
from stackwise.errors import UserError

TOKENS = np.arange(1, 7 * 23 + 4, dtype=np.uint16)  # 23 windows of 7 targets, and a rest


def test_batch_is_a_function_of_seed_and_step() -> None:
    forward = [Batches(TOKENS, 7, 5, 3).batch(step) for step in range(12)]
    one = Batches(TOKENS, 7, 5, 3)
    for step in reversed(range(12)):
        again = one.batch(step)
        assert np.array_equal(again.tokens, forward[step].tokens)
        assert np.array_equal(again.sample, forward[step].sample)
        assert np.array_equal(again.epoch, forward[step].epoch)


def test_each_epoch_has_every_sample_once_in_its_own_order() -> None:
    batches = Batches(TOKENS, 7, 5, 3)
    assert batches.n_samples == 23
    drawn = [batches.batch(step) for step in range(23)]  # five epochs: batches straddle their ends
    sample, epoch = (np.concatenate([getattr(b, name) for b in drawn]) for name in ("sample", "epoch"))
    assert epoch.tolist() == [e for e in range(5) for _ in range(23)]
    orders = {tuple(sample[epoch == e]) for e in range(5)}
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert len(orders) == 5


def test_rows_are_the_windows_of_their_samples() -> None:
    batch = Batches(TOKENS, 7, 5, 3).batch(4)
    assert batch.tokens.dtype == np.int64 and batch.tokens.shape == (5, 8)
    for row, sample in zip(batch.tokens, batch.sample):
        assert row.tolist() == TOKENS[sample * 7 : sample * 7 + 8].tolist()


def test_an_epoch_predicts_every_token_but_the_first_once() -> None:
    batches = Batches(TOKENS[:162], 7, 23, 0)
    targets = batches.batch(0).tokens[:, 1:]
    assert sorted(targets.ravel().tolist()) == TOKENS[1:162].tolist()


def test_order_depends_on_the_seed() -> None:
    one, other = (Batches(TOKENS, 7, 23, seed).batch(0).sample for seed in (1, 2))
    assert not np.array_equal(one, other)


def test_the_same_positions_come_in_batches_of_any_size() -> None:
    large = Batches(TOKENS, 7, 6, 3)
    small = Batches(TOKENS, 7, 2, 3)
    joined = np.concatenate([small.batch(step).tokens for step in (9, 10, 11)])
    assert np.array_equal(large.batch(3).tokens, joined)


def test_memory_mapped_tokens_give_the_same_batches(tmp_path) -> None:
    TOKENS.tofile(tmp_path / "t.bin")
    mapped = np.memmap(tmp_path / "t.bin", dtype=np.uint16, mode="r")
    batch = Batches(mapped, 7, 5, 3).batch(2)
    assert type(batch.tokens) is np.ndarray
    assert np.array_equal(batch.tokens, Batches(TOKENS, 7, 5, 3).batch(2).tokens)


def test_a_corpus_shorter_than_a_window_is_refused_with_its_numbers() -> None:
    Batches(TOKENS[:8], 7, 5, 0)
    with pytest.raises(UserError, match=r"^training\.seq_len: 7 needs at least 8 training tokens.*7; give more"):
        Batches(TOKENS[:7], 7, 5, 0)


def test_validation_windows_cover_all_targets_once() -> None:
    starts = validation_windows(len(TOKENS), 7)
    targets = windows(TOKENS, starts, 7)[:, 1:].ravel()
    assert targets.tolist() == TOKENS[1:162].tolist()


@pytest.mark.parametrize(("max_tokens", "n"), [(1, 1), (14, 2), (35, 5), (160, 22), (161, 23), (10**9, 23)])
def test_fewer_validation_windows_are_spread_evenly_on_the_same_grid(max_tokens: int, n: int) -> None:
    starts = validation_windows(len(TOKENS), 7, max_tokens)
    assert len(starts) == n and (starts % 7 == 0).all() and starts[-1] + 7 < len(TOKENS)
    gaps = np.diff(starts)
    assert (gaps > 0).all() and (not gaps.size or np.ptp(gaps) <= 7)


def test_validation_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UserError, match=r"needs at least 8 validation tokens.*7.*validation_fraction"):
        validation_windows(7, 7)
