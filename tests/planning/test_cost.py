from functools import cache
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from stackwise.config import StackWiseConfig
from stackwise.growth.curricula import build_phases
from stackwise.growth.phases import Adapter, Phase, Schedule
from stackwise.growth.preparation import prepare_phase, set_trainable
from stackwise.kinds import STORAGES
from stackwise.model.architecture import Stacks, create_rack_from_config, create_simple_rack
from stackwise.model.reading import Reading
from stackwise.objectives import CausalObjective, Example
from stackwise.ops.precision import autocast
from stackwise.planning.cost import READ_AHEAD, RUNTIME_BYTES, PhaseCoster
from stackwise.planning.dry_step import Ledger, measure_segments
from stackwise.planning.plan import plan_phases, plan_run
from stackwise.training.offload import Offload

V, C, F, H, B, T = 37, 26, 19, 13, 5, 11


def rack(trains=None, checkpointed=False, n_stacks=3, **settings):
    made = create_simple_rack(n_stacks, 1, C, F, H, V, **settings)
    made.checkpoint_activations(checkpointed)
    set_trainable(made, made.parts() if trains is None else trains)
    return made


def fake_cost(trains=None, checkpointed=False, micro_batches=1, n_stacks=3, **settings):
    with FakeTensorMode():
        model = rack(trains, checkpointed, n_stacks, **settings)
        return measure_segments(model, micro_batches, B, T, None, 0, None, False)[0]


def real_step(model):
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))
    CausalObjective().loss(model, Example(Reading(ids), ids), 1.0).backward()


def attention_flops(query, *args, **kwargs):
    b, h, t, d = query
    return 2 * 2 * b * h * t * t * d  # two products of T × T × head size


# What ``FlopCounterMode`` counts for attention on a CPU: torch knows the kernels of accelerators only.
KERNELS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, *args, **kwargs: attention_flops(query) * 5 // 2
    ),
}

CASES = {
    "end-to-end": (None, False),
    "frozen trunk": (["stack.2", "norm", "head"], False),
    "prepended": (["embedding", "stack.0", "norm", "head"], False),
    "checkpointed": (None, True),
    "frozen and checkpointed": (["stack.2", "norm", "head"], True),
}


@pytest.mark.parametrize("trains, checkpointed", CASES.values(), ids=CASES)
def test_planned_flops_are_those_that_torch_counts_on_the_real_step(trains, checkpointed):
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        real_step(rack(trains, checkpointed))
    assert fake_cost(trains, checkpointed).flops == counter.get_total_flops() > 0


BLOCK = 4 * C * C + 3 * C * F  # q, k, v, o; gate, up, down
HEAD = V * C
ATTENTION = 2 * 2 * B * T * T * C  # q kᵀ and the weights times v, over all pairs


def test_a_trained_weight_costs_six_flops_a_token_and_attention_seven_halves_of_its_forward():
    tokens = B * T
    first = fake_cost(n_stacks=1).flops
    both = fake_cost(n_stacks=2).flops
    # Backward of attention recomputes q kᵀ: five products beside the forward's two.
    assert both - first == 6 * BLOCK * tokens + 3.5 * ATTENTION
    assert first == 6 * (BLOCK + HEAD) * tokens + 3.5 * ATTENTION


def test_a_frozen_weight_below_what_trains_costs_two_flops_a_token():
    tokens = B * T
    frozen = fake_cost(["stack.2", "norm", "head"]).flops
    # In the new Stack all gradients are needed, its first norm's too.
    assert frozen == (2 * 2 * BLOCK + 6 * (BLOCK + HEAD)) * tokens + (2 + 3.5) * ATTENTION


def test_a_frozen_weight_above_what_trains_costs_four_flops_a_token():
    tokens = B * T
    prepended = fake_cost(["embedding", "stack.0", "norm", "head"]).flops
    assert prepended == (2 * 4 * BLOCK + 6 * (BLOCK + HEAD)) * tokens + 3 * 3.5 * ATTENTION


def test_checkpointing_adds_a_forward_pass_of_the_blocks_that_train():
    extra = fake_cost(None, True).flops - fake_cost().flops
    whole = 3 * (2 * BLOCK * B * T + ATTENTION)
    last_product = 2 * C * F * B * T  # the recomputation stops at the last tensor that the backward pass needs
    assert extra == whole - 3 * last_product
    above = ["stack.2", "norm", "head"]
    assert fake_cost(above, True).flops - fake_cost(above).flops == extra / 3


