"""Configs of the first public versions become today's: what they build, what is said, what stays of their comments."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from old_configs import OLD
from stackwise.cli.main import main
from stackwise.config import StackWiseConfig, yaml_io
from stackwise.config.legacy import LOADS
from stackwise.config.messages import section_of
from stackwise.config.migration import Refused
from stackwise.config.migration_rules import migrate_config
from stackwise.config.old_keys import OLD_KEYS
from stackwise.errors import ConfigError
from stackwise.growth.curricula import build_phases
from stackwise.model.architecture import create_rack_from_config


def config_of(name: str) -> StackWiseConfig:
    return StackWiseConfig.from_dict(yaml_io.parse(migrate_config(OLD[name], name).text, name))


# Stacks, Blocks in each, heads of keys, direction, feature map, rank of keys and values; read off the old files.
BUILT = {
    "hierarchy": (2, 3, 2, "bidirectional", "linear", None),
    "n_blocks": (2, 3, 3, "causal", "linear", None),
    "top_of_model": (2, 4, 4, "bidirectional", "laplacian", 10),
    "grouped": (4, 2, 3, "causal", "linear", None),
    "layerwise": (4, 2, 4, "causal", "linear", None),
    "fused": (3, 2, 4, "causal", "linear", None),
    "dual_adapters": (3, 1, 4, "causal", "linear", None),
    "time_as_depth": (3, 1, 4, "bidirectional", "linear", None),
    "time_as_input": (4, 2, 4, "bidirectional", "linear", None),
    "dumped": (4, 1, 4, "causal", "linear", None),
}


@pytest.mark.parametrize("name", OLD)
def test_an_old_config_migrates_loads_and_builds(name: str) -> None:
    stacks, blocks, heads, mode, kernel, rank = BUILT[name]
    rack = create_rack_from_config(config_of(name).to_dict())
    assert [len(stack.blocks) for stack in rack.stacks] == [blocks] * stacks
    attention = rack.spec.blocks[-1].attention
    assert (attention.n_kv_heads, attention.attention_mode, attention.kernel_type) == (heads, mode, kernel)
    assert attention.r_kv == rank and rack.spec.vocab_size == 1009


SETTINGS: dict[str, dict[str, Any]] = {
    "hierarchy": {
        "training.progressive.trunk_strategy": "frozen", "training.progressive.building_mode": "append",
        "training.progressive.trunk_precision": "half", "training.masking.max_rate": 0.9,
        "training.optimizer.optimizer_type": "adamw", "training.optimizer.lr": 1e-4, "model.tie_embeddings": False,
        "training.logging.every_steps": 10, "training.qlora.alpha": 32, "model.freeze_up_proj": True,
    },
    "n_blocks": {"training.strategy": "end_to_end", "training.end_to_end_scope": "rackwise"},
    "top_of_model": {
        "training.end_to_end_scope": "stackwise", "training.optimizer.betas": (0.9, 0.95),
        "training.masking.rate": 0.15, "model.attention_custom.kernel_dim": 22,
        "training.progressive.training_objective": "mlm",
    },
    "grouped": {"training.end_to_end_scope": "blockwise", "training.activation_checkpointing": True},
    "layerwise": {"training.end_to_end_scope": "blockwise", "model.attention_preset": "gpt_style"},
    "fused": {
        "training.progressive.trunk_strategy": "frozen", "training.progressive.trunk_precision": "fp8",
        "training.qlora.enabled": True, "model.tie_embeddings": False,
    },
    "dual_adapters": {
        "training.qlora.rank_pattern": (4, 16, 12), "training.qlora.alpha_pattern": (8, 32, 24),
        "training.qlora.progressive_rank": 6, "training.qlora.rank": 16, "training.qlora.strategy": "variable",
    },
    "time_as_depth": {
        "training.progressive.time_interpretation": "depth", "training.diffusion.levels": "exponential",
        "training.progressive.cache_activations": False, "training.progressive.new_stack_precision": "full",
    },
    "time_as_input": {
        "training.strategy": "end_to_end", "training.diffusion.time_dim": 38, "training.seq_len": 23,
        "training.diffusion.time_embedding": "learned", "data.source": "files", "data.path": "book.txt",
    },
    "dumped": {
        "training.optimizer.optimizer_type": "sgd", "training.optimizer.momentum": 0.9, "training.seq_len": 64,
        "training.checkpoint.every_steps": 100,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_each_setting_is_what_the_old_file_says(name: str) -> None:
    config = config_of(name)
    for key, expected in SETTINGS[name].items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        assert value == expected, key
    assert build_phases(config)


@pytest.mark.parametrize("name", OLD)
def test_what_was_migrated_has_nothing_old_left(name: str) -> None:
    text = migrate_config(OLD[name], name).text
    again = migrate_config(text, name)
    assert (again.text, again.moved, again.differs, again.left_out) == (text, [], [], {})


def test_every_comment_stays_beside_its_key_or_where_it_stood() -> None:
    old, new = OLD["hierarchy"], migrate_config(OLD["hierarchy"], "hierarchy").text
    for comment in re.findall(r"#.*", old):
        assert comment.rstrip() in new, comment
    assert "every_steps: 10  # steps\n" in new and "optimizer_type: adamw  # AdamW | SGD\n" in new
    assert new.startswith("# A run of ours.\n\nmodel:\n  vocab_size: 1009  # small, for tests\n")
    assert "  # Where it runs\n  device:" in new and new.endswith("# The end.\n")
    assert '  # The table of another model\n  # left out: family: "gpt2"  # downloaded\n' in new
    assert "\n  # Stacks of Blocks\n  architecture:\n    n_stacks: 2  # groups\n" in new


def test_the_report_says_what_moved_what_differs_and_what_is_left_out() -> None:
    said = migrate_config(OLD["fused"], "f")
    assert "training.mode → training.strategy: 'progressive'" in said.moved
    assert "training.quantization_type → training.progressive.trunk_precision" in said.moved
    assert said.differs[0] == ("training.qlora_lr: 1e-05 is left out: all adapters train at training.optimizer.lr")
    assert "model.tie_embeddings: false is written" in said.differs[1]
    said = migrate_config(OLD["hierarchy"], "h")
    assert "training.progressive is written twice: the last counts, as it did" in said.differs
    assert any(line.startswith("model.tokenizer_embedding.family: 'gpt2' is left out") for line in said.differs)
    assert any("there is no made-up data" in line for line in said.differs)
    assert said.left_out["training.save_stacks"] == "checkpoints hold every Stack, and the whole Rack"
    said = migrate_config(OLD["time_as_depth"], "t")
    assert any("time_step_mask_fractions" in line and "training.diffusion.levels" in line for line in said.differs)


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("model: {n_blocks: 7, architecture: {n_stacks: 2}}",
         ["f: model.n_blocks: 7 cannot be divided among n_stacks (2); set model.architecture.blocks_per_stack"]),
        ("model: {d_modle: 5}\ntraining: {mode: sideways, colour: red}",
         ["f: training.mode: 'sideways' is not allowed; allowed: layerwise, blockwise, fused",
          "f: model.d_modle: unknown key; did you mean model.d_model?", "f: training.colour: unknown key; allowed"]),
        ("training: {lr: 0.1, learning_rate: 0.2}",
         ["f: training.learning_rate: 0.2 contradicts training.lr (0.1); keep one"]),
        ("model: {attention_type: [mha]}\ntraining: {mode: layerwise}",
         ["f: model.attention_custom.attention_type: ['mha'] is not allowed; allowed: mha, mla"]),
        ("model: {d_model: -5}\ntraining: {mode: layerwise}",
         ["f: model.d_model: -5 is out of range; must be at least 1"]),
        ("training: {progressive: {enabled: false}, strategy: progressive}",
         ["f: training.progressive.enabled: false contradicts training.strategy: progressive; keep one"]),
        ("data: {dataset_path: a, use_dummy_data: true}",
         ["f: data.dataset_path: 'a' contradicts data.use_dummy_data: true; keep one"]),
        ("training: {qlora: {strategy: variable, configs: 3}}",
         ["f: training.qlora.configs: 3 must give rank and alpha by the number of a Stack"]),
        ("training: {block_size: 0, quantization_type: fp3}",
         ["f: training.block_size: 0 is not allowed; must be a whole number, at least 1",
          "f: training.quantization_type: 'fp3' is not allowed; allowed: fp4, fp16, fp8, nf_fp8, fp32"]),
        ("model: !!python/object/apply:os.system [ls]",
         ["f: line 1: !!python/object/apply:os.system makes an object of Python, not a value"]),
        ("- a", ["f: a config is a mapping with the sections model, training and data"]),
        ("model: [", ["f: not valid YAML at line 1"]),
        ("? [a]\n: b", ["f: line 1: a key must be a name"]),
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_a_line_each(text: str, problems: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        migrate_config(text, "f")
    said = raised.value.problems if isinstance(raised.value, Refused) else [str(raised.value)]
    assert len(said) == len(problems)
    for line, expected in zip(said, problems):
        assert line.startswith(expected) and "\n" not in line


def test_a_folder_is_migrated_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old/inner").mkdir(parents=True)
    for name, place in (("n_blocks", "a.yaml"), ("grouped", "inner/b.yml")):
        (tmp_path / "old" / place).write_text(OLD[name])
    (tmp_path / "old/notes.txt").write_text("no config")
    assert main(["migrate", str(tmp_path / "old"), str(tmp_path / "new"), "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [Path(file["new"]).relative_to(tmp_path) for file in files] == [Path("new/a.yaml"), Path("new/inner/b.yml")]
    assert "training.training_architecture → training.end_to_end_scope" in files[1]["moved"]
    assert StackWiseConfig.from_yaml(tmp_path / "new/inner/b.yml").training.end_to_end_scope == "blockwise"
    (tmp_path / "old/bad.yaml").write_text("model: {d_modle: 1, n_haeds: 2}")
    (tmp_path / "old/worse.yaml").write_text("[")
    assert main(["migrate", str(tmp_path / "old"), str(tmp_path / "again")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith(f"stackwise: {tmp_path}/old/") for line in lines)
    assert not (tmp_path / "again").exists()


def test_a_file_is_written_once_and_the_report_reads_at_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    Path("old.yaml").write_text(OLD["hierarchy"])
    assert main(["migrate", "old.yaml", "new.yaml"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("new.yaml: 5 moved, ") and said.endswith("next: stackwise plan new.yaml\n")
    assert max(map(len, said.splitlines())) <= 80
    written = Path("new.yaml").read_text()
    assert main(["migrate", "old.yaml", "new.yaml"]) == 2
    assert main(["migrate", "none.yaml", "other.yaml"]) == 2
    assert main(["migrate", "old.yaml", "nowhere/new.yaml"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "stackwise: new.yaml: already exists; give a file that does not",
        "stackwise: none.yaml: no such config file",
        "stackwise: nowhere/new.yaml: the folder nowhere does not exist",
    ]
    assert Path("new.yaml").read_text() == written
    assert main(["migrate", "new.yaml", "same.yaml"]) == 0
    assert Path("same.yaml").read_text() == written and capsys.readouterr().err.startswith("same.yaml: nothing in new")


def test_an_old_key_is_no_key_of_today_and_what_stands_for_it_is_one() -> None:
    def known(key: str) -> bool:
        *above, last = key.split(".")
        section = section_of(StackWiseConfig, tuple(above))
        return section is not None and last in section.model_fields

    for old in OLD_KEYS:
        assert known(old.key) == (old.key == old.to), old.key
        assert known(old.to) if old.to else old.why, old.key
    assert not any(map(known, LOADS))


def test_old_keys_that_do_not_load_are_refused_with_what_to_write() -> None:
    for key, text in (
        (
            "gradient_checkpointing",
            "gradient_checkpointing: unknown key; did you mean training.activation_checkpointing?",
        ),
        ("cache_mode", "cache_mode: this key no longer exists; training.progressive.cache_activations says whether"),
    ):
        with pytest.raises(ConfigError, match=re.escape(text)):
            StackWiseConfig.from_dict({"training": {key: True}})


def test_todays_configs_are_left_as_they_are() -> None:
    root = Path(__file__).parents[2]
    shipped = sorted((root / "configs").rglob("*.yaml"))
    assert len(shipped) > 10
    for file in shipped:
        text = file.read_text()
        assert migrate_config(text, file.name).text == text
