"""Configs are data: they write, read back equal, and do not change."""

import copy
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stackwise.config import StackWiseConfig, yaml_io
from stackwise.config.messages import all_keys, section_of
from stackwise.config.presets import ABOUT, PRESETS
from stackwise.config.section import Section
from stackwise.config.template import preset_config, template
from stackwise.errors import ConfigError

ROOT = Path(__file__).parents[2]

# Text that YAML would read as something else, or break over lines, if it were written plainly.
TRAPS = [
    "1e-3", "yes", "null", "~", "a: b", "#x", " x ", "x\ny", "a\nb " * 30, "é 漢字 😀", "2024-01-01", "1:30", "'q\"",
    "*.txt", "a\tb", "\x85", "\u2028x", "-", "?", "0x1f", "\udc80", "x " * 150, "=", "<<", "1_000", ".5e3", "&a", "%",
]  # fmt: skip
UNUSUAL: list[dict[str, Any]] = [
    {"training": {"max_flops": 5e-324}},
    {"training": {"max_flops": 1.7e308}},
    {"training": {"max_flops": 10**18}},
    {"training": {"max_tokens": 2**53}},
    {"training": {"seed": 2**63 - 1}},
    {"training": {"optimizer": {"lr": 0.1 + 0.2, "eps": 1e-30, "betas": [0, 0.999999999999]}}},
    {"training": {"grad_clip": None, "progressive": {"phase_fractions": [0.1, 0.2, 0.3, 0.4]}}},
    {"model": {"n_heads": 8, "attention_preset": "efficient_gqa", "n_kv_heads": 2, "dropout": 0}},
    {"data": {"source": "files", "path": ["a", "b/*.jsonl"]}},
    {"data": {"source": "huggingface", "path": "org/name", "subset": "20231101.en"}},
]


def texts(text: str) -> dict[str, Any]:
    return {"data": {"source": "files", "path": [text, text], "split": text, "text_field": text}}


@pytest.mark.parametrize("data", [{}, *UNUSUAL, *(texts(text) for text in TRAPS)], ids=lambda data: ascii(data)[:70])
def test_what_is_written_reads_back_equal(tmp_path: Path, data: dict[str, Any]) -> None:
    config = StackWiseConfig.from_dict(data)
    file = tmp_path / "c.yaml"
    text = config.to_yaml(file)
    assert file.read_text(encoding="utf-8") == text
    read = StackWiseConfig.from_yaml(file)
    assert read == config
    assert read.to_yaml() == text
    assert read.fingerprint() == config.fingerprint()
    assert StackWiseConfig.from_dict(config.to_dict()) == config

    file.write_text(template(config, "a test"), encoding="utf-8")
    assert StackWiseConfig.from_yaml(file) == config


def test_a_changed_setting_changes_the_fingerprint() -> None:
    config = StackWiseConfig()
    assert config.changed({"training.seed": 1}).fingerprint() != config.fingerprint()


def test_to_dict_names_every_key() -> None:
    def leaves(data: dict[str, Any], prefix: str = "") -> list[str]:
        return [
            name
            for key, value in data.items()
            for name in [f"{prefix}{key}", *(leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [])]
        ]

    assert leaves(StackWiseConfig().to_dict()) == all_keys(StackWiseConfig)


def test_a_config_cannot_be_changed_in_place() -> None:
    config = StackWiseConfig()
    for section, key in ((config, "model"), (config.model, "d_model"), (config.training.optimizer, "lr")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, getattr(section, key))
    assert isinstance(config.training.optimizer.betas, tuple)
    assert hash(config) == hash(StackWiseConfig())


def test_reading_does_not_change_the_dict_that_is_read() -> None:
    data: dict[str, Any] = {"model": {"architecture": {"n_stacks": 2}, "n_blocks": 6}, "data": {"path": None}}
    before = copy.deepcopy(data)
    with pytest.warns(DeprecationWarning):
        StackWiseConfig.from_dict(data)
    assert data == before


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda file: file.name)
def test_every_shipped_config_loads_without_a_warning(file: Path, recwarn: pytest.WarningsRecorder) -> None:
    StackWiseConfig.from_yaml(file)
    assert not recwarn.list


@pytest.mark.parametrize("name", PRESETS)
def test_the_template_of_a_preset_loads_as_the_preset_and_explains_every_key(name: str) -> None:
    config, about = preset_config(name), ABOUT[name]
    text = template(config, about)
    assert StackWiseConfig.from_dict(yaml_io.parse(text, name)) == config
    assert max(map(len, text.splitlines())) <= 120
    prose = " ".join(line.partition("#")[2].strip() for line in text.splitlines())
    for key in all_keys(StackWiseConfig):
        *parents, last = key.split(".")
        section = section_of(StackWiseConfig, tuple(parents))
        assert section is not None
        field = section.model_fields[last]
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            assert field.description, f"{key} has no description"
            assert field.description in prose, key


def test_the_template_shows_the_default_beside_a_value_that_differs() -> None:
    lines = template(StackWiseConfig.from_dict({"model": {"d_model": 32}}), "a test").splitlines()
    assert [line.split("#")[1].strip() for line in lines if line.startswith("  d_model: 32 ")] == [
        "Width of the hidden state [default: 128]"
    ]
    assert sum("[default:" in line for line in lines) == 1


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as raised:
        preset_config("charcters")
    assert str(raised.value) == (
        "'charcters' is not a preset; allowed: default, demo, tiny, characters, bert, diffusion, gpu; "
        "did you mean characters?"
    )