def test_micro_batches_repeat_the_flops_and_hold_the_gradients():
    one, three = fake_cost(), fake_cost(micro_batches=3)
    assert three.flops == 3 * one.flops
    assert three.peak - one.peak == one.gradients
    assert three.activations == one.activations


@pytest.mark.parametrize("trains, checkpointed", CASES.values(), ids=CASES)
def test_planned_memory_is_what_the_real_step_holds(trains, checkpointed):
    """The same step run for real, on tensors with data, under the same ledger."""
    model = rack(trains, checkpointed)
    ids = torch.zeros(B, T, dtype=torch.int64)
    ledger = Ledger()
    for tensor in (*model.parameters(), ids):
        ledger.ignore(tensor)
    with ledger:
        CausalObjective().loss(model, Example(Reading(ids), ids), 1.0).backward()
    cost = fake_cost(trains, checkpointed)
    assert cost.peak - cost.weights - cost.optimizer == pytest.approx(ledger.peak, rel=0.02)
    assert ledger.live == cost.gradients  # nothing else is left
    for parameter in model.parameters():
        parameter.grad = None
    assert ledger.live == 0


def test_weights_gradients_and_optimizer_are_exact():
    cost = fake_cost(["stack.2", "norm", "head"])
    stack = BLOCK + 2 * C
    trained = stack + C + V * C
    assert cost.parameters == 2 * V * C + 3 * stack + C
    assert cost.trainable_parameters == trained
    assert cost.weights == 4 * cost.parameters
    assert cost.gradients == 4 * trained
    assert cost.optimizer == 8 * trained
    assert cost.logits >= 4 * V * B * T


def test_a_tied_head_is_counted_once():
    cost = fake_cost(tie_embeddings=True)
    assert cost.parameters == V * C + 3 * (BLOCK + 2 * C) + C == cost.trainable_parameters


def test_the_ledger_follows_storages_not_views_and_sees_releases():
    ledger = Ledger()
    with ledger:
        a = torch.zeros(7, 11)
        view = a.t()[2:]
        assert ledger.live == 4 * 77
        b = a + 1
        assert ledger.live == 8 * 77
        del a
        assert ledger.live == 8 * 77  # the view holds it
        del view
        assert ledger.live == 4 * 77
        b.add_(1)
        assert (ledger.live, ledger.peak) == (4 * 77, 8 * 77)
        product = b @ torch.zeros(11, 5)
        assert ledger.flops.total == 2 * 7 * 11 * 5
    del b, product
    assert ledger.live == 0


@pytest.mark.parametrize("n_kv_heads", [1, H])
def test_attention_is_counted_over_all_pairs_whether_keys_are_shared_or_not(n_kv_heads):
    def flops(seq_len):
        with FakeTensorMode():
            model = rack(n_stacks=1, n_kv_heads=n_kv_heads)
            return measure_segments(model, 1, B, seq_len, None, 0, None, False)[0].flops

    # Twice the tokens: everything else doubles.
    assert flops(2 * T) - 2 * flops(T) == 3.5 * (4 - 2) * ATTENTION


# ---- phases


TRUNK, NEW = (0, 1), 2
TRAINS = (f"stack.{NEW}", "norm", "head")


def phase_of(order, *trains, **fields):
    return Phase("phase", order, trains, 1, Schedule(0, "linear", 1, 1, 1.0), "clm", **fields)


def stored(order, precision, **fields):
    return phase_of(order, *TRAINS, precision=tuple((k, precision) for k in TRUNK), **fields)


