"""Settings that are only used beside another: refused without it, taken with it."""

import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.rules import ONLY_USED
from stackwise.errors import ConfigError

CUSTOM = "model.attention_custom."
DIFFUSION = "training.progressive.training_objective=diffusion"
DEPTH, INPUT = (f"training.progressive.time_interpretation={kind}" for kind in ("depth", "input"))
FROZEN = "training.progressive.trunk_strategy=frozen"
PREFIX = (DIFFUSION, DEPTH, "training.diffusion.depth_variant=prefix")
WHEN_OPEN = (
    "attention_preset is efficient_gqa, mla_attention, kernel_attention, mlgka or custom (attention_preset is null)"
)
WHEN_LATENT = "attention_preset is mla_attention, mlgka or custom (attention_preset is null)"
WHEN_KERNEL = "attention_preset is kernel_attention, mlgka or custom (attention_preset is null)"
WHEN_MLA = "attention_type is mla"
WHEN_SHARED = "mla_latents is shared (mla_latents is separate)"
WHEN_KINDS = "kernel_type is gaussian, laplacian or uniform (kernel_type is linear)"
WHEN_LOGIT = "kernel_meaning is logit (kernel_meaning is weight)"
WHEN_DEPTH = "training.progressive.time_interpretation is depth (training.progressive.time_interpretation is null)"
WHEN_INPUT = "training.progressive.time_interpretation is input (training.progressive.time_interpretation is null)"
WHEN_DIFFUSION = "the objective is diffusion (the objective is clm)"
MHA, MLA = "model.attention_preset=custom", "model.attention_preset=mla_attention"
SEPARATE = (MLA, CUSTOM + "mla_latents=separate")
GAUSSIAN = "model.attention_preset=kernel_attention"
WEIGHT = (GAUSSIAN, CUSTOM + "kernel_meaning=weight")

