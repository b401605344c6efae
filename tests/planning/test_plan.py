"""The plan of a run: machines, disk, time, recommendations, and the 70B shape against arithmetic by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from stackwise.cli.main import main
from stackwise.config import StackWiseConfig
from stackwise.config.run import CheckpointConfig
from stackwise.errors import UserError
from stackwise.growth.curricula import build_phases
from stackwise.planning import cost as cost_module
from stackwise.planning.cost import PhaseCoster
from stackwise.planning.devices import BF16_PEAK, DEVICES, Machine, named_machine, sheet_of
from stackwise.planning.dry_step import PhaseCost
from stackwise.planning.flops import Flops
from stackwise.planning.plan import Plan, plan_run, stored_bytes
from stackwise.planning.recommend import (
    Compared,
    best_that_fits,
    combinations,
    compare_plans,
    first_change_that_fits,
)

V, C, F, H, B, T = 37, 26, 19, 13, 6, 11
CPU = Machine("cpu", torch.device("cpu"), None, here=True)


def config(*overrides: str, n_stacks: int = 3) -> StackWiseConfig:
    return StackWiseConfig.from_dict(
        {
            "model": {
                "vocab_size": V, "d_model": C, "n_heads": H, "d_ff": F,
                "architecture": {"n_stacks": n_stacks, "blocks_per_stack": 1},
            },
            "training": {"batch_size": B, "seq_len": T, "max_steps": 60, "device": "cpu"},
        }, overrides
    )  # fmt: skip


def planned(settings: StackWiseConfig, machine: Machine = CPU) -> Plan:
    return plan_run(settings, Path(), machine=machine)


# ---- machines


def test_every_named_device_has_a_rate_and_plans_in_bfloat16() -> None:
    for name, (label, memory) in DEVICES.items():
        machine = named_machine(name, config().training)
        assert (machine.flops_per_second, machine.memory) == (BF16_PEAK[label], memory)
        assert machine.compute_dtype == torch.bfloat16 and machine.device.type == "cuda"
        assert not machine.here and machine.host_memory is None


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L4", 121e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100-PCIE-40GB", 312e12), ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA A10G", 70e12), ("NVIDIA L40", None), ("NVIDIA RTX A1000", None),
        ("NVIDIA A10", None), ("NVIDIA H100 NVL", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GH200 480GB", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)  # fmt: skip
def test_the_data_sheet_is_that_of_the_very_model(name: str, peak: float | None) -> None:
    assert sheet_of(name) == peak


def test_a_gpu_keeps_a_gigabyte_and_a_twentieth_for_what_is_no_tensor() -> None:
    gpu = replace(CPU, device=torch.device("cuda"), memory=40 * 10**9)
    assert gpu.usable_memory == 37 * 10**9 and replace(CPU, memory=40 * 10**9).usable_memory == 40 * 10**9
    needed = planned(config(), gpu).peak_memory_bytes
    tight, wide = needed + 5 * 10**8, int((needed + 10**9) / 0.95) + 10**6
    assert planned(config(), replace(gpu, memory=tight)).fits is False
    assert planned(config(), replace(gpu, memory=wide)).fits is True


def test_a_device_that_computes_in_float32_has_no_rate_on_its_data_sheet_here() -> None:
    machine = named_machine("h200", config("training.compute_dtype=float32").training)
    assert (machine.compute_dtype, machine.flops_per_second) == (None, None)


def test_an_unknown_device_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"--device: 'h300' is not known; allowed: cpu, cuda, mps, h200"):
        named_machine("h300", config().training)


def test_time_is_flops_at_the_share_of_the_rate_that_is_assumed() -> None:
    given = planned(config(), replace(CPU, flops_per_second=1e9, rate="given"))
    sheet = planned(config(), replace(CPU, flops_per_second=1e9, rate="data sheet"))
    assert given.seconds == pytest.approx((given.flops + given.validation_flops) / 1e9)
    assert sheet.seconds == pytest.approx((given.flops + given.validation_flops) / 0.4e9)
    assert sum(s or 0.0 for s in given.phase_seconds) == pytest.approx(given.flops / 1e9)
    assert planned(config()).seconds is None


# ---- what fits


def test_a_run_fits_when_the_device_its_host_and_the_disk_all_hold_it() -> None:
    settings = config("training.progressive.trunk_strategy=frozen", "training.offload=host")
    away = replace(CPU, device=torch.device("cuda"))
    plan = planned(settings, away)
    exact = {
        "memory": -(-(plan.peak_memory_bytes + 10**9) * 100 // 95),
        "host_memory": plan.host_memory_bytes,
        "disk": plan.disk_bytes,
    }
    assert min(exact.values()) > 0
    assert planned(settings, replace(away, **exact)).fits is True
    for key, what in (("memory", "device memory"), ("host_memory", "host memory"), ("disk", "disk")):
        short = planned(settings, replace(away, **{**exact, key: exact[key] - 1}))
        assert short.fits is False and short.missing == [what]
    assert planned(settings, replace(away, memory=None)).fits is None


def test_stacks_that_wait_on_the_host_are_counted_there_and_not_on_the_device() -> None:
    machine = replace(CPU, device=torch.device("cuda"))
    here, away = (
        planned(config("training.progressive.trunk_strategy=frozen", f"training.offload={where}"), machine)
        for where in ("none", "host")
    )
    for stack, (near, far) in enumerate(zip(here.costs, away.costs)):
        waiting = stack * 4 * (4 * C * C + 3 * C * F + 2 * C)
        assert (near.host, far.host) == (0, waiting)
        assert near.weights - far.weights == waiting


def test_on_a_cpu_the_host_is_the_device_and_nothing_waits_there() -> None:
    offloaded = planned(config("training.progressive.trunk_strategy=frozen", "training.offload=host"))
    assert [cost.host for cost in offloaded.costs] == [0, 0, 0]
    assert [cost.waiting for cost in offloaded.costs] == [0, 0, 0]
    cached = config(
        "training.progressive.trunk_strategy=frozen",
        "training.progressive.cache_activations=true",
        "training.offload=host",
    )
    assert [cost.waiting for cost in planned(cached).costs] == [0, 0, 0]


def test_checkpoints_hold_what_is_frozen_once_and_what_trains_and_its_moments_in_every_one() -> None:
    first = PhaseCost(7, 7, Flops(1.0), weights=28, gradients=28, optimizer=56, activations=0, logits=0, peak=0)
    second = replace(first, weights=30, gradients=20, optimizer=40, waiting=11, cache_bytes=3)
    one, two = (CheckpointConfig(keep_last=n, keep_phase_ends=False) for n in (1, 2))
    assert stored_bytes([first], two, keep_best=False) == 3 * (28 + 56)
    assert stored_bytes([second], one, keep_best=False) == (30 + 11 - 20) + 2 * (20 + 40) + 3
    # While the second phase begins, some of the checkpoints are the first one's.
    assert stored_bytes([first, second], one, keep_best=False) == (30 + 11 - 20) + 2 * (28 + 56) + 3
    # Those of both ends stay, and with each the best one that it knew; the oldest of the others has one too.
    ends, plain = CheckpointConfig(keep_last=1), stored_bytes([first, second], one, keep_best=False)
    assert stored_bytes([first, second], ends, keep_best=False) == plain + (28 + 56) + (20 + 40)
    assert stored_bytes([first, second], ends, keep_best=True) == plain + (28 + 56) + 2 * (28 + 56) + 2 * (20 + 40)


def test_a_trunk_stored_in_four_bits_takes_less_disk() -> None:
    frozen = "training.progressive.trunk_strategy=frozen"
    full = planned(config(frozen, n_stacks=7))
    coded = planned(config(frozen, "training.progressive.trunk_precision=nf4", n_stacks=7))
    # 6 Stacks' matrices at 4 bits and a scale for each 64, in place of 32 bits
    saved = sum((32 - 4) / 8 * n - 4 * -(-n // 64) for n in (*[C * C] * 4, *[C * F] * 3))
    dense, small = (stored_bytes(plan.costs[-1:], CheckpointConfig(), keep_best=False) for plan in (full, coded))
    assert dense - small == pytest.approx(6 * saved, rel=0.02)


# ---- rows of equal Stacks


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.strategy=end_to_end",),
        ("training.strategy=end_to_end", "training.activation_checkpointing=true", "training.micro_batch_size=2"),
        ("training.strategy=end_to_end", "training.end_to_end_scope=stackwise"),
        ("training.progressive.trunk_strategy=frozen", "training.progressive.building_mode=prepend"),
        ("training.progressive.trunk_strategy=frozen", "training.progressive.building_mode=prepend",
         "training.offload=disk"),
        ("training.progressive.trunk_strategy=qlora", "training.progressive.trunk_precision=nf4",
         "training.qlora.enabled=true", "training.qlora.rank=3"),
    ],
    ids=["end-to-end", "checkpointed", "stackwise", "prepend", "streamed", "qlora"],
)  # fmt: skip
def test_a_row_of_equal_stacks_costs_what_it_costs_when_all_of_them_run(
    overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(*overrides, n_stacks=7)
    phase = build_phases(settings)[-1 if settings.training.strategy == "progressive" else 0]
    short = PhaseCoster(settings, V, None)(phase)
    monkeypatch.setattr(cost_module, "_longest_row", lambda kinds: (0, 0))
    assert PhaseCoster(settings, V, None)(phase) == short


# ---- recommendations


def row(name: str, fits: bool) -> Compared:
    plan = planned(config(n_stacks=1))
    return Compared(name, replace(plan, limit=plan.peak_memory_bytes if fits else 1))


def test_the_best_recipe_is_the_first_by_preference_among_those_that_fit() -> None:
    rows = [row("append-frozen", True), row("append-frozen-joint", True), row("grown", False)]
    best = best_that_fits(rows)
    assert best is not None and best.recipe == "append-frozen-joint"
    assert best_that_fits([row("grown", False), Compared("end-to-end", None, "why")]) is None
    by_rank = ["grown", "end-to-end", "append-qlora", "append-frozen-joint", "append-frozen", "stackwise", "blockwise"]
    for i in range(len(by_rank)):
        best = best_that_fits([row(name, True) for name in reversed(by_rank[i:])])
        assert best is not None and best.recipe == by_rank[i]


def test_a_recipe_that_does_not_go_with_the_config_is_refused_with_its_reason() -> None:
    rows = compare_plans(config("model.tie_embeddings=true"), ["grown", "append-frozen"], planned)
    assert rows[0].plan is not None and rows[0].refused is None
    assert rows[1].plan is None and "tie_embeddings" in (rows[1].refused or "")


def test_changes_are_tried_one_by_one_and_then_together() -> None:
    found = list(combinations(config(), ["device memory"]))
    inside = {"training.optimizer.in_backward": True, "training.grad_clip": None}
    singles = [change for change in found if len(change) == 1 or change == inside]
    assert inside in singles and singles[0] == {"training.micro_batch_size": 3}
    assert {"training.activation_checkpointing": True} in singles
    assert found[len(singles)] == {"training.micro_batch_size": 1, "training.activation_checkpointing": True}
    assert list(combinations(config(), [])) == []


def test_the_change_that_is_found_fits_and_needs_each_of_its_parts() -> None:
    settings = config("training.strategy=end_to_end", n_stacks=5)
    least = planned(settings.changed({"training.micro_batch_size": 1, "training.activation_checkpointing": True}))
    machine = replace(CPU, memory=least.peak_memory_bytes)
    planner = partial(planned, machine=machine)
    change = first_change_that_fits(settings, planner, planner(settings))
    assert change is not None and change.plan.fits
    for key in change.changes:
        fewer = {other: value for other, value in change.changes.items() if other != key}
        assert not fewer or planner(settings.changed(fewer)).fits is False


SET_ALREADY: dict[str, tuple[str, ...]] = {
    "sgd": ("training.optimizer={optimizer_type: sgd}",),
    "lean": ("training.optimizer.moments=int8", "training.activation_checkpointing=true", "training.offload=disk",
             "training.micro_batch_size=1", "training.checkpoint.keep_last=1",
             "training.progressive={trunk_strategy: frozen, trunk_precision: nf4, cache_activations: true}",
             "training.cache.dtype=fp8", "model.architecture.blocks_per_stack=2"),
    "end to end": ("training.strategy=end_to_end",),
    "prepend": ("training.progressive.building_mode=prepend",),
    "phases": ("training.strategy=phases", "training.phases=[{add: rest}]"),
}  # fmt: skip


@pytest.mark.parametrize("name", SET_ALREADY)
def test_every_change_that_is_tried_changes_the_config(name: str) -> None:
    settings = config(*SET_ALREADY[name])
    for missing in (["device memory"], ["device memory", "host memory"], ["host memory"], ["disk"]):
        found = list(combinations(settings, missing))
        assert all(settings.changed(change) != settings for change in found)
        for fewer, more in pairwise(found):
            if fewer.items() <= more.items():
                assert settings.changed(more) != settings.changed(fewer)
    if name == "lean":
        smaller = {"model.architecture.blocks_per_stack": 1, "model.architecture.n_stacks": 6}
        assert list(combinations(settings, ["device memory"])) == [smaller]


def test_what_sgd_does_not_have_does_not_stand_in_the_way_of_what_fits() -> None:
    settings = config(*SET_ALREADY["sgd"], n_stacks=2)
    whole = planned(settings)

    def planner(changed: StackWiseConfig) -> Plan:
        training = changed.training
        fits = training.activation_checkpointing and training.progressive.trunk_precision == "nf4"
        return replace(whole, limit=whole.peak_memory_bytes - (not fits))

    change = first_change_that_fits(settings, planner, planner(settings))
    assert change is not None and change.overrides == [
        "training.activation_checkpointing=true",
        "training.progressive.trunk_strategy=frozen",
        "training.progressive.trunk_precision=nf4",
    ]


def test_no_change_is_named_when_none_fits() -> None:
    planner = partial(planned, machine=replace(CPU, memory=1))
    assert first_change_that_fits(config(), planner, planner(config())) is None


# ---- 70B on one H200, by hand: 80 Blocks of width 8192, feed-forward 28672, 64 heads, 8 of keys, vocabulary 128256


def seventy(blocks: int, *overrides: str) -> PhaseCost:
    """A step of the last phase: the last Stack over a frozen nf4 trunk, 4096 tokens, bfloat16 on a GPU."""
    file = Path(__file__).parents[2] / "configs/models/llama_70b.yaml"
    stacks = f"model.architecture={{n_stacks: {80 // blocks}, blocks_per_stack: {blocks}}}"
    settings = StackWiseConfig.from_yaml(
        file,
        [
            stacks, "training.batch_size=1", "training.progressive.trunk_strategy=frozen",
            "training.progressive.trunk_precision=nf4", *overrides,
        ],
    )  # fmt: skip
    return PhaseCoster(settings, 128256, torch.bfloat16, device="cuda")(build_phases(settings)[-1])


@pytest.mark.parametrize("blocks, resident, cached", [(1, 73e9, 36e9), (4, 116e9, 80e9)])
def test_the_peak_of_the_70b_shape_is_what_arithmetic_gives(blocks: int, resident: float, cached: float) -> None:
    """By hand 4.9 GiB of logits stand at once, which the loss never makes; so what is fed from a cache takes less."""
    plain = seventy(blocks)
    fed = seventy(blocks, "training.progressive.cache_activations=true")
    assert plain.parameters == pytest.approx(70.55e9, rel=0.001)
    trained = blocks * 855.65e6 + 128256 * 8192
    assert plain.weights + plain.gradients + plain.optimizer == pytest.approx(
        16 * trained + (80 - blocks) * 855.65e6 * 0.5625 + 4 * 128256 * 8192, rel=0.001
    )
    assert plain.peak == pytest.approx(resident, rel=0.05)
    assert 16 * trained < fed.peak < cached
    absent = (80 - blocks) * 855.65e6 * 0.5625 + 4 * 128256 * 8192  # the trunk and the embedding
    assert plain.peak - fed.peak == pytest.approx(absent, rel=0.01)
    assert fed.weights + fed.gradients + fed.optimizer == pytest.approx(16 * trained, rel=0.001)


def test_a_compiled_run_takes_the_compilers_memory_on_a_cpu_and_none_on_a_gpu() -> None:
    for device, more in (("cpu", 75 * 2**20), ("cuda", 0)):
        plain, compiled = (
            PhaseCoster(settings, V, None, device=device)(build_phases(settings)[0]).peak
            for settings in (config(), config("training.compile=true"))
        )
        assert compiled - plain == more


# ---- a device's own attention kernels


@pytest.mark.parametrize(
    "device, dropout, written",
    [("cuda", 0.1, False), ("cuda", 0.0, False), ("mps", 0.0, True), ("cpu", 0.0, False), ("cpu", 0.1, True)],
)
def test_weights_of_attention_are_counted_where_the_devices_kernel_writes_them_out(
    device: str, dropout: float, written: bool
) -> None:
    """Heads of 64, as wide as every kernel takes them."""
    heads, batch, tokens = 3, 2, 2039
    settings = StackWiseConfig.from_dict(
        {
            "model": {
                "d_model": 64 * heads, "n_heads": heads, "d_ff": 19, "dropout": dropout,
                "architecture": {"n_stacks": 1, "blocks_per_stack": 2},
            },
            "training": {"batch_size": batch, "seq_len": tokens, "strategy": "end_to_end"},
        }
    )  # fmt: skip
    cost = PhaseCoster(settings, V, None, device=device)(build_phases(settings)[-1])
    weights = 2 * batch * heads * tokens**2 * 4  # of both Blocks, once
    states = 2 * batch * tokens * 64 * heads * 4
    assert cost.activations > weights if written else cost.activations < 16 * states < weights


def test_dropout_on_a_gpu_adds_masks_of_hidden_states_alone() -> None:
    """The shape of a Llama of 1B, one of its 16 Blocks a Stack, two Stacks."""
    file = Path(__file__).parents[2] / "configs/models/llama_1b.yaml"

    def peak(dropout: float) -> int:
        settings = StackWiseConfig.from_yaml(
            file,
            [
                "model.architecture={n_stacks: 2, blocks_per_stack: 1}", f"model.dropout={dropout}",
                "training.strategy=end_to_end", "training.batch_size=4",
            ],
        )  # fmt: skip
        machine = named_machine("h200", settings.training)
        return PhaseCoster(settings, 128256, machine.compute_dtype, device="cuda")(build_phases(settings)[-1]).peak

    more = peak(0.1) - peak(0.0)
    state = 4 * 2048 * 2048
    weights = 4 * 32 * 2048**2 * 2
    assert 0 < more < 2 * 2 * 5 * state < weights, "two Blocks, two dropouts: a value and a mask's byte each"


# ---- the command


def said(capsys: pytest.CaptureFixture[str], file: Path, *options: str) -> dict[str, object]:
    capsys.readouterr()
    assert main(["plan", str(file), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    config().to_yaml(path)
    return path


def test_the_command_plans_for_a_device_that_is_not_here(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, file, "--device", "h200", "--host-memory", "128GiB", "--disk", "64GiB")
    assert found["machine"] == {
        "name": "H200", "compute_dtype": "bfloat16", "memory_bytes": int(141 * 10**9 * 0.95) - 10**9,
        "host_memory_bytes": 128 * 2**30, "disk_bytes": 64 * 2**30, "flops_per_second": 989e12, "rate": "data sheet",
        "reached_flops_per_second": pytest.approx(0.4 * 989e12),
    }  # fmt: skip
    assert found["fits"] is True and "recipes" not in found
    flops, scoring = found["flops"], found["validation"]
    assert isinstance(flops, float) and isinstance(scoring, dict)
    assert found["seconds"] == pytest.approx((flops + scoring["flops"]) / (0.4 * 989e12))


def test_recipes_are_compared_when_asked_and_one_is_recommended(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, file, "--recipes", "append-frozen,end-to-end", "--flops-per-second", "1e9")
    rows = found["recipes"]
    assert isinstance(rows, list) and [row["recipe"] for row in rows] == ["append-frozen", "end-to-end"]
    assert found["recommended"] == "end-to-end"
    least = rows[0]["peak_memory_bytes"]
    assert least < rows[1]["peak_memory_bytes"]
    tight = said(capsys, file, "--recipes", "append-frozen,end-to-end", "--memory", f"{least}B")
    assert tight["recommended"] == "append-frozen" and tight["fits"] is False


def test_what_to_change_is_named_when_no_recipe_fits(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = said(capsys, file, "--recipes", "end-to-end")
    peak = whole["peak_memory_bytes"]
    assert isinstance(peak, int)
    assert main(["plan", str(file), "--recipes", "end-to-end", "--memory", f"{peak - 2000}B"]) == 0
    out = capsys.readouterr().out
    assert "no recipe fits as it is; this does: training.micro_batch_size=3 (peak memory" in out


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--disk", "much", "--disk: 'much' is not a size"),
        ("--host-memory", "1XB", "--host-memory: '1XB' is not a size"),
        ("--flops-per-second", "0", "--flops-per-second: 0 is not a rate"),
        ("--device", "abacus", "--device: 'abacus' is not known"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    file: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    assert main(["plan", str(file), option, value]) == 2
    assert message in capsys.readouterr().err


# ---- validation


def forward_flops(tokens: int, context: int, stacks: int) -> float:
    """Of ``tokens`` through ``stacks`` Blocks and the head, by hand: two for each weight, and attention over all T²."""
    matrices = 4 * C * C + 3 * C * F
    return tokens * (stacks * (2 * matrices + 2 * 2 * context * C) + 2 * C * V)


def test_validation_is_planned_by_phase_with_its_own_figures() -> None:
    every, windows = 7, 5
    settings = config(f"training.evaluation={{every_steps: {every}, max_tokens: {windows * T + 3}}}")
    plan = planned(settings, replace(CPU, flops_per_second=1e9, rate="given"))
    assert [phase.steps for phase in plan.phases] == [20, 20, 20]
    # After 7, 14 and 20; after 21, 28, 35 and 40; after 42, 49, 56 and 60.
    assert [found.times for found in plan.validations] == [3, 4, 4]
    assert [found.tokens for found in plan.validations] == [n * windows * T for n in (3, 4, 4)]
    for stacks, found in enumerate(plan.validations, 1):
        assert found.flops == pytest.approx(forward_flops(found.tokens, T, stacks), rel=1e-9)
    scored = plan.to_dict()["validation"]
    assert scored["flops"] == sum(found.flops for found in plan.validations)
    assert scored["seconds"] == pytest.approx(scored["flops"] / 1e9)
    assert plan.seconds == pytest.approx((plan.flops + scored["flops"]) / 1e9)


def test_validation_needs_weights_moments_and_what_one_block_holds() -> None:
    plan = planned(config("training.strategy=end_to_end"))
    (cost,), (found,) = plan.costs, plan.validations
    beside = found.peak - cost.weights - cost.optimizer - 12 * 2**20
    states = B * T * C * 4
    widest = B * T * max(V, 3 * F) * 4
    assert 2 * states < beside < 8 * states + 2 * widest
    assert found.peak < cost.peak == plan.peak_memory_bytes, "a step keeps activations and gradients"


def test_where_scoring_needs_more_than_a_step_the_peak_is_its() -> None:
    plan = planned(config("training.strategy=end_to_end"))
    heavy = replace(plan.validations[0], peak=plan.peak_memory_bytes + 17)
    assert replace(plan, validations=[heavy]).peak_memory_bytes == heavy.peak
