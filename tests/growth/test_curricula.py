"""Phases as tables: no tensor is made here."""

import pytest
import yaml

from stackwise.config import StackWiseConfig
from stackwise.errors import UserError
from stackwise.growth.curricula import build_phases
from stackwise.growth.phases import Growth


def config(*overrides, n_stacks=3):
    return StackWiseConfig.from_dict(
        {
            "model": {"d_model": 26, "n_heads": 13, "architecture": {"n_stacks": n_stacks, "blocks_per_stack": 1}},
            "training": {"batch_size": 5, "seq_len": 7, "max_steps": 31},
        },
        overrides,
    )


def grown(*overrides, **kwargs):
    return build_phases(config("training.strategy=progressive", *overrides), **kwargs)


def table(phases):
    return [(p.name, p.stacks, p.trains, p.steps) for p in phases]


FROZEN, TRAINABLE = (f"training.progressive.trunk_strategy={kind}" for kind in ("frozen", "trainable"))
PREPEND = "training.progressive.building_mode=prepend"


def test_end_to_end_is_one_phase_that_trains_everything():
    everything = ("embedding", "stack.0", "stack.1", "stack.2", "norm", "head")
    (phase,) = build_phases(config("training.strategy=end_to_end"))
    assert table([phase]) == [("end-to-end", (0, 1, 2), everything, 31)]
    assert phase.growth == () and phase.stack is None


def test_a_tied_rack_has_no_head_to_train():
    (phase,) = build_phases(config("training.strategy=end_to_end", "model.tie_embeddings=true"))
    assert phase.trains == ("embedding", "stack.0", "stack.1", "stack.2", "norm")


def test_end_to_end_keeps_the_order_of_the_stacks_that_are_present():
    (phase,) = build_phases(config("training.strategy=end_to_end"), present=(3, 0, 1))
    assert phase.stacks == (3, 0, 1)
    assert phase.trains == ("embedding", "stack.3", "stack.0", "stack.1", "norm", "head")


def test_append_on_a_frozen_trunk_trains_the_embedding_beside_the_first_stack_only():
    assert table(grown(FROZEN, "training.max_steps=30")) == [
        ("stack 0", (0,), ("embedding", "stack.0", "norm", "head"), 10),
        ("stack 1", (0, 1), ("stack.1", "norm", "head"), 10),
        ("stack 2", (0, 1, 2), ("stack.2", "norm", "head"), 10),
    ]