LORA = tuple(Adapter(k, kind, 2 + k, 3.0) for k in TRUNK for kind in ("stack", "progressive"))
STREAMED = ("training.progressive.trunk_strategy=frozen", "training.offload=disk")
APPENDED, PREPENDED = (*TRUNK, NEW), (NEW, *TRUNK)
PHASES = {
    "frozen prefix": (phase_of(APPENDED, *TRAINS), ()),
    "frozen prefix in micro-batches": (phase_of(APPENDED, *TRAINS), (f"training.micro_batch_size={B}",)),
    "cached": (phase_of(APPENDED, *TRAINS, cached=True, enters=2, examples=(0, 3)), ()),
    "recomputed boundary": (phase_of(APPENDED, *TRAINS, enters=2, examples=(0, 3)), ()),
    "adapters": (phase_of(APPENDED, *TRAINS, adapters=LORA), ()),
    "adapters on four bits": (stored(APPENDED, "nf4", adapters=LORA), ()),
    "adapters alone": (phase_of(APPENDED, adapters=LORA[2:], precision=((0, "int8"), (2, "nvfp4"))), ()),
    "one Block": (phase_of(APPENDED, "stack.1/blocks.0", "norm"), ("model.architecture.blocks_per_stack=2",)),
    "bfloat16 that trains": (phase_of(APPENDED, *TRAINS, precision=((NEW, "bfloat16"),)), ()),
    **{f"above in {precision}": (stored(PREPENDED, precision), ()) for precision in STORAGES},
    "above, streamed": (phase_of(PREPENDED, *TRAINS), STREAMED),
    "above, streamed in four bits": (stored(PREPENDED, "nf4"), STREAMED),
    "adapters on what is streamed": (stored(APPENDED, "nvfp4", adapters=LORA), STREAMED),
    "checkpointed": (
        stored(PREPENDED, "int8", adapters=LORA),
        ("training.activation_checkpointing=true",),
    ),
}
WIDE = (
    "model.d_model=78", "model.n_heads=13", "model.d_ff=95", "model.architecture={n_stacks: 3, blocks_per_stack: 1}",
)  # fmt: skip


