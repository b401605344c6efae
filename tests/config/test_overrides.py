"""Settings changed on the command line (``key.path=value``) and from Python, and old keys."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.base import apply_overrides, as_override
from stackwise.config.legacy import OldKeyWarning, migrate
from stackwise.errors import ConfigError


def value(config: StackWiseConfig, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.d_model=256", 256),
        ("training.optimizer.lr=3e-4", 3e-4),
        ("training.optimizer.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("training.max_tokens=2e6", 2_000_000),
        ("training.compile=true", True),
        ("training.grad_clip=null", None),
        ("training.progressive.trunk_strategy=frozen", "frozen"),
        (" training.seed = 7 ", 7),
        ("data.split=1", "1"),
        ("data.split='1'", "1"),
        ("data.split=a=b: c", "a=b: c"),
        ("data.cache_dir=~", None),
        ("data.cache_dir=~/stores", "~/stores"),
        ("data.cache_dir=", None),
    ],
)
def test_an_override_sets_its_key_and_nothing_else(override: str, expected: object) -> None:
    changed = StackWiseConfig.from_dict({}, [override])
    key = override.partition("=")[0].strip()
    assert value(changed, key) == expected
    assert type(value(changed, key)) is type(expected)
    same = [line for line in changed.to_yaml().splitlines() if line in StackWiseConfig().to_yaml().splitlines()]
    assert len(StackWiseConfig().to_yaml().splitlines()) - len(same) <= 1


def test_a_path_is_taken_as_written_and_a_list_in_brackets(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: {source: files}")
    assert StackWiseConfig.from_yaml(file, ["data.path=*.txt"]).data.path == "*.txt"
    assert StackWiseConfig.from_yaml(file, ["data.path=[a.txt, 'b*.jsonl']"]).data.path == ("a.txt", "b*.jsonl")


def test_overriding_leaves_the_dict_it_is_given_alone() -> None:
    data = {"training": {"max_steps": 11, "optimizer": {"lr": 0.1}}}
    changed = apply_overrides(data, ["training.max_tokens=13", "training.optimizer.lr=0.2"])
    assert changed == {"training": {"max_tokens": 13, "optimizer": {"lr": 0.2}}}
    assert data == {"training": {"max_steps": 11, "optimizer": {"lr": 0.1}}}


def test_the_last_of_two_overrides_of_a_key_wins() -> None:
    assert StackWiseConfig.from_dict({}, ["training.seed=1", "training.seed=2"]).training.seed == 2


def test_overrides_reach_into_sections_that_the_file_leaves_out_or_empty(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model:\n")
    config = StackWiseConfig.from_yaml(file, ["model.architecture.n_stacks=3", "data.tokenizer.kind=bytes"])
    assert (config.model.architecture.n_stacks, config.data.tokenizer.kind) == (3, "bytes")


def test_python_changes_settings_by_values_of_their_own_types() -> None:
    config = StackWiseConfig()
    changes = {
        "training.optimizer.betas": (0.7, 0.9),
        "training.progressive": {"trunk_strategy": "frozen", "joint_fraction": 0.25},
        "training.progressive.joint_fraction": 0.5,
        "training.grad_clip": None,
        "data.split": "1",
        "model.qk_norm": True,
    }
    changed = config.changed(changes)
    assert changed.training.optimizer.betas == (0.7, 0.9) and changed.training.grad_clip is None
    progressive = changed.training.progressive
    assert (progressive.trunk_strategy, progressive.joint_fraction) == ("frozen", 0.5)
    assert (changed.data.split, changed.model.qk_norm) == ("1", True)
    assert changed.training.optimizer.lr == config.training.optimizer.lr
    assert config == StackWiseConfig()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.seed", "1", "training.seed: '1' has the wrong type; must be a whole number"),
        ("model.qk_norm", 1, "model.qk_norm: 1 has the wrong type; must be true or false"),
        ("training.offload", "[host]", "training.offload: '[host]' is not allowed; allowed: none, host, disk"),
        ("model.d_modle", 3, "model.d_modle: unknown key; did you mean model.d_model?"),
        ("training", 3, "training: 3 has the wrong type; must be a section of keys"),
    ],
)
def test_a_change_of_the_wrong_key_or_type_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        StackWiseConfig().changed({key: value})
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.max_steps", 13),
        ("model.tie_embeddings", True),
        ("training.grad_clip", None),
        ("training.optimizer.eps", 1e-7),
        ("training.optimizer.betas", [0.5, 0.7]),
        *(("data.path", text) for text in ("*.txt", "null", "[a", "it's", "a: b # c", "1e3", "", " x", "~", "yes")),
        ("training.phases", [{"add": 1}, {"sweep": "left_to_right"}]),
    ],
)
def test_a_change_written_for_the_command_line_reads_back_equal(key: str, value: object) -> None:
    assert apply_overrides({}, [as_override(key, value)]) == nested(key, value)


def nested(key: str, value: object) -> dict[str, object]:
    """``{"a": {"b": value}}`` for the key ``a.b``."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def test_a_budget_on_the_command_line_replaces_the_files() -> None:
    steps = StackWiseConfig.from_dict({"training": {"max_steps": 11}})
    assert steps.changed({"training.max_tokens": 13}).training.budget == ("tokens", 13)
    assert steps.changed({"training.max_flops": 1e12}).training.budget == ("flops", 1e12)
    assert steps.changed({"training.max_tokens": None}).training.budget == ("steps", 11)
    assert steps.changed({"training.max_steps": None}).training.budget == ("steps", 1000)


