"""Recipes at equal FLOPs."""

import pytest

from stackwise.config import StackWiseConfig
from stackwise.errors import UserError
from stackwise.growth.recipes import apply_recipe
from stackwise.planning.plan import plan_run
from stackwise.runs.compare import compare_recipes, equal_budget


def config(*overrides):
    return StackWiseConfig.from_dict(
        {
            "model": {
                "vocab_size": 37, "d_model": 26, "n_heads": 13, "d_ff": 19,
                "architecture": {"n_stacks": 3, "blocks_per_stack": 2},
            },
            "training": {"batch_size": 5, "seq_len": 7, "max_steps": 31, "device": "cpu"},
        }, overrides
    )  # fmt: skip


@pytest.mark.parametrize(
    "recipe", ["end-to-end-checkpointed", "late-expansion", "append-cached", "append-qlora", "blockwise", "fusion"]
)
def test_the_budget_is_that_of_end_to_end_however_the_config_trains(tmp_path, recipe):
    expected = plan_run(config("training.strategy=end_to_end"), tmp_path).flops
    assert equal_budget(apply_recipe(config(), recipe)) == expected
    assert equal_budget(config("training.max_steps=null", "training.max_flops=1e9")) == 1e9


def test_what_does_not_go_with_a_recipe_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"recipe append-frozen.*tie_embeddings"):
        compare_recipes(config("model.tie_embeddings=true"), ["grown", "append-frozen"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
