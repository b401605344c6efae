"""The shipped sizes load, build, and have the published numbers of parameters."""

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from stackwise.config import StackWiseConfig
from stackwise.model.architecture import Rack, rack_spec_from_config

FOLDER = Path(__file__).parents[2] / "configs" / "models"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))

# The checkpoints' own numbers: gpt2 … gpt2-xl, bert-base-uncased and -large with their masked-language heads,
# BERT-tiny, stories15M and stories110M, Llama 3.2 1B, Llama 2 7B, Llama 3 70B, ModernBERT-base and -large.
PUBLISHED = {
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "bert_tiny": 4_416_698,
    "bert_base": 109_514_298,
    "bert_large": 335_174_458,
    "llama_15m": 15_191_712,
    "llama_110m": 109_529_856,
    "llama_1b": 1_235_814_400,
    "llama_7b": 6_738_415_616,
    "llama_70b": 70_553_706_496,
    "modernbert_base": 149_655_232,
    "modernbert_large": 395_881_664,
}


def config_of(name):
    return StackWiseConfig.from_yaml(FOLDER / f"{name}.yaml")


def count(module):
    return sum(p.numel() for p in module.parameters())


def rack_of(name):
    config = config_of(name)
    stacks = range(config.model.architecture.n_stacks)
    with torch.device("meta"):
        return Rack(rack_spec_from_config(config, stacks, config.model.vocab_size))


def theirs(name):
    """The model of transformers with the same sizes, without values."""
    spec = rack_of(name).spec
    block = spec.blocks[-1]
    shared = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "intermediate_size": block.d_ff,
        "num_hidden_layers": len(spec.blocks),
        "num_attention_heads": block.attention.n_heads,
        "tie_word_embeddings": spec.tie_embeddings,
    }
    with torch.device("meta"):
        if name.startswith("bert"):
            return BertForMaskedLM(BertConfig(**shared))
        if name.startswith("modernbert"):
            return ModernBertForMaskedLM(ModernBertConfig(**shared))
        if name.startswith("gpt2"):
            sizes = {"n_embd": spec.d_model, "n_layer": len(spec.blocks), "n_head": block.attention.n_heads}
            return GPT2LMHeadModel(GPT2Config(vocab_size=spec.vocab_size, **sizes))
        if name.startswith("llama"):
            return LlamaForCausalLM(LlamaConfig(**shared, num_key_value_heads=block.attention.n_kv_heads))
        return DeepseekV3ForCausalLM(
            DeepseekV3Config(
                **shared,
                num_key_value_heads=block.attention.n_kv_heads,
                q_lora_rank=block.attention.r_q,
                kv_lora_rank=block.attention.r_kv,
                qk_nope_head_dim=spec.d_model // block.attention.n_heads,
                qk_rope_head_dim=block.attention.rope_dim,
                v_head_dim=block.attention.v_head_dim,
                first_k_dense_replace=len(spec.blocks),
            )
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_size_has_as_many_parameters_as_its_model_in_transformers(name):
    if name == "mlgka_small":  # there is none: by hand
        d, f, kv, r = 384, 1024, 2 * 64, 96
        attention = d * r + r * d + 2 * (d * r + r * kv) + d * d
        expected = 32000 * d + 8 * (attention + 3 * d * f + 2 * d) + d
    else:
        expected = count(theirs(name))
        if name.startswith("bert"):  # theirs has two kinds of segments and no norm at the end: as many, by chance
            width = rack_of(name).d_model
            assert 2 * width == count(rack_of(name).norm)
    assert count(rack_of(name)) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_size_has_its_published_number_of_parameters(name):
    assert count(rack_of(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_line_of_a_size_says_how_large_it_is(name):
    about = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    number, unit = re.findall(r"([0-9.]+) (M|B) parameters", about)[0]
    said = float(number) * {"M": 1e6, "B": 1e9}[unit]
    assert abs(count(rack_of(name)) / said - 1) < 0.005


@pytest.mark.parametrize("name", NAMES)
def test_a_size_reads_in_its_objective_s_direction_and_grows(name):
    config = config_of(name)
    mode = "bidirectional" if "bert" in name else "causal"
    assert config.attention_mode == mode
    assert config.training.strategy == "progressive" and config.target_stacks > 1