# key=value, as it is shown; settings without which it is not used, and when it would be; settings with which it is.
LABELLED = ("data.source=labelled", "data.path=x.tsv", "training.progressive.training_objective=classification")
WHEN_LABELLED = "source is labelled (source is python-stdlib)"
CASES = [
    ("model.global_every=3", "3", (), "window is set (window is null)", ("model.window=8",)),
    ("model.local_rope_theta=100.5", "100.5", (), "window is set (window is null)", ("model.window=8",)),
    (
        f"{CUSTOM}attention_type=mla", "'mla'", (),
        "attention_preset is custom (attention_preset is null)", (MHA,),
    ),
    (
        f"{CUSTOM}attention_mode=causal", "'causal'", (),
        WHEN_OPEN,
        (GAUSSIAN,),
    ),
    (f"{CUSTOM}mla_rq=8", "8", (), WHEN_LATENT, (MLA,)),
    (f"{CUSTOM}mla_rq=8", "8", (MHA,), WHEN_MLA, (MHA, f"{CUSTOM}attention_type=mla")),
    (f"{CUSTOM}mla_rkv=8", "8", (), WHEN_LATENT, (MLA,)),
    (f"{CUSTOM}mla_rkv=8", "8", (MHA,), WHEN_MLA, (MHA, f"{CUSTOM}attention_type=mla")),
    (f"{CUSTOM}mla_latents=shared", "'shared'", (), WHEN_LATENT, ("model.attention_preset=mlgka",)),
    (f"{CUSTOM}mla_latents=shared", "'shared'", (MHA,), WHEN_MLA, (MHA, f"{CUSTOM}attention_type=mla")),
    (f"{CUSTOM}mla_rope_dim=6", "6", (), WHEN_LATENT, (MLA,)),
    (f"{CUSTOM}mla_rope_dim=6", "6", (MHA,), WHEN_MLA, (MHA, f"{CUSTOM}attention_type=mla")),
    (f"{CUSTOM}mla_rope_dim=6", "6", SEPARATE, WHEN_SHARED, (MLA,)),
    (f"{CUSTOM}mla_rope_dim=6", "6", (MLA, "model.use_rope=false"), "use_rope is true (use_rope is false)", (MLA,)),
    (f"{CUSTOM}mla_v_head_dim=5", "5", (), WHEN_LATENT, (MLA,)),
    (f"{CUSTOM}mla_v_head_dim=5", "5", (MHA,), WHEN_MLA, (MHA, f"{CUSTOM}attention_type=mla")),
    (f"{CUSTOM}mla_v_head_dim=5", "5", SEPARATE, WHEN_SHARED, (MLA,)),
    (f"{CUSTOM}kernel_type=uniform", "'uniform'", (), WHEN_KERNEL, (GAUSSIAN,)),
    (f"{CUSTOM}kernel_dim=6", "6", (), WHEN_KERNEL, (GAUSSIAN,)),
    (f"{CUSTOM}kernel_dim=6", "6", (MHA,), WHEN_KINDS, (MHA, f"{CUSTOM}kernel_type=uniform")),
    (f"{CUSTOM}kernel_dim=6", "6", WEIGHT, WHEN_LOGIT, (GAUSSIAN,)),
    (f"{CUSTOM}kernel_meaning=weight", "'weight'", (), WHEN_KERNEL, (GAUSSIAN,)),
    (f"{CUSTOM}kernel_meaning=weight", "'weight'", (MHA,), WHEN_KINDS, (MHA, f"{CUSTOM}kernel_type=laplacian")),
    (f"{CUSTOM}kernel_norm=l1", "'l1'", (), WHEN_KERNEL, (GAUSSIAN,)),
    (f"{CUSTOM}kernel_bandwidth=2", "2.0", (), WHEN_KERNEL, (GAUSSIAN,)),
    (f"{CUSTOM}kernel_bandwidth=2", "2.0", (MHA,), WHEN_KINDS, WEIGHT),
    (f"{CUSTOM}learned_temperature=true", "true", (), WHEN_KERNEL, (GAUSSIAN,)),
    (f"{CUSTOM}learned_temperature=true", "true", (MHA,), WHEN_KINDS, (MHA, f"{CUSTOM}kernel_type=gaussian")),
    (f"{CUSTOM}learned_temperature=true", "true", WEIGHT, WHEN_LOGIT, (GAUSSIAN,)),
    *(
        (
            f"model.tokenizer_embedding.{setting}", shown, (),
            "family is set (family is null)", ("model.tokenizer_embedding.family=f",),
        )
        for setting, shown in (
            ("embedding_option=embed_tokens", "'embed_tokens'"),
            ("adapter_hidden_dim=7", "7"),
            ("embedding_dim=7", "7"),
        )
    ),
    (
        "training.end_to_end_scope=blockwise", "'blockwise'", (),
        "strategy is end_to_end (strategy is progressive)", ("training.strategy=end_to_end",),
    ),
    (
        "training.phases=[{trains: all}]", "", ("training.strategy=end_to_end",),
        "strategy is phases (strategy is end_to_end)", ("training.strategy=phases",),
    ),
    *(
        (f"training.optimizer.{setting}", shown, ("training.optimizer.optimizer_type=sgd",),
         "optimizer_type is adamw or muon (optimizer_type is sgd)", ("training.optimizer.optimizer_type=muon",))
        for setting, shown in (("betas=[0.5, 0.7]", "[0.5, 0.7]"), ("eps=0.5", "0.5"), ("moments=int8", "'int8'"))
    ),
    (
        "training.optimizer.momentum=0.7", "0.7", (),
        "optimizer_type is muon or sgd (optimizer_type is adamw)", ("training.optimizer.optimizer_type=sgd",),
    ),
    *(
        (f"training.qlora.{pattern}=increasing", "'increasing'", (),
         "strategy is progressive or variable (strategy is simplified)", ("training.qlora.strategy=progressive",))
        for pattern in ("rank_pattern", "alpha_pattern")
    ),
    (
        "training.masking.span_length=5", "5.0", ("training.masking.unit=word",),
        "unit is span (unit is word)", ("training.masking.unit=span",),
    ),
    (
        "training.masking.stack_rates=[0.7, 0.5, 0.3, 0.2]", "[0.7, 0.5, 0.3, 0.2]", (),
        "the objective is mlm (the objective is clm)", ("training.progressive.training_objective=mlm",),
    ),
    (
        "training.masking.stack_rates=[0.7, 0.5, 0.3, 0.2]", "[0.7, 0.5, 0.3, 0.2]",
        ("training.progressive.training_objective=mlm", "training.strategy=end_to_end"),
        "strategy is progressive (strategy is end_to_end)", ("training.progressive.training_objective=mlm",),
    ),
    (
        "training.classification.classes=3", "", (), "the objective is classification (the objective is clm)",
        ("training.progressive.training_objective=classification",),
    ),
    ("training.evaluation.draws=3", "3", (), WHEN_DIFFUSION, (DIFFUSION,)),
    (DEPTH, "'depth'", (), WHEN_DIFFUSION, (DIFFUSION,)),
    ("training.diffusion.weight_power=0.5", "", (), WHEN_DIFFUSION, (DIFFUSION,)),
    ("training.diffusion.depth_variant=prefix", "'prefix'", (DIFFUSION,), WHEN_DEPTH, (DIFFUSION, DEPTH)),
    ("training.diffusion.levels=cosine", "'cosine'", (DIFFUSION,), WHEN_DEPTH, (DIFFUSION, DEPTH)),
    (
        "training.diffusion.difficulty=[[0.5, 2.0]]", "[[0.5, 2.0]]", (DIFFUSION,), WHEN_DEPTH,
        (DIFFUSION, DEPTH, "training.diffusion.levels=equal_difficulty"),
    ),
    (
        "training.diffusion.difficulty=[[0.5, 2.0]]", "[[0.5, 2.0]]",
        (DIFFUSION, DEPTH, "training.diffusion.levels=[1, 0.7, 0.5, 0.2, 0]"),
        "levels is equal_difficulty (levels is 1.0, 0.7, 0.5, 0.2, 0.0)",
        (DIFFUSION, DEPTH, "training.diffusion.levels=equal_difficulty"),
    ),
    ("training.diffusion.expert=0", "0", (DIFFUSION,), WHEN_DEPTH, (DIFFUSION, DEPTH, FROZEN)),
    ("training.diffusion.condition=masked", "'masked'", (DIFFUSION,), WHEN_INPUT, (DIFFUSION, INPUT)),
    ("training.diffusion.time_embedding=learned", "'learned'", (DIFFUSION,), WHEN_INPUT, (DIFFUSION, INPUT)),
    ("training.diffusion.time_dim=6", "6", (DIFFUSION,), WHEN_INPUT, (DIFFUSION, INPUT)),
    (
        "training.diffusion.min_rate=0.01", "0.01", (DIFFUSION, "training.diffusion.weighting=exact_counts"),
        "weighting is stratified (weighting is exact_counts)", (DIFFUSION,),
    ),
    (
        "data.path=x.txt", "'x.txt'", (),
        "source is files, huggingface or labelled (source is python-stdlib)", ("data.source=files",),
    ),
    (
        "training.early_stopping.patience=3", "", (),
        "training.evaluation.every_steps is set (training.evaluation.every_steps is null)",
        ("training.evaluation.every_steps=5",),
    ),
    (
        "training.early_stopping.min_improvement=0.5", "0.5", ("training.evaluation.every_steps=5",),
        "patience is set (patience is null)",
        ("training.evaluation.every_steps=5", "training.early_stopping.patience=3"),
    ),
    (
        "training.early_stopping.ends=phase", "'phase'", ("training.evaluation.every_steps=5",),
        "patience is set (patience is null)",
        ("training.evaluation.every_steps=5", "training.early_stopping.patience=3"),
    ),
    ("data.validation_path=x.tsv", "'x.tsv'", (), WHEN_LABELLED, LABELLED),
    ("data.columns.label=x", "", (), WHEN_LABELLED, LABELLED),
    (
        "training.classification.names=[neg, pos]", "['neg', 'pos']", LABELLED[2:],
        "data.source is labelled (data.source is python-stdlib)", LABELLED,
    ),
    (
        "data.tokenizer.path=t.json", "'t.json'", (),
        "kind is pretrained (kind is bpe)", ("data.tokenizer.kind=pretrained",),
    ),
]  # fmt: skip
ENTRIES = [
    ("at: left", "'left'", "trains: all", "add: 1"),
    ("init: random", "'random'", "sweep: left_to_right", "add: rest"),
    ("trunk: frozen", "'frozen'", "unfreeze: right_to_left", "add: each"),
    ("precision: full", "'full'", "trains: [0]", "add: 1"),
    ("cycles: 2", "2", "add: 1", "sweep: left_to_right"),
    ("unit: block", "'block'", "trains: all", "sweep: right_to_left"),
    ("group: 2", "2", "add: 1", "sweep: left_to_right"),
]
"""A key of an entry, as it is shown; an entry that does not use it, and one that does."""