def real_phase(phase, settings, compute_dtype, mode):
    """A step of ``phase`` on tensors with data, under ``mode``, and the Rack that took it."""
    model = create_rack_from_config(settings, n_stacks=3, vocab_size=V)
    model.stacks = Stacks(sorted(model.stacks, key=lambda stack: phase.stacks.index(stack.stack_id)))
    prepare_phase(model, phase, settings)
    model.checkpoint_activations(settings.training.activation_checkpointing)
    offload, away = Offload(torch.device("cpu")), {}
    for stack in model.stacks:
        if stack.stack_id in phase.offloaded(settings.training.offload):
            kept = away[stack.stack_id] = {name: t.clone() for name, t in stack.own_tensors().items()}
            offload.send(stack, lambda kept=kept: {name: t.clone() for name, t in kept.items()})
    training = settings.training
    micro = training.micro_batch_size or training.batch_size
    ids = torch.randint(0, V, (micro, T), generator=torch.Generator().manual_seed(0))
    boundary = torch.randn(micro, T, model.d_model) if phase.cached else None
    if isinstance(mode, Ledger):
        for tensor in (ids, *(t for _, _, t in model.part_tensors()), *([] if boundary is None else [boundary])):
            mode.ignore(tensor)
    with mode, autocast(torch.device("cpu"), compute_dtype):
        if phase.enters and not phase.cached:
            with torch.no_grad():
                boundary = model(Reading(ids, stop=phase.enters, finished=False))
        reading = Reading(ids) if boundary is None else Reading(boundary=boundary, start=phase.enters)
        for _ in range(training.batch_size // micro):  # gradients of the one before are there in the last
            CausalObjective().loss(model, Example(reading, ids), 1.0).backward()
    offload.close()
    return model, away


@cache
def planned_phase(name, compute_dtype=None):
    """The phase called ``name``, its settings, and its cost."""
    phase, overrides = PHASES[name]
    settings = config(*WIDE, *overrides)
    return phase, settings, PhaseCoster(settings, V, compute_dtype)(phase)


@pytest.mark.parametrize(
    "name, compute_dtype",
    [(name, None) for name in PHASES]
    + [(name, torch.bfloat16) for name in ("adapters on four bits", "above in full", "above in int8")],
)
def test_the_flops_of_a_phase_are_those_that_torch_counts_on_its_real_step(name, compute_dtype):
    phase, settings, cost = planned_phase(name, compute_dtype)
    counter = FlopCounterMode(display=False, custom_mapping=KERNELS)
    real_phase(phase, settings, compute_dtype, counter)
    assert cost.flops - cost.kinds.dequantisation == counter.get_total_flops() > 0


@pytest.mark.parametrize("name", PHASES)
def test_the_peak_of_a_phase_is_what_its_real_step_holds(name):
    phase, settings, cost = planned_phase(name)
    ledger = Ledger()
    model, away = real_phase(phase, settings, None, ledger)
    resident = sum(t.numel() * t.element_size() for _, _, t in model.part_tensors() if not t.is_meta)
    moments = sum(8 * p.numel() for p in model.parameters() if p.requires_grad)
    sizes = [sum(t.numel() * t.element_size() for t in tensors.values()) for tensors in away.values()]
    batch = 4 * settings.training.batch_size * T * model.d_model
    beside = (1 + READ_AHEAD) * batch if phase.cached else max(sizes, default=0)  # what is read ahead
    assert cost.weights == resident and cost.waiting == sum(sizes)
    held = resident + moments + ledger.peak + beside
    # The plan keeps the state that leaves a frozen prefix to the end; the step lets it go when nothing needs it.
    assert 0.999 * held <= cost.peak - RUNTIME_BYTES <= 1.001 * held + (0 if phase.cached else batch)
    assert cost.peak - RUNTIME_BYTES == pytest.approx(held, rel=0.05)


def config(*overrides):
    return StackWiseConfig.from_dict(
        {
            "model": {
                "vocab_size": V,
                "d_model": C,
                "n_heads": H,
                "d_ff": F,
                "architecture": {"n_stacks": 5, "blocks_per_stack": 1},
            },
            "training": {"batch_size": 2 * B, "seq_len": T, "max_steps": 50, "device": "cpu"},
        },
        overrides,
    )


def peaks(*overrides):
    return [cost.peak - RUNTIME_BYTES for cost in plan_phases(config(*overrides), V).costs]


def test_growing_on_a_frozen_trunk_needs_less_memory_than_end_to_end():
    (end_to_end,) = peaks("training.strategy=end_to_end")
    frozen = peaks("training.progressive.trunk_strategy=frozen")
    trainable = peaks("training.progressive.trunk_strategy=trainable")
    checkpointed = peaks("training.strategy=end_to_end", "training.activation_checkpointing=true")
    assert max(frozen) < 0.5 * end_to_end
    assert trainable == sorted(trainable) and trainable[-1] == end_to_end
    assert checkpointed[0] < 0.6 * end_to_end


def test_the_cost_of_a_phase_is_that_of_its_micro_batches():
    whole, halves = (
        PhaseCoster(config("training.strategy=end_to_end", *more), V, None)(
            build_phases(config("training.strategy=end_to_end"))[0]
        )
        for more in ((), (f"training.micro_batch_size={B}",))
    )
    assert halves.flops == pytest.approx(whole.flops)
    assert whole.activations == pytest.approx(2 * halves.activations, rel=0.02)


def test_a_given_rack_is_costed_as_it_is_and_left_untouched():
    wider = create_rack_from_config(config("model.d_ff=23"), n_stacks=2)
    set_trainable(wider, ["norm"])
    before = {name: p.detach().clone() for name, p in wider.named_parameters()}
    flags = {name: p.requires_grad for name, p in wider.named_parameters()}
    modes = [m.training for m in wider.modules()]
    settings = config("training.progressive.target_stacks=3", "training.activation_checkpointing=true")
    (phase,) = build_phases(settings, present=(0, 1))
    cost = PhaseCoster(settings, V, None, wider)(phase)
    stacks = 2 * (4 * C * C + 3 * C * 23 + 2 * C) + BLOCK + 2 * C  # those of the Rack, and a new one of the config
    assert cost.parameters == 2 * V * C + C + stacks
    assert [stack.stack_id for stack in wider.stacks] == [0, 1]
    assert all(torch.equal(p, before[name]) for name, p in wider.named_parameters())
    assert {name: p.requires_grad for name, p in wider.named_parameters()} == flags
    assert [m.training for m in wider.modules()] == modes
    assert not any(stack.activation_checkpointing for stack in wider.stacks)
    assert all(type(p) is torch.nn.Parameter and p.grad is None for p in wider.parameters())


def test_a_plan_adds_up_its_phases():
    planned = plan_phases(config("training.progressive.trunk_strategy=frozen"), V)
    limit = planned.costs[-1].peak
    settings = config("training.progressive.trunk_strategy=frozen")
    plan = plan_run(settings, Path(), vocab_size=V, limit=limit)
    table = plan.to_dict()
    assert table["flops"] == sum(row["flops"] for row in table["phases"])
    assert [row["flops"] for row in table["phases"]] == [10 * cost.flops for cost in planned.costs]
    assert [row["tokens"] for row in table["phases"]] == [10 * 2 * B * T] * 5
    peak = max(*(cost.peak for cost in planned.costs), *(found.peak for found in plan.validations))
    assert table["peak_memory_bytes"] == peak
    assert table["fits"] == (peak <= limit)


def test_a_budget_in_flops_counts_what_the_phases_cost():
    budget = 2e9
    planned = plan_phases(config(f"training.max_flops={budget}", "training.progressive.trunk_strategy=frozen"), V)
    spent = sum(p.steps * c.flops for p, c in zip(planned.phases, planned.costs))
    assert budget - planned.costs[-1].flops < spent <= budget