def test_prepend_on_a_frozen_trunk_trains_the_embedding_in_every_phase():
    assert table(grown(FROZEN, PREPEND, "training.max_steps=30")) == [
        ("stack 0", (0,), ("embedding", "stack.0", "norm", "head"), 10),
        ("stack 1", (1, 0), ("embedding", "stack.1", "norm", "head"), 10),
        ("stack 2", (2, 1, 0), ("embedding", "stack.2", "norm", "head"), 10),
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_a_trainable_trunk_trains_with_what_is_added(tied):
    head = () if tied else ("head",)
    phases = grown(TRAINABLE, PREPEND, f"model.tie_embeddings={str(tied).lower()}")
    assert [p.trains for p in phases] == [
        ("embedding", "stack.0", "norm", *head),
        ("embedding", "stack.1", "stack.0", "norm", *head),
        ("embedding", "stack.2", "stack.1", "stack.0", "norm", *head),
    ]


@pytest.mark.parametrize("mode, sources", [("append", [None, 0, 1]), ("prepend", [None, 0, 1])])
def test_a_copied_stack_comes_from_its_neighbour(mode, sources):
    phases = grown(f"training.progressive.building_mode={mode}", "training.progressive.new_stack_init=copy")
    assert [p.growth for p in phases] == [
        (Growth(0, "random", None),),
        (Growth(1, "copy", sources[1]),),
        (Growth(2, "copy", sources[2]),),
    ]
    assert [p.stack for p in phases] == [0, 1, 2]


@pytest.mark.parametrize("mode, source", [("append", 0), ("prepend", 4)])
def test_beside_a_given_trunk_the_neighbour_depends_on_the_side(mode, source):
    phases = grown(
        f"training.progressive.building_mode={mode}",
        "training.progressive.target_stacks=6",
        present=(4, 2, 0),
    )
    assert [p.growth for p in phases] == [(Growth(5, "copy", source),)]
    assert phases[0].stacks == ((4, 2, 0, 5) if mode == "append" else (5, 4, 2, 0))


@pytest.mark.parametrize("init", ["random", "identity"])
def test_the_first_stack_is_random_and_the_others_as_asked(init):
    phases = grown(f"training.progressive.new_stack_init={init}")
    assert [p.growth for p in phases] == [(Growth(0, "random"),), (Growth(1, init),), (Growth(2, init),)]


def expanded(*overrides, present=(0, 1, 2, 3), target=6):
    return grown(
        "training.progressive.building_mode=interleave",
        "model.initial=somewhere",
        "training.progressive.new_stack_init=identity",
        f"training.progressive.target_stacks={target}",
        *overrides,
        present=present,
    )


@pytest.mark.parametrize(
    "present, target, order",
    [
        ((0, 1, 2, 3), 6, (0, 1, 4, 2, 3, 5)),
        ((0, 1), 5, (0, 2, 1, 3, 4)),
        ((0, 1, 2), 6, (0, 3, 1, 4, 2, 5)),
        ((3, 0, 1, 2), 5, (3, 0, 1, 2, 4)),
    ],
)
def test_interleaved_stacks_join_at_once_and_spread_evenly(present, target, order):
    (phase,) = expanded(present=present, target=target)
    assert phase.stacks == order and phase.steps == 31
    assert phase.growth == tuple(Growth(k, "identity") for k in range(len(present), target))


def test_block_expansion_trains_the_joined_stacks_beside_a_frozen_trunk():
    (phase,) = expanded(FROZEN)
    assert phase.trains == ("stack.4", "stack.5", "norm", "head")
    (phase,) = expanded(FROZEN, "model.tie_embeddings=true")
    assert phase.trains == ("stack.4", "stack.5", "norm")
    (phase,) = expanded("training.progressive.new_stack_init=copy")
    assert phase.growth == (Growth(4, "copy", 1), Growth(5, "copy", 3))


def test_a_joint_phase_takes_its_share_and_trains_everything():
    phases = grown(FROZEN, "training.progressive.joint_fraction=0.4", "training.max_steps=50")
    assert [p.steps for p in phases] == [10, 10, 10, 20]
    joint = phases[-1]
    assert joint.name == "joint" and joint.growth == () and joint.stack is None
    assert joint.trains == ("embedding", "stack.0", "stack.1", "stack.2", "norm", "head")


def test_one_stack_has_no_joint_phase():
    phases = build_phases(config("training.progressive.joint_fraction=0.4", n_stacks=1))
    assert [(p.name, p.steps) for p in phases] == [("stack 0", 31)]


def test_phase_fractions_share_the_budget():
    phases = grown(
        "training.progressive.phase_fractions=[0.1, 0.2, 0.3]",
        "training.progressive.joint_fraction=0.4",
        "training.max_steps=70",
    )
    assert [p.steps for p in phases] == [7, 14, 21, 28]


def test_the_shares_of_the_stacks_that_are_present_go_to_the_others():
    fractions = "training.progressive.phase_fractions=[0.5, 0.1, 0.4]"
    assert [p.steps for p in grown(fractions, "training.max_steps=50", present=(0,))] == [10, 40]


def test_stacks_to_grow_without_a_share_are_the_users_error():
    with pytest.raises(UserError, match="phase_fractions"):
        grown("training.progressive.phase_fractions=[1.0, 0.0, 0.0]", present=(0,))


def test_a_rack_that_is_already_large_enough_is_the_users_error():
    with pytest.raises(UserError, match="target_stacks: 3"):
        grown(present=(0, 1, 2))


def test_a_budget_in_steps_is_used_up_whatever_the_shares():
    for steps in range(3, 40):
        phases = grown(f"training.max_steps={steps}")
        assert sum(p.steps for p in phases) == steps
        assert max(p.steps for p in phases) - min(p.steps for p in phases) <= 1


@pytest.mark.parametrize("tokens, steps", [(35 * 3, 3), (35 * 31 + 34, 31), (35 * 32, 32)])
def test_a_budget_in_tokens_gives_its_whole_steps(tokens, steps):
    phases = grown(f"training.max_tokens={tokens}")
    assert sum(p.steps for p in phases) == steps


@pytest.mark.parametrize("budget", [61.0, 97.3, 211.0, 1009.5])
@pytest.mark.parametrize("joint", [0.0, 0.3])
def test_a_budget_in_flops_is_never_exceeded_and_missed_by_less_than_a_step(budget, joint):
    costs = {"stack 0": 2.0, "stack 1": 3.0, "stack 2": 5.0, "joint": 7.0}
    phases = grown(
        f"training.max_flops={budget}",
        f"training.progressive.joint_fraction={joint}",
        step_flops=lambda phase: costs[phase.name],
    )
    spent = sum(p.steps * costs[p.name] for p in phases)
    assert budget - costs[phases[-1].name] < spent <= budget
    due = 0.0
    for i, phase in enumerate(phases[:-1]):  # each phase ends within a step of where its share does
        due += (1 - joint) / 3 * budget
        used = sum(p.steps * costs[p.name] for p in phases[: i + 1])
        assert due - costs[phase.name] < used <= due + 1e-6


@pytest.mark.parametrize("limit", ["training.max_steps=2", "training.max_tokens=104", "training.max_flops=8.9"])
def test_a_budget_too_small_for_some_phase_is_the_users_error(limit):
    with pytest.raises(UserError, match=f"gives the phase 'stack .' no step; raise {limit.split('=')[0]}"):
        grown(limit, step_flops=lambda phase: 3.0)


def test_optimizer_state_is_that_of_the_config():
    phases = grown("training.progressive.optimizer_state=reset", "training.progressive.joint_fraction=0.3")
    assert {p.optimizer_state for p in phases} == {"reset"}


PHASES = "training.strategy=phases"
ALL = ("embedding", "stack.0", "stack.1", "stack.2", "norm", "head")


def listed(*entries, **kwargs):
    more = kwargs.pop("more", ())
    text = "[" + ", ".join(entries) + "]"
    # Both at once: a list without the strategy, or the strategy without a list, is refused.
    data = config(**kwargs).to_dict()
    data["training"] |= {"strategy": "phases", "phases": yaml.safe_load(text)}
    return build_phases(StackWiseConfig.from_dict(data, more))


def test_scopes_of_end_to_end_train_one_unit_after_another_in_a_whole_rack():
    stackwise = build_phases(config("training.strategy=end_to_end", "training.end_to_end_scope=stackwise"))
    assert table(stackwise) == [
        ("sweep 1, stack 0", (0, 1, 2), ("embedding", "stack.0", "norm", "head"), 10),
        ("sweep 1, stack 1", (0, 1, 2), ("stack.1", "norm", "head"), 10),
        ("sweep 1, stack 2", (0, 1, 2), ("stack.2", "norm", "head"), 11),
    ]
    blocks = "model.architecture.blocks_per_stack=[1,2,1]"
    blockwise = build_phases(config("training.strategy=end_to_end", "training.end_to_end_scope=blockwise", blocks))
    assert [p.trains[-3] for p in blockwise] == [
        "stack.0/blocks.0", "stack.1/blocks.0", "stack.1/blocks.1", "stack.2/blocks.0",
    ]  # fmt: skip
    assert [p.trained_stacks for p in blockwise] == [{0}, {1}, {1}, {2}]


def test_a_sweep_over_one_stack_trains_what_end_to_end_does():
    whole = build_phases(config("training.strategy=end_to_end", n_stacks=1))
    for cycles in (1, 3):
        swept = listed("{add: 1, share: 0.1}", f"{{sweep: left_to_right, cycles: {cycles}}}", n_stacks=1)
        assert {p.trains for p in swept} == {whole[0].trains}


def test_sweeps_go_both_ways_in_groups_and_cycles():
    phases = listed("{add: rest, share: 0.4}", "{sweep: right_to_left, cycles: 2, group: 2, share: 0.6}")
    assert [(p.name, p.trains) for p in phases[1:3]] == [
        ("sweep 1, stack 2", ("stack.2", "norm", "head")),
        ("sweep 1, stacks 0, 1", ("embedding", "stack.0", "stack.1", "norm", "head")),
    ]
    assert [p.name for p in phases[3:]] == ["sweep 2, stack 2", "sweep 2, stacks 0, 1"]


def test_late_expansion_middle_insertion_and_unfreezing():
    late = listed("{add: 1, share: 0.8}", "{add: rest, init: copy}")
    assert [(p.stacks, p.steps) for p in late] == [((0,), 24), ((0, 1, 2), 7)]
    assert late[1].growth == (Growth(1, "copy", 0), Growth(2, "copy", 0)) and late[1].trains == ALL
    middle = listed("{add: 2}", "{add: each, at: middle}", n_stacks=5)
    assert [p.stacks for p in middle] == [(0, 1), (0, 2, 1), (0, 2, 3, 1), (0, 2, 4, 3, 1)]
    assert [p.growth[0].source for p in middle[1:]] == [0, 2, 2]
    thaw = listed("{add: rest}", "{unfreeze: right_to_left}")[1:]
    assert [p.trains[:-2] for p in thaw] == [("stack.2",), ("stack.1", "stack.2"), ALL[:-2]]


def test_chosen_stacks_train_together_in_the_order_of_the_rack():
    phases = listed("{add: rest}", "{trains: [2, 0]}", "{trains: [1, embedding]}", "{trains: all}")
    assert [p.trains for p in phases[1:]] == [
        ("stack.0", "stack.2", "norm", "head"), ("embedding", "stack.1", "norm", "head"), ALL,
    ]  # fmt: skip
    assert phases[-1].name == "joint"


def test_a_trunk_is_stored_while_it_is_frozen_and_in_full_once_it_trains():
    more = ("training.progressive.trunk_precision=nf4", "training.progressive.trunk_strategy=frozen")
    phases = listed("{add: each, share: 0.6}", "{trains: [1]}", "{trains: all}", more=more)
    assert [p.precision for p in phases] == [(), ((0, "nf4"),), ((0, "nf4"), (1, "nf4")), ((0, "nf4"),), ()]


def test_each_stack_gets_its_stack_adapter_when_made_and_the_progressive_one_as_trunk():
    qlora = "{enabled: true, rank: 6, alpha: 3.0, strategy: progressive, rank_pattern: decreasing, "
    qlora += "alpha_pattern: increasing, progressive_enabled: true, progressive_rank: 2, progressive_alpha: 5.0}"
    phases = grown(
        f"training.qlora={qlora}",
        "training.progressive.trunk_strategy=qlora",
        "training.progressive.joint_fraction=0.25",
        "training.max_steps=40",
    )
    found = [[(a.stack, a.kind, a.rank, a.alpha, a.trains) for a in p.adapters] for p in phases]
    assert found[0] == [(0, "stack", 6, 1.0, True)]
    assert found[1] == [(0, "stack", 6, 1.0, True), (0, "progressive", 2, 5.0, True), (1, "stack", 4, 2.0, True)]
    last = [
        (0, "stack", 6, 1.0, True), (0, "progressive", 2, 5.0, True),
        (1, "stack", 4, 2.0, True), (1, "progressive", 2, 5.0, True), (2, "stack", 2, 3.0, True),
    ]  # fmt: skip
    assert found[2] == last and found[3] == last
    frozen = grown(f"training.qlora={qlora}", FROZEN)
    assert [[a.trains for a in p.adapters] for p in frozen] == [[True], [False, False, True], [False] * 4 + [True]]


def test_a_stack_stored_in_codes_leaves_training_to_its_adapter():
    phases = grown("training.qlora.enabled=true", FROZEN, "training.progressive.new_stack_precision=int8")
    assert [p.trains for p in phases] == [("embedding", "norm", "head"), ("norm", "head"), ("norm", "head")]
    assert phases[1].precision == ((1, "int8"),) and [a.trains for a in phases[1].adapters] == [False, True]


def test_a_cached_run_shares_its_batches_and_enters_before_the_new_stack():
    cached = (FROZEN, "training.progressive.cache_activations=true")
    phases = grown(*cached, "training.progressive.phase_fractions=[0.2,0.5,0.3]", "training.max_steps=20")
    assert [(p.cached, p.enters, p.examples) for p in phases] == [
        (False, 0, (0, 10)), (True, 1, (0, 10)), (True, 2, (0, 10)),
    ]  # fmt: skip
    record = 5 * 7 * 26 * 2 + 4
    few = grown(*cached, f"training.cache.max_bytes={8 * record + 3000}")
    assert 1 <= few[0].examples[1] <= 8
    with pytest.raises(UserError, match=r"training\.cache\.max_bytes: 1000 is too small for one batch"):
        grown(*cached, "training.cache.max_bytes=1000")


@pytest.mark.parametrize(
    "entries, message",
    [
        (["{trains: all}"], r"training\.phases\[0\]: the Rack has no Stack yet"),
        (["{add: 4}"], r"training\.phases\[0\]\.add: 4 is too many: only 3 of the 3 Stacks are left to add"),
        (
            ["{add: rest}", "{add: each}"],
            r"training\.phases\[1\]: no Stack is left to add, because the Rack already has 3 of 3 Stacks",
        ),
        (
            ["{add: 2}", "{trains: [2]}"],
            r"training\.phases\[1\]\.trains: the Rack has no Stack 2 in this phase; it has",
        ),
        (["{add: 2, at: between}"], r"training\.phases\[0\]\.at: 'between' requires existing Stacks"),
        (
            ["{add: rest, share: 1.0}", "{trains: all}"],
            r"training\.phases\[1\]\.share: null is an equal part of what the other entries leave",
        ),
    ],
)
def test_entries_that_cannot_be_are_refused_with_their_number(entries, message):
    with pytest.raises(UserError, match=message):
        listed(*entries)


@pytest.mark.parametrize(
    "entries",
    [
        ("{add: 2}", "{sweep: left_to_right}", "{add: 1}", "{sweep: left_to_right}"),
        ("{add: rest}", "{sweep: left_to_right, group: 2}", "{sweep: right_to_left}", "{sweep: left_to_right}"),
        ("{add: rest}", "{sweep: left_to_right, unit: block}", "{sweep: left_to_right, cycles: 2}"),
        ("{add: rest}", "{unfreeze: right_to_left}", "{unfreeze: left_to_right}", "{unfreeze: right_to_left}"),
    ],
)
def test_names_are_unique_however_often_a_part_returns(entries):
    names = [p.name for p in listed(*entries)]
    assert len(set(names)) == len(names)


def test_sweeps_are_numbered_through_the_run():
    phases = listed("{add: 2}", "{sweep: left_to_right, cycles: 2}", "{add: 1}", "{sweep: right_to_left}")
    assert [p.name for p in phases if p.name.startswith("sweep")] == [
        "sweep 1, stack 0", "sweep 1, stack 1", "sweep 2, stack 0", "sweep 2, stack 1",
        "sweep 3, stack 2", "sweep 3, stack 1", "sweep 3, stack 0",
    ]  # fmt: skip


def test_patterns_that_count_the_stacks_refuse_a_rack_with_more():
    pattern = "training.qlora={enabled: true, strategy: variable, rank_pattern: [1, 2, 3]}"
    with pytest.raises(
        UserError,
        match=r"training\.progressive\.target_stacks: 3 is too low: the Rack has a Stack with id 3, .* set at least 4$",
    ):
        build_phases(config("training.strategy=end_to_end", pattern), present=(3, 0, 1))
    same = build_phases(config("training.strategy=end_to_end", "training.qlora.enabled=true"), present=(3, 0, 1))
    assert [a.rank for a in same[0].adapters] == [16, 16, 16]