@pytest.mark.parametrize(("setting", "shown", "without", "when", "beside"), CASES)
def test_a_setting_is_refused_where_nothing_uses_it_and_taken_where_something_does(
    setting, shown, without, when, beside
):
    key = setting.partition("=")[0]
    sections = ("training.classification", "training.diffusion", "training.early_stopping", "data.columns")
    whole = next((part for part in sections if key.startswith(part)), key)
    with pytest.raises(ConfigError) as refused:
        StackWiseConfig.from_dict({}, [*without, setting])
    found = str(refused.value)
    assert found == (f"{key}: {shown} is only used when {when}" if shown else f"{whole}: is only used when {when}")
    taken, default = StackWiseConfig.from_dict({}, [*beside, setting]).to_dict(), StackWiseConfig().to_dict()
    for name in key.split("."):
        taken, default = taken[name], default[name]
    assert taken != default


@pytest.mark.parametrize(("setting", "shown", "other", "own"), ENTRIES)
def test_a_key_of_a_phase_is_refused_in_an_entry_of_another_kind(setting, shown, other, own):
    def read(entry):
        phases = f"[{{add: 1}}, {{{entry}, {setting}}}]"
        return StackWiseConfig.from_dict({}, ["training.strategy=phases", f"training.phases={phases}"])

    key, kind, there = setting.partition(":")[0], own.partition(":")[0], other.partition(":")[0]
    with pytest.raises(ConfigError) as refused:
        read(other)
    expected = f"{shown} is only used in an entry with {kind} (this entry has {there})"
    assert str(refused.value) == f"training.phases[1].{key}: {expected}"
    assert getattr(read(own).training.phases[1], key) is not None


