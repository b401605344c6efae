"""Sizes far from any that is meant are refused in one line, and large ones are planned as fast as small ones."""

import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stackwise.config import StackWiseConfig
from stackwise.errors import UserError
from stackwise.growth.curricula import build_phases
from stackwise.ops.losses import linear_cross_entropy
from stackwise.ops.repeats import chunk_starts
from stackwise.planning.dry_step import Ledger
from stackwise.planning.plan import plan_phases

SMALL = {
    "model": {"d_model": 8, "n_heads": 2, "d_ff": 8, "architecture": {"n_stacks": 2, "blocks_per_stack": 1}},
    "training": {"batch_size": 1, "seq_len": 16, "max_steps": 100_000, "device": "cpu"},
}


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ("model.architecture.n_stacks=1000000", "at least 1 and at most 256"),
        ("training.progressive.target_stacks=1000000", "at least 1 and at most 256"),
        ("model.architecture.blocks_per_stack=1000000", "at least 1 and at most 10000"),
        ("model.d_model=1000000000000000000", "at least 1 and at most 16777216"),
        ("training.seq_len=100000000", "at least 1 and at most 16777216"),
        ("training.max_steps=9223372036854775807", "at least 1 and at most 9007199254740992"),
        ("model.window=100000000", "at least 2 and at most 16777216"),
    ],
)
def test_a_size_beyond_any_machine_names_what_is_allowed(setting: str, allowed: str) -> None:
    with pytest.raises(
        UserError, match=f"{setting.partition('=')[0]}: .* out of range; must be {allowed}(, or null)?$"
    ):
        StackWiseConfig.from_dict(SMALL, [setting])


def test_the_blocks_of_all_stacks_have_a_limit() -> None:
    with pytest.raises(UserError, match=r"blocks_per_stack: gives 10,001 Blocks in total; allowed: at most 10,000"):
        StackWiseConfig.from_dict(SMALL, ["model.architecture.blocks_per_stack=[5000, 5001]"])


def test_a_million_cycles_are_refused_and_a_thousand_phases_too() -> None:
    config = StackWiseConfig.from_dict(SMALL)

    def cycles(n: int) -> dict[str, object]:
        phases = [{"add": "rest"}, {"sweep": "left_to_right", "cycles": n}]
        return {"training.strategy": "phases", "training.phases": phases}

    with pytest.raises(UserError, match="cycles"):
        config.changed(cycles(1_000_000))
    start = time.process_time()
    with pytest.raises(UserError, match="more than 1,000 phases"):
        build_phases(config.changed(cycles(1000)))
    assert time.process_time() - start < 5.0


def test_sixteen_million_tokens_are_planned_in_a_moment() -> None:
    config = StackWiseConfig.from_dict(SMALL, ["training.seq_len=16777213"])
    start = time.process_time()
    planned = plan_phases(config, 263)
    assert time.process_time() - start < 15.0
    assert all(cost.flops > 0 for cost in planned.costs)


@pytest.mark.parametrize("n", [1, 5, 6, 7, 17, 18, 19, 24])
def test_a_dry_run_of_equal_chunks_counts_all_of_them(n: int) -> None:
    """Real tensors take every chunk, fake ones the first for all, and both count the same."""

    def counted() -> tuple[float, int]:
        hidden = torch.ones(n, 5, requires_grad=True)
        weight = torch.ones(11, 5, requires_grad=True)
        targets = torch.zeros(n, dtype=torch.int64)
        with Ledger() as ledger:
            linear_cross_entropy(hidden, weight, targets, chunk=6).backward()
        return sum(vars(ledger.flops).values()), ledger.peak

    real = counted()
    with FakeTensorMode():
        fake = counted()
    assert fake == real
    assert real[0] == 3 * 2 * n * 5 * 11


def test_real_tensors_take_every_chunk_under_a_count() -> None:
    with Ledger():
        assert list(chunk_starts(torch.ones(23, 2), 5)) == [0, 5, 10, 15, 20]
    with FakeTensorMode():
        fake = torch.ones(23, 2)
        assert list(chunk_starts(fake, 5)) == [0, 5, 10, 15, 20]
        with Ledger() as ledger:
            seen = [(start, ledger.times) for start in chunk_starts(fake, 5)]
    assert seen == [(0, 4), (20, 1)] and ledger.times == 1
