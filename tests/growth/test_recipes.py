"""Recipes as tables: no tensor is made here."""

from pathlib import Path

import pytest
import yaml

from stackwise.cli.train import read_config
from stackwise.config import StackWiseConfig
from stackwise.errors import ConfigError, UserError
from stackwise.growth.curricula import build_phases
from stackwise.growth.recipes import RECIPES, apply_recipe, recipe_names


def config(n_stacks=3, blocks=2, *overrides):
    return StackWiseConfig.from_dict(
        {
            "model": {"d_model": 26, "n_heads": 13, "architecture": {"n_stacks": n_stacks, "blocks_per_stack": blocks}},
            "training": {"batch_size": 5, "seq_len": 7, "max_steps": 97},
        },
        overrides,
    )


@pytest.mark.parametrize("n_stacks", [2, 3, 5])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_every_stack_and_uses_the_budget_up(name, n_stacks):
    phases = build_phases(apply_recipe(config(n_stacks), name))
    parts = {part for phase in phases for part in phase.trains}
    blocks = {f"stack.{k}/blocks.{i}" for k in range(n_stacks) for i in range(2)}
    assert parts >= {f"stack.{k}" for k in range(n_stacks)} or parts >= blocks
    assert parts >= {"embedding", "norm", "head"}
    assert all({"norm", "head"} <= set(phase.trains) for phase in phases)
    assert sum(phase.steps for phase in phases) == 97
    assert len({phase.name for phase in phases}) == len(phases)
    assert set(phases[-1].stacks) == set(range(n_stacks))
    present = set() if phases[0].growth else set(phases[0].stacks)
    for phase in phases:
        present |= {new.stack for new in phase.growth}
        assert present == set(phase.stacks)
        assert not phase.trained_stacks & {k for k, precision in phase.precision if precision != "bfloat16"}
        assert {adapter.stack for adapter in phase.adapters} <= present


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_leaves_sizes_data_budget_and_optimizer_to_the_config(name):
    before = config(3, 2, "training.optimizer.lr=0.0123", "training.seed=7", "data.tokenizer.kind=bytes")
    after = apply_recipe(before, name)
    assert after.model == before.model and after.data == before.data
    assert after.training.optimizer == before.training.optimizer and after.training.schedule == before.training.schedule
    assert after.training.budget == before.training.budget and after.training.seed == 7


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_decides_alone_what_is_its_own(name):
    """What another recipe set leaves no trace."""
    for other in ("append-qlora", "fusion", "blockwise", "append-cached"):
        assert apply_recipe(apply_recipe(config(), other), name) == apply_recipe(config(), name)


def test_a_recipe_keeps_the_objective_of_the_last_phase():
    phases = "training.phases=[{add: 1, objective: clm}, {add: rest, objective: mlm}]"
    after = apply_recipe(config(3, 2, "training.strategy=phases", phases), "grown")
    assert after.training.objectives == ("mlm",)
    assert {phase.objective for phase in build_phases(after)} == {"mlm"}


def test_the_shared_base_leaves_the_curriculum_to_the_recipe():
    file = Path(__file__).parents[2] / "configs" / "recipes" / "base.yaml"
    assert not {"strategy", "phases", "progressive"} & set(yaml.safe_load(file.read_text(encoding="utf-8"))["training"])
    assert {apply_recipe(StackWiseConfig.from_yaml(file), name).model.d_model for name in RECIPES} == {96}


def test_names_are_listed_and_wrong_ones_answered_with_the_nearest():
    assert recipe_names("all") == list(RECIPES)
    assert recipe_names("grown, fusion") == ["grown", "fusion"]
    with pytest.raises(UserError, match=r"'fuson' is not a recipe; allowed: grown, .*; did you mean fusion\?$"):
        recipe_names("grown,fuson")
    with pytest.raises(UserError, match="names no recipe"):
        recipe_names(",")


def test_overrides_need_to_fit_the_recipe_and_not_the_curriculum_it_replaces(tmp_path):
    file = tmp_path / "config.yaml"
    config(3).to_yaml(file)  # its trunk trains, so that nothing could be offloaded or stored in fewer bits
    overrides = ["training.offload=disk", "training.progressive.trunk_precision=int8"]
    after = read_config(file, overrides, None, "append-frozen")
    assert after.training.offload == "disk" and after.training.progressive.trunk_precision == "int8"
    with pytest.raises(ConfigError, match=r"training\.offload"):
        read_config(file, overrides[:1], None, "grown")
    file.write_text("training: 3")
    with pytest.raises(ConfigError, match="training: 3 "):
        read_config(file, [], None, "grown")
    file.write_text("training: {phases: 7}")
    assert read_config(file, [], None, "grown").training.phases == ()