@pytest.mark.parametrize("setting", ["weighting=exact_counts", "weight_power=0.5"])
def test_stacks_with_one_rate_each_have_no_weighting(setting):
    key, _, value = setting.partition("=")
    with pytest.raises(ConfigError, match=rf"{key}: .*{value}.* has no effect when depth_variant is prefix"):
        StackWiseConfig.from_dict({}, [*PREFIX, f"training.diffusion.{setting}"])
    StackWiseConfig.from_dict({}, [*PREFIX[:2], f"training.diffusion.{setting}"])


def test_groups_are_of_whole_stacks():
    def groups_of(unit):
        phases = [{"add": 1}, {"sweep": "left_to_right", "group": 2, "unit": unit}]
        return StackWiseConfig.from_dict({"training": {"strategy": "phases", "phases": phases}})

    with pytest.raises(ConfigError, match=r"phases\[1\]\.group: 2 is only used when unit is stack \(unit is block\)$"):
        groups_of("block")
    assert groups_of("stack").training.phases[1].group == 2


def test_every_key_of_the_table_is_tried_here():
    tried = {setting.partition("=")[0] for setting, *_ in CASES}
    tried |= {f"training.phases[].{setting.partition(':')[0]}" for setting, *_ in ENTRIES}
    tried |= {"training.classification", "training.diffusion", "training.diffusion.weighting", "data.columns"}
    tried |= {"training.early_stopping", "data.sources[].path"}  # entries of sources: tests/data/test_mixture.py
    tried -= {"training.classification.classes", "training.early_stopping.patience", "data.columns.label"}
    assert {row.key for row in ONLY_USED} == tried
    assert len(ONLY_USED) == len(CASES) + len(ENTRIES) + 4  # two of weighting, one of groups, one of sources
