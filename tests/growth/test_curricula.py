"""Phases as tables: no tensor is made here."""

import pytest

from stackwise.config import StackWiseConfig
from stackwise.errors import UserError
from stackwise.growth.curricula import build_phases
from stackwise.growth.phases import Growth


def config(*overrides, n_stacks=3):
    base = StackWiseConfig.from_dict(
        {
            "model": {"d_model": 26, "n_heads": 13, "architecture": {"n_stacks": n_stacks, "blocks_per_stack": 1}},
            "training": {"batch_size": 5, "seq_len": 7, "max_steps": 31},
        }
    )
    return base.override(overrides)


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