def test_two_budgets_on_the_command_line_are_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        StackWiseConfig.from_dict({}, ["training.max_tokens=13", "training.max_steps=11"])
    assert str(raised.value) == "training.max_tokens: 13 and max_steps (11) are both set; keep one budget"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.d_modle=3", "model.d_modle: unknown key; did you mean model.d_model?"),
        ("training.optimiser.lr=3", "training.optimiser: unknown key; did you mean training.optimizer?"),
        ("model.d_model.x=3", "model.d_model.x: unknown key; model.d_model is one setting, not a section of keys"),
        ("model.d_model", "'model.d_model' is not an override; write key.path=value, for example training.seed=1"),
        ("=3", "'=3' is not an override; write key.path=value, for example training.seed=1"),
        ("model..x=3", "'model..x=3' is not an override; write key.path=value, for example training.seed=1"),
        ("model.d_model=", "model.d_model: null has the wrong type; must be a whole number"),
        ("model=3", "model: 3 has the wrong type; must be a section of keys"),
        (
            "training.optimizer.betas=[1",
            "the value of training.optimizer.betas: not valid YAML at line 1, column 3: "
            "expected ',' or ']', but got '<stream end>'",
        ),
        ("data.n_blocks=3", "data.n_blocks: unknown key; allowed here: source, path, subset, "
         "split, text_field, validation_path, columns, "
         "validation_fraction, validation_split, tokenizer, cache_dir, sources"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_answered_by_one_exact_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        StackWiseConfig.from_dict({}, [override])
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("model", "where"),
    [
        ({"n_blocks": 6, "architecture": {"n_stacks": 2}}, "model"),
        ({"architecture": {"n_blocks": 6, "n_stacks": 2}}, "model.architecture"),
        ({"architecture": {"n_blocks": 6, "n_stacks": 2, "blocks_per_stack": 3}}, "model.architecture"),
    ],
)
def test_n_blocks_still_loads_and_the_warning_says_what_to_write(model: dict[str, Any], where: str) -> None:
    with pytest.warns(DeprecationWarning) as caught:
        config = StackWiseConfig.from_dict({"model": model})
    assert [str(warning.message) for warning in caught] == [
        f"{where}.n_blocks is deprecated; write model.architecture: {{n_stacks: 2, blocks_per_stack: 3}}"
    ]
    assert caught[0].category is OldKeyWarning
    assert caught[0].filename == __file__
    assert (config.model.architecture.n_stacks, config.model.architecture.blocks_per_stack) == (2, 3)
    assert "n_blocks" not in config.to_yaml()


def test_n_blocks_alone_is_one_stack(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("model: {n_blocks: 5, architecture: }")
    with pytest.warns(DeprecationWarning) as caught:
        architecture = StackWiseConfig.from_yaml(file).model.architecture
    assert (architecture.n_stacks, architecture.blocks_per_stack) == (1, 5)
    assert caught[0].filename == __file__


def test_n_blocks_as_an_override_warns_too() -> None:
    with pytest.warns(DeprecationWarning, match=r"model\.n_blocks is deprecated"):
        config = StackWiseConfig.from_dict({}, ["model.architecture={n_stacks: 4}", "model.n_blocks=8"])
    assert config.model.architecture.blocks_per_stack == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"n_blocks": 7, "architecture": {"n_stacks": 2}},
            "model.n_blocks: 7 cannot be divided among n_stacks (2); set model.architecture.blocks_per_stack",
        ),
        (
            {"n_blocks": 6, "architecture": {"n_stacks": 2, "blocks_per_stack": 2}},
            "model.n_blocks: 6 contradicts model.architecture.blocks_per_stack (2); keep blocks_per_stack",
        ),
        ({"n_blocks": 0}, "model.n_blocks: 0 is not allowed; must be a whole number, at least 1"),
        ({"n_blocks": "6"}, "model.n_blocks: '6' is not allowed; must be a whole number, at least 1"),
        (
            {"architecture": {"n_blocks": True}},
            "model.architecture.n_blocks: True is not allowed; must be a whole number, at least 1",
        ),
    ],
)
def test_an_n_blocks_that_cannot_be_meant_is_answered_by_one_exact_line(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        StackWiseConfig.from_dict({"model": model})
    assert str(raised.value) == message


def test_configs_in_todays_keys_neither_change_nor_warn() -> None:
    data = StackWiseConfig().to_dict()
    assert migrate(data) == (data, [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StackWiseConfig.from_dict(data)


def test_old_rates_of_masking_become_those_of_the_section_masking() -> None:
    old = {"training": {"mask_fraction_min": 0.1, "progressive": {"mask_fraction_max": 0.4}}}
    data, notes = migrate(old)
    assert data["training"]["masking"] == {"rate": 0.1, "max_rate": 0.4}
    assert notes == [
        "training.mask_fraction_min is deprecated; write training.masking: {rate: 0.1}",
        "training.progressive.mask_fraction_max is deprecated; write training.masking: {max_rate: 0.4}",
    ]
    with pytest.raises(ConfigError, match=r"mask_fraction_min: 0.1 contradicts training.masking.rate"):
        migrate({"training": {"mask_fraction_min": 0.1, "masking": {"rate": 0.2}}})


@pytest.mark.parametrize(
    "key, instead",
    [
        ("time_step_masking", "time_interpretation: depth"),
        ("num_time_steps", "model.architecture.n_stacks"),
        ("time_step_mask_fractions", "training.diffusion.levels"),
    ],
)
def test_old_keys_of_time_are_refused_with_what_to_write(key: str, instead: str) -> None:
    for training in ({key: 1}, {"progressive": {key: 1}}):
        with pytest.raises(ConfigError, match=f"{key}: this key no longer exists; write .*{instead}"):
            migrate({"training": training})
