"""What a config file may say, and the one line that answers what it may not."""

import os
from pathlib import Path

import pytest

from stackwise.config import StackWiseConfig
from stackwise.errors import ConfigError, UserError

# One YAML document and its whole message, without the file's name.
UNKNOWN_KEYS = [
    ("model: {d_modle: 64}", "model.d_modle: unknown key; did you mean model.d_model?"),
    ("modle: {d_model: 64}", "modle: unknown key; did you mean model?"),
    ("traning: 3", "traning: unknown key; did you mean training?"),
    ("model: {n_stacks: 3}", "model.n_stacks: unknown key; did you mean model.architecture.n_stacks?"),
    ("model: {n_stack: 3}", "model.n_stack: unknown key; did you mean model.architecture.n_stacks?"),
    ("training: {lr: 1e-3}", "training.lr: unknown key; did you mean training.optimizer.lr?"),
    ("optimizer: {lr: 1e-3}", "optimizer: unknown key; did you mean training.optimizer?"),
    ("training: {path: x}", "training.path: unknown key; did you mean data.path or data.tokenizer.path?"),
    (
        "training: {optimizer: {learning_speed: 1}}",
        "training.optimizer.learning_speed: unknown key; allowed here: optimizer_type, lr, layer_decay, weight_decay, "
        "betas, "
        "eps, momentum, moments, in_backward",
    ),
    ("data: {tokenizer: {kinds: bpe}}", "data.tokenizer.kinds: unknown key; did you mean data.tokenizer.kind?"),
    ("zzz: 1", "zzz: unknown key; allowed here: model, training, data"),
    ("7: 1", "the config: 7 is not a key; keys are names"),
    (
        "zzz: 1\nmodel: {dropuot: 0.1}",
        "model.dropuot: unknown key; did you mean model.dropout? (and 1 more problem)",
    ),
]
WRONG_TYPES = [
    ("model: {d_model: '64'}", "model.d_model: '64' has the wrong type; must be a whole number"),
    ("model: {d_model: 64.5}", "model.d_model: 64.5 has the wrong type; must be a whole number"),
    ("model: {d_model: true}", "model.d_model: true has the wrong type; must be a whole number"),
    ("model: {d_model: }", "model.d_model: null has the wrong type; must be a whole number"),
    ("model: {d_ff: wide}", "model.d_ff: 'wide' has the wrong type; must be a whole number or null"),
    ("model: {use_rope: 1}", "model.use_rope: 1 has the wrong type; must be true or false"),
    ("model: 3", "model: 3 has the wrong type; must be a section of keys"),
    ("training: {optimizer: {lr: '1e-3'}}", "training.optimizer.lr: '1e-3' has the wrong type; must be a number"),
    ("training: {optimizer: {betas: 0.9}}", "training.optimizer.betas: 0.9 has the wrong type; must be a list"),
    (
        "training: {optimizer: {betas: [a, 0.9]}}",
        "training.optimizer.betas[0]: 'a' has the wrong type; must be a number",
    ),
    (
        "training: {optimizer: {betas: [0.9]}}",
        "training.optimizer.betas: [0.9] has the wrong number of entries; must be a list of 2 numbers",
    ),
    (
        "training: {optimizer: {betas: [0.9, 0.95, 0.99]}}",
        "training.optimizer.betas: [0.9, 0.95, 0.99] has the wrong number of entries; must be a list of 2 numbers",
    ),
    (
        "training: {progressive: {phase_fractions: 0.5}}",
        "training.progressive.phase_fractions: 0.5 has the wrong type; must be a list or null",
    ),
    ("data: {split: 5}", "data.split: 5 has the wrong type; must be text"),
    ("data: {path: 5}", "data.path: 5 has the wrong type; must be text or a list or null"),
    ("data: {path: [a, 5]}", "data.path[1]: 5 has the wrong type; must be text"),
    ("[model]", "a config is a mapping with the sections model, training and data, not list"),
]
OUT_OF_RANGE = [
    ("model: {d_model: -5}", "model.d_model: -5 is out of range; must be at least 1"),
    ("model: {dropout: 1}", "model.dropout: 1 is out of range; must be at least 0 and below 1"),
    ("model: {vocab_size: 0}", "model.vocab_size: 0 is out of range; must be at least 1, or null"),
    ("model: {rope_theta: 1}", "model.rope_theta: 1 is out of range; must be above 1"),
    ("training: {batch_size: 0}", "training.batch_size: 0 is out of range; must be at least 1"),
    ("training: {seed: -1}", f"training.seed: -1 is out of range; must be at least 0 and below {2**63}"),
    ("training: {grad_clip: 0.0}", "training.grad_clip: 0.0 is out of range; must be above 0, or null"),
    ("training: {optimizer: {lr: 0}}", "training.optimizer.lr: 0 is out of range; must be above 0"),
    ("training: {optimizer: {lr: .inf}}", "training.optimizer.lr: inf is out of range; must be a finite number"),
    ("training: {optimizer: {lr: .nan}}", "training.optimizer.lr: nan is out of range; must be a finite number"),
    (
        "training: {optimizer: {betas: [0.9, 1.5]}}",
        "training.optimizer.betas[1]: 1.5 is out of range; must be at least 0 and below 1",
    ),
    ("training: {masking: {rate: 0}}", "training.masking.rate: 0 is out of range; must be above 0 and below 1"),
    ("data: {tokenizer: {vocab_size: 3}}", "data.tokenizer.vocab_size: 3 is out of range; must be at least 260"),
    (
        "training: {progressive: {trunk_strategy: frozn}}",
        "training.progressive.trunk_strategy: 'frozn' is not allowed; allowed: frozen, qlora, trainable; did you mean "
        "frozen?",
    ),
    (
        "training: {device: gpu}",
        "training.device: 'gpu' is not allowed; allowed: auto, cpu, cuda, mps",
    ),
    (
        "model: {tokenizer_embedding: {family: f, embedding_option: embed}}",
        "model.tokenizer_embedding.embedding_option: 'embed' is not allowed; allowed: embed_tokens, lm_head or null",
    ),
    (
        "model: {tokenizer_embedding: {family: f, adapter_hidden_dim: 0}}",
        "model.tokenizer_embedding.adapter_hidden_dim: 0 is out of range; must be at least 1, or null",
    ),
]
IMPOSSIBLE = [
    ("training: {diffusion: {time_dim: 7}}", "training.diffusion.time_dim: 7 is out of range; must be a multiple of 2"),
    (
        "model: {attention_custom: {mla_rkv: 8}}",
        "model.attention_custom.mla_rkv: 8 is only used when attention_preset is mla_attention, mlgka or custom "
        "(attention_preset is null)",
    ),
    (
        "model: {attention_custom: {attention_type: mla}}",
        "model.attention_custom.attention_type: 'mla' is only used when attention_preset is custom "
        "(attention_preset is null)",
    ),
    (
        "model: {attention_preset: custom, attention_custom: {mla_rkv: 8}}",
        "model.attention_custom.mla_rkv: 8 is only used when attention_type is mla",
    ),
    (
        "model: {attention_preset: mlgka, attention_custom: {mla_rope_dim: 8}}",
        "model.attention_custom.mla_rope_dim: 8 is only used when mla_latents is shared (mla_latents is separate)",
    ),
    (
        "model: {attention_preset: mla_attention, attention_custom: {mla_rope_dim: 7}}",
        "model.attention_custom.mla_rope_dim: 7 is odd; rotary positions need an even number",
    ),
    (
        "model: {attention_preset: mla_attention, qk_norm: true}",
        "model.qk_norm: true cannot be combined with latent attention, which has its own norms (attention_preset "
        "is mla_attention)",
    ),
    (
        "model: {attention_preset: kernel_attention, attention_custom: {kernel_type: linear}}",
        "model.attention_custom.kernel_type: 'linear' means attention without a kernel, but kernel_attention "
        "needs one; allowed: gaussian, laplacian, uniform",
    ),
    (
        "model: {attention_preset: kernel_attention, attention_custom: {kernel_dim: 33}}",
        "model.attention_custom.kernel_dim: 33 is odd; random features come in pairs, so the number must be even",
    ),
    (
        "model: {attention_preset: custom, attention_custom: {kernel_type: uniform, kernel_meaning: weight}}",
        "model.attention_custom.kernel_meaning: 'weight' requires the gaussian kernel, or the laplacian with "
        "kernel_norm: l2 (kernel_type is uniform, kernel_norm is l2)",
    ),
    (
        "model: {tokenizer_embedding: {adapter_hidden_dim: 8}}",
        "model.tokenizer_embedding.adapter_hidden_dim: 8 is only used when family is set (family is null)",
    ),
    (
        "model: {tokenizer_embedding: {embedding_option: lm_head}}",
        "model.tokenizer_embedding.embedding_option: 'lm_head' is only used when family is set (family is null)",
    ),
    (
        "model: {tokenizer_embedding: {family: f}}\ndata: {tokenizer: {kind: bytes}}",
        "data.tokenizer.kind: 'bytes' cannot be combined with model.tokenizer_embedding.family, which brings its "
        "own tokenizer; remove data.tokenizer",
    ),
    ("model: {global_every: 3}", "model.global_every: 3 is only used when window is set (window is null)"),
    (
        "model: {norm_bias: true}",
        "model.norm_bias: true requires norm: layernorm, because RMSNorm has no bias (norm is rmsnorm)",
    ),
    (
        "model: {learned_positions: 64}",
        "training.seq_len: 256 is above the number of learned positions (model.learned_positions is 64)",
    ),
    (
        "model: {architecture: {n_stacks: 3, blocks_per_stack: [2, 1]}}",
        "model.architecture.blocks_per_stack: has 2 entries for 3 Stacks (n_stacks); list one entry for each Stack",
    ),
    (
        "training: {progressive: {building_mode: interleave}}",
        "training.progressive.building_mode: 'interleave' adds Stacks between those of another run; set "
        "model.initial (train --from RUN), or use append or prepend",
    ),
    ("model: {n_heads: 3}", "model.n_heads: 3 does not divide d_model (128)"),
    (
        "model: {d_model: 15, n_heads: 5}",
        "model.n_heads: 5 gives heads of size 3; rotary positions (use_rope) need an even size",
    ),
    ("model: {n_kv_heads: 3}", "model.n_kv_heads: 3 does not divide n_heads (4)"),
    (
        "model: {attention_preset: efficient_gqa, n_kv_heads: 4}",
        "model.n_kv_heads: 4 equals n_heads; efficient_gqa needs fewer key/value heads "
        "(use gpt_style or bert_style for full attention)",
    ),
    (
        "model: {attention_preset: bert_style}",
        "model.attention_preset: 'bert_style' is bidirectional, so attention would see the tokens that clm "
        "predicts; set gpt_style, or training.progressive.training_objective: mlm or diffusion",
    ),
    (
        "{model: {attention_preset: gpt_style}, training: {progressive: {training_objective: mlm}}}",
        "model.attention_preset: 'gpt_style' is causal, but mlm needs bidirectional attention; set bert_style, "
        "or training.progressive.training_objective: clm",
    ),
    (
        "model: {tie_embeddings: true}\ntraining: {progressive: {trunk_strategy: frozen}}",
        "model.tie_embeddings: true cannot be combined with training.progressive.trunk_strategy: frozen, because "
        "training the head would change the embedding that the trunk reads; set tie_embeddings: false, or make "
        "the trunk trainable",
    ),
    (
        "training: {progressive: {trunk_strategy: qlora}}",
        "training.progressive.trunk_strategy: 'qlora' trains the trunk's adapters, but adapters are not enabled; "
        "set training.qlora.enabled or training.qlora.progressive_enabled to true",
    ),
    (
        "training: {progressive: {trunk_precision: nf4}}",
        "training.progressive.trunk_precision: 'nf4' applies only to a frozen trunk, but trunk_strategy is "
        "trainable; set trunk_strategy: frozen or qlora, or trunk_precision: full",
    ),
    (
        "training: {progressive: {new_stack_precision: int8}}",
        "training.progressive.new_stack_precision: 'int8' weights cannot be trained; set full or bfloat16, or "
        "set training.qlora.enabled: true to train adapters beside them",
    ),
    (
        "training: {progressive: {cache_activations: true}}",
        "training.progressive.cache_activations: true requires a frozen trunk with Stacks appended to it, "
        "because otherwise the cached hidden states would change; set trunk_strategy: frozen and building_mode: "
        "append",
    ),
    (
        "training: {offload: disk}",
        "training.offload: 'disk' applies only to frozen Stacks, but trunk_strategy is trainable",
    ),
    (
        "training: {qlora: {enabled: true, strategy: variable, rank_pattern: [2, 3, 5]}}",
        "training.qlora.rank_pattern: has 3 entries for 4 Stacks; list one entry for each Stack",
    ),
    (
        "training: {qlora: {rank_pattern: increasing}}",
        "training.qlora.rank_pattern: 'increasing' is only used when strategy is progressive or variable "
        "(strategy is simplified)",
    ),
    (
        "training: {optimizer: {optimizer_type: sgd, moments: int8}}",
        "training.optimizer.moments: 'int8' is only used when optimizer_type is adamw or muon (optimizer_type is sgd)",
    ),
    (
        "training: {optimizer: {momentum: 0.9}}",
        "training.optimizer.momentum: 0.9 is only used when optimizer_type is muon or sgd (optimizer_type is adamw)",
    ),
    (
        "training: {optimizer: {in_backward: true}}",
        "training.optimizer.in_backward: true cannot be combined with grad_clip (1), because the first update "
        "comes before the norm of all gradients is known; set grad_clip: null",
    ),
    (
        "training: {optimizer: {optimizer_type: muon}, progressive: {new_stack_precision: bfloat16}}",
        "training.progressive.new_stack_precision: 'bfloat16' requires optimizer_type: adamw, which rounds "
        "stochastically (optimizer_type is muon)",
    ),
    ("training: {strategy: phases}", "training.phases: must list at least one phase when strategy is phases"),
    (
        "training: {strategy: phases, phases: [{add: 1, sweep: left_to_right}]}",
        "training.phases[0].sweep: an entry must set exactly one of add, trains, sweep, unfreeze; this entry "
        "sets both add and sweep",
    ),
    (
        "training: {strategy: phases, phases: [{add: 1}, {trains: all, cycles: 2}]}",
        "training.phases[1].cycles: 2 is only used in an entry with sweep (this entry has trains)",
    ),
    (
        "training: {strategy: phases, phases: [{add: 1}, {sweeep: left_to_right}]}",
        "training.phases[1].sweeep: unknown key; did you mean sweep?",
    ),
    (
        "training: {strategy: phases, phases: [{add: 1, at: rigth}]}",
        "training.phases[0].at: 'rigth' is not allowed; allowed: right, left, middle, between; did you mean right?",
    ),
    (
        "training: {strategy: phases, phases: [{add: rests}]}",
        "training.phases[0].add: 'rests' is not allowed; allowed: rest, each or a whole number or null; did you mean "
        "rest?",
    ),
    (
        "training: {strategy: phases, phases: [{add: 0}]}",
        "training.phases[0].add: 0 is out of range; must be at least 1, or null",
    ),
    (
        "training: {strategy: phases, phases: [{add: 1}, {trains: [0, head]}]}",
        "training.phases[1].trains[1]: 'head' is not allowed; allowed: embedding or a whole number",
    ),
    (
        "training: {strategy: phases, phases: [{add: 1, share: 0}]}",
        "training.phases[0].share: 0 is out of range; must be above 0 and at most 1, or null",
    ),
    (
        "training: {strategy: phases, phases: [{sweep: left_to_right, unit: block, group: 2}]}",
        "training.phases[0].group: 2 is only used when unit is stack (unit is block)",
    ),
    (
        "training: {strategy: phases, phases: [{add: 1}, {add: rest, trunk: qlora}]}",
        "training.phases[1].trunk: 'qlora' trains the trunk's adapters, but adapters are not enabled; set "
        "training.qlora.enabled or training.qlora.progressive_enabled to true",
    ),
    (
        "training: {strategy: phases, phases: [{add: 1}, {add: 1, trunk: frozen}, {add: 1, precision: nf4}]}",
        "training.phases[2].precision: 'nf4' applies only to a frozen trunk, but this entry's trunk is "
        "trainable; set trunk: frozen or qlora, or precision: full",
    ),
    (
        "model: {tie_embeddings: true}\ntraining: {strategy: phases, phases: [{add: 1}, {add: 1, trunk: frozen}]}",
        "model.tie_embeddings: true cannot be combined with training.phases[1].trunk: frozen, because training "
        "the head would change the embedding that the trunk reads; set tie_embeddings: false, or make the trunk "
        "trainable",
    ),
    (
        "training: {strategy: phases, progressive: {cache_activations: true, trunk_strategy: frozen}, "
        "phases: [{add: rest}, {trains: all}]}",
        "training.progressive.cache_activations: true requires a frozen trunk with Stacks appended to it, "
        "because otherwise the cached hidden states would change; set trunk_strategy: frozen and building_mode: "
        "append",
    ),
    (
        "training: {strategy: end_to_end, offload: host}",
        "training.offload: 'host' applies only to frozen Stacks, but no phase freezes any",
    ),
    (
        "training: {strategy: phases, offload: host, phases: [{add: rest}, {trains: all}]}",
        "training.offload: 'host' applies only to frozen Stacks, but no phase freezes any",
    ),
    (
        "training: {qlora: {rank_pattern: increasng}}",
        "training.qlora.rank_pattern: 'increasng' is not allowed; allowed: constant, increasing, decreasing or a list; "
        "did you mean increasing?",
    ),
    (
        "training: {end_to_end_scope: blockwise}",
        "training.end_to_end_scope: 'blockwise' is only used when strategy is end_to_end (strategy is progressive)",
    ),
    (
        "training: {max_steps: 3, max_tokens: 1e6}",
        "training.max_tokens: 1000000 and max_steps (3) are both set; keep one budget",
    ),
    ("training: {batch_size: 6, micro_batch_size: 4}", "training.micro_batch_size: 4 does not divide batch_size (6)"),
    (
        "training: {masking: {mask_share: 0.9, random_share: 0.2}}",
        "training.masking.random_share: 0.2 and mask_share (0.9) sum to more than 1",
    ),
    (
        "training: {progressive: {phase_fractions: [0.5, 0.5]}}",
        "training.progressive.phase_fractions: has 2 entries for 4 Stacks; list one entry for each Stack",
    ),
    (
        "training: {progressive: {target_stacks: 2, phase_fractions: [0.5, 0.4], joint_fraction: 0.2}}",
        "training.progressive.phase_fractions: [0.5, 0.4] and joint_fraction (0.2) sum to 1.1; the sum must be 1",
    ),
    (
        "training: {progressive: {new_stack_init: random, optimizer_state: copy}}",
        "training.progressive.optimizer_state: 'copy' requires new_stack_init: copy (new_stack_init is random)",
    ),
    ("data: {source: files}", "data.path: must be set when source is files"),
    (
        "data: {path: x.txt}",
        "data.path: 'x.txt' is only used when source is files, huggingface or labelled (source is python-stdlib)",
    ),
    (
        "data: {source: huggingface, path: [a, b]}",
        "data.path: ['a', 'b'] must be the name of one data set when source is huggingface",
    ),
    (
        "data: {tokenizer: {kind: pretrained}}",
        "data.tokenizer.path: must name a tokenizer.json or a folder when kind is pretrained",
    ),
    (
        "data: {tokenizer: {path: t.json}}",
        "data.tokenizer.path: 't.json' is only used when kind is pretrained (kind is bpe)",
    ),
]
BAD_YAML = [
    ("model: {d_model: 8", "not valid YAML at line 1, column 19: expected ',' or '}', but got '<stream end>'"),
    (
        "model:\n  d_model: 64\n  d_model: 32",
        "line 3: the key 'd_model' is written twice in one section; keep one",
    ),
    ("? [model]\n: 3", "line 1: a key must be a name, not a list or a mapping"),
    ("a: &a {b: *a}", "line 1: the alias *a stands inside the value that it repeats"),
    ("a: \x00", 'not valid YAML: unacceptable character #x0000: special characters are not allowed in '
     '"<unicode string>", position 3'),
    ("[" * 2000, "line 1: nested too deeply (more than 32 levels)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    UNKNOWN_KEYS + WRONG_TYPES + OUT_OF_RANGE + IMPOSSIBLE + BAD_YAML,
)
def test_a_wrong_file_is_answered_by_one_exact_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        StackWiseConfig.from_yaml(file)
    assert str(raised.value) == f"{file}: {message}"


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such config file$"):
        StackWiseConfig.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read as a config: Is a directory$"):
        StackWiseConfig.from_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml: not a config: the file is not UTF-8 text$"):
        StackWiseConfig.from_yaml(tmp_path / "binary.yaml")


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("training: {max_tokens: 1.5e9, optimizer: {lr: 3e-4, eps: 1E-8}}")
    training = StackWiseConfig.from_yaml(file).training
    assert (training.max_tokens, training.optimizer.lr, training.optimizer.eps) == (1_500_000_000, 3e-4, 1e-8)


def test_a_date_is_text(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: {source: files, path: 2024-01-31}")
    assert StackWiseConfig.from_yaml(file).data.path == "2024-01-31"


@pytest.mark.parametrize("text", ["", "# nothing", "model:\ntraining:\n  optimizer:\ndata:\n"])
def test_empty_files_and_sections_take_the_defaults(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert StackWiseConfig.from_yaml(file) == StackWiseConfig()


def test_from_dict_refuses_what_is_not_a_mapping() -> None:
    with pytest.raises(ConfigError, match="a config is a mapping with the sections model, training and data, not list"):
        StackWiseConfig.from_dict([])  # type: ignore[arg-type]
    assert StackWiseConfig.from_dict(None) == StackWiseConfig()


ENTRIES_THAT_FREEZE = [
    "{sweep: left_to_right}",
    "{unfreeze: right_to_left}",
    "{trains: [0]}",
    "{add: 1, trunk: frozen}",
]


@pytest.mark.parametrize("entry", ENTRIES_THAT_FREEZE)
def test_stacks_may_wait_off_the_device_where_some_phase_freezes_them(tmp_path: Path, entry: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"training: {{strategy: phases, offload: host, phases: [{{add: 1}}, {entry}]}}", encoding="utf-8")
    assert StackWiseConfig.from_yaml(file).training.offload == "host"


def test_what_a_first_entry_says_of_a_trunk_is_of_none() -> None:
    """A tied Rack may begin so, and a cache may come later: no Stack is trunk yet."""
    first = {"add": 1, "trunk": "frozen"}
    tied = {
        "model": {"tie_embeddings": True},
        "training": {"strategy": "phases", "phases": [first, {"add": 1, "trunk": "trainable"}]},
    }
    assert StackWiseConfig.from_dict(tied).model.tie_embeddings
    cached = {"strategy": "phases", "phases": [{"add": 1}, {"add": "each", "trunk": "frozen"}]}
    StackWiseConfig.from_dict({"training": {**cached, "progressive": {"cache_activations": True}}})


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"c\.yaml: is a named pipe; give a regular file$"):
        StackWiseConfig.from_yaml(tmp_path / "c.yaml")


def test_a_long_list_of_paths_does_not_make_a_long_message():
    with pytest.raises(
        ConfigError, match=r"is only used when source is files, huggingface or labelled \(source is python-stdlib\)$"
    ) as refused:
        StackWiseConfig.from_dict({"data": {"path": ["x"] * 30_000}})
    assert len(str(refused.value)) < 200
