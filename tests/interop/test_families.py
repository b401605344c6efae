"""Models of transformers as Racks and back: logits, gradients, generated tokens."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import stackwise
from stackwise.errors import UserError
from stackwise.generation.autoregressive import generate, pad_prompts
from stackwise.interop.export import export_rack, export_run
from stackwise.interop.families import FAMILIES, choose_family
from stackwise.interop.importing import import_folder, rack_from_folder
from stackwise.model.architecture import BlockSpec, RackSpec, create_rack_from_spec, rack_spec_from_config

V, C, F, L, T = 71, 24, 34, 3, 13
SHARED = {
    "vocab_size": V, "hidden_size": C, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": 4,
    "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LATENT = {"kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 7, "num_key_value_heads": 4}

THEIRS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHARED, num_key_value_heads=2, rms_norm_eps=1e-5)),
    "llama, tied, wide heads": lambda: LlamaForCausalLM(
        LlamaConfig(**SHARED, num_key_value_heads=1, head_dim=10, tie_word_embeddings=True,
                    rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHARED, num_key_value_heads=2, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_positions=32, n_embd=C, n_layer=L, n_head=4, n_inner=F, bos_token_id=0,
                   eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**{**SHARED, "num_hidden_layers": 5}, local_attention=6, cls_token_id=0, sep_token_id=0,
                         global_attn_every_n_layers=2, max_position_embeddings=64)
    ),
    "modernbert, biases": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**SHARED, local_attention=6, cls_token_id=0, sep_token_id=0, attention_bias=True,
                         mlp_bias=True, classifier_bias=True, norm_bias=True, max_position_embeddings=64)
    ),
    "gpt2, untied": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_positions=32, n_embd=C, n_layer=L, n_head=2, bos_token_id=0, eos_token_id=0,
                   tie_word_embeddings=False)
    ),
    "modernbert, untied, odd window": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**SHARED, local_attention=7, cls_token_id=0, sep_token_id=0, tie_word_embeddings=False,
                         max_position_embeddings=64)
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(**SHARED, **LATENT, q_lora_rank=9, first_k_dense_replace=L, num_mtp_layers=0)
    ),
    "deepseek_v3, full queries": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(**SHARED, **LATENT, q_lora_rank=None, first_k_dense_replace=L, num_mtp_layers=0,
                         tie_word_embeddings=True)
    ),
}  # fmt: skip

IDS = torch.randint(1, V, (3, T), generator=torch.Generator().manual_seed(2))


def random_model(name):
    """With weights, norms and biases that differ from their initial values."""
    torch.manual_seed(3)
    model = THEIRS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape) * spread + (parameter.dim() == 1))
    return model


def tokenizer_into(folder):
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=V, special_tokens=["<|endoftext|>", "<|pad|>", "[MASK]"], show_progress=False
    )
    library.train_from_iterator(["a rack of stacks, a stack of blocks, block after block"], trainer)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"})
    )


def padding(side):
    mask = torch.ones(3, T, dtype=torch.bool)
    if side == "left":
        mask[0, :4] = mask[2, :1] = False
    if side == "right":
        mask[0, 9:] = mask[1, 12:] = False
    return mask


def logits_of(model, ids, side):
    """Of transformers; positions count real tokens where its class takes them."""
    if side is None:
        return model(ids).logits
    mask = padding(side)
    extra = {}
    if side == "left" and "Bert" not in type(model).__name__:
        extra["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask.long(), **extra).logits


def assert_equal(rack, model, side):
    mask = padding(side)
    ours, theirs = rack(IDS, None if side is None else mask), logits_of(model, IDS, side)
    torch.testing.assert_close(ours[mask], theirs[mask], atol=3e-5, rtol=1e-5)


def assert_gradients_equal(rack, model):
    rack.requires_grad_(True)
    rack.zero_grad(), model.zero_grad()
    weight = torch.randn(3, T, V, generator=torch.Generator().manual_seed(4)) / T
    for out in (rack(IDS), model(IDS).logits):
        (out * weight).sum().backward()
    theirs = dict(model.named_parameters())
    own = {name: p.grad for name, p in rack.named_parameters()}
    family = choose_family(rack.spec, 32)
    for entry in family.entries(rack.spec):
        torch.testing.assert_close(entry.join(own), theirs[entry.theirs].grad, atol=1e-4, rtol=1e-4, msg=entry.theirs)


def greedy(rack, prompts, n=6):
    ids, mask = pad_prompts(prompts, 0)
    tokens = torch.stack(list(generate(rack, ids, n, temperature=0, attention_mask=mask)), 1)
    return tokens.tolist()


@pytest.mark.parametrize("name", THEIRS)
def test_an_imported_model_is_the_same_function_and_goes_back_as_the_same_class(name, tmp_path):
    model = random_model(name)
    model.save_pretrained(tmp_path / "theirs")
    rack = rack_from_folder(tmp_path / "theirs", n_stacks=2)
    assert [s.stack_id for s in rack.stacks] == [0, 1]
    for side in (None, "left", "right"):
        assert_equal(rack, model, side)
    assert_gradients_equal(rack, model)

    result = export_rack(rack, None, tmp_path / "ours", 64)
    assert result["architecture"] == type(model).__name__ and not result["remote_code"]
    auto = AutoModelForMaskedLM if "Bert" in result["architecture"] else AutoModelForCausalLM
    assert result["auto_class"] == auto.__name__
    back, report = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(back) is type(model) and not report["missing_keys"] and not report["unexpected_keys"]
    for (key, a), b in zip(model.state_dict().items(), back.state_dict().values()):
        assert torch.equal(a, b), key
    assert_equal(rack, back.eval(), "right")

    if auto is AutoModelForCausalLM:
        prompts = [IDS[0].tolist(), IDS[1, :5].tolist(), IDS[2, :9].tolist()]
        expected = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = back.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
            expected.append(out[0, len(prompt) :].tolist())
        assert greedy(rack, prompts) == expected
        ids, mask = pad_prompts(prompts, 0)
        out = back.generate(
            ids, attention_mask=mask.long(), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert out[:, ids.shape[1] :].tolist() == expected


def test_a_run_made_of_a_folder_loads_generates_and_is_exported_with_its_tokenizer(tmp_path):
    model = random_model("llama")
    model.save_pretrained(tmp_path / "theirs")
    tokenizer_into(tmp_path / "theirs")
    result = import_folder(tmp_path / "theirs", tmp_path / "run", 2)
    assert result == {"family": "LlamaForCausalLM", "stacks": 2, "blocks": 3, "parameters": model.num_parameters()}
    run = stackwise.load(tmp_path / "run")
    assert run.config.model.architecture.blocks_per_stack == (2, 1)
    torch.testing.assert_close(run.rack(IDS), model(IDS).logits, atol=1e-5, rtol=1e-5)
    export_run(tmp_path / "run", tmp_path / "ours")
    text = "a stack of blocks"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == run.tokenizer.encode(text).tolist() and tokenizer.decode(ids) == text
    assert ids == AutoTokenizer.from_pretrained(tmp_path / "theirs")(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token_id == run.tokenizer.end_id and tokenizer.pad_token_id == run.tokenizer.pad_id


def specs():
    """Specs of every family, and one step away from each in every field that changes the function."""
    for name in THEIRS:
        with torch.device("meta"):
            config = THEIRS[name]().config.to_dict()
        family = FAMILIES[config["model_type"]]
        settings = family.config(config, 1)
        yield name, family, rack_spec_from_config(settings, (0,), V)


BLOCK_CHANGES = {
    "attention_mode": lambda v: "causal" if v == "bidirectional" else "bidirectional",
    "use_rope": lambda v: not v,
    "norm_eps": lambda v: v * 3,
    "norm": lambda v: "layernorm" if v == "rmsnorm" else "rmsnorm",
    "attention_norm": lambda v: not v,
    "ffn": lambda v: "gelu" if v != "gelu" else "swiglu",
    "bias": lambda v: not v,
    "window": lambda v: 4 if v is None else None,
    "kernel_type": lambda v: "gaussian",
    "d_ff": lambda v: v + 1,
    "rope_theta": lambda v: v * 2,
    "qk_norm": lambda v: not v,
}
RACK_CHANGES = {
    "norm_eps": lambda v: v * 3,
    "embedding_norm": lambda v: not v,
    "mlm_head": lambda v: not v,
    "learned_positions": lambda v: 64 if v is None else None,
}


@pytest.mark.parametrize("name, family, spec", list(specs()), ids=list(THEIRS))
def test_a_spec_that_differs_in_one_thing_is_never_exported_as_the_family(name, family, spec):
    assert choose_family(spec, 32) is family
    for field, change in BLOCK_CHANGES.items():
        blocks, fields = list(spec.blocks), spec.blocks[-1].to_dict()
        if field == "rope_theta" and not fields["use_rope"]:
            continue  # read by nothing there
        blocks[-1] = BlockSpec.from_dict({**fields, field: change(fields[field])})
        other = spec.with_stacks((tuple(blocks),), (0,))
        assert choose_family(other, 32) is None, (name, field)
    for field, change in RACK_CHANGES.items():
        other = dataclasses.replace(spec, **{field: change(getattr(spec, field))})
        assert choose_family(other, 32) is None, (name, field)


REFUSED = [
    ({"model_type": "llamb"}, "model_type: 'llamb' cannot be imported; allowed: llama, qwen3, deepseek_v3, gpt2, "
     "modernbert; did you mean llama?"),
    ({"hidden_act": "gelu"}, "config.json: hidden_act: 'gelu' cannot be expressed as a Rack; allowed: silu"),
    ({"attention_bias": True}, "config.json: attention_bias: True cannot be expressed as a Rack; allowed: false"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
     "config.json: rope_parameters.rope_type: 'llama3' cannot be expressed as a Rack; allowed: default"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
     "config.json: rope_scaling.type: 'linear' cannot be expressed as a Rack; allowed: default"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: 'awq' weights cannot be imported; use "
     "full ones"),
    ({"num_hidden_layers": 2},
     "the tensor model.layers.2.input_layernorm.weight has no counterpart in a Rack (9 such "
     "tensors); the layers differ from those of LlamaForCausalLM"),
    ({"num_hidden_layers": 4}, "the weights of model.layers.3.input_layernorm.weight are missing (9 in all)"),
    ({"intermediate_size": 35}, "model.layers.0.mlp.gate_proj.weight has the shape (34, 24); config.json says "
     "(35, 24)"),
    ({"vocab_size": "many"}, "config.json: vocab_size: 'many' is not a positive whole number"),
]  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    random_model("llama").save_pretrained(folder)
    tokenizer_into(folder)
    return folder


@pytest.mark.parametrize("changes, message", REFUSED, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(REFUSED)])
def test_what_cannot_be_imported_is_refused_in_one_line_and_nothing_is_written(llama, tmp_path, changes, message):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for file in llama.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((llama / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        import_folder(folder, tmp_path / "run")
    assert str(error.value).endswith(message) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


ODD = [None, True, -2, 0.5, "x", [1], {"a": 1}, 10**9]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "modernbert", "deepseek_v3"])
def test_no_value_in_a_config_breaks_the_import(name, tmp_path):
    # What transformers makes of a value that is let through is the subject of the tests of equality.
    random_model(name).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    unread = ("_token_id", "dropout", "pdrop", "_range", "_version", "dtype", "use_cache", "architectures")
    read = [key for key in config if not key.endswith(unread) and not key.startswith("summary_")]
    for key in [*read, "rope_theta", "rope_scaling", "layer_types", "quantization_config", "head_dim"]:
        refused = 0
        for value in ODD:
            file.write_text(json.dumps({**config, key: value}))
            try:
                rack_from_folder(tmp_path)
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
        if key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "n_embd", "n_layer", "n_head"):
            assert refused == len(ODD), key


OVERRIDES = [
    ("deepseek_v3", {"head_dim": 4}, "head_dim: 4 cannot be expressed as a Rack; allowed: 6, None"),
    ("modernbert", {"sliding_window": 2}, "sliding_window: 2 cannot be expressed as a Rack; allowed: 3, None"),
    ("modernbert", {"rope_scaling": {"type": "linear", "factor": 2.0}},
     "rope_scaling.type: 'linear' cannot be expressed as a Rack; allowed: default"),
    ("modernbert", {"layer_types": ["full_attention"]},
     "layer_types: ['full_attention'] must name one of full_attention, sliding_attention for each layer"),
    ("gpt2", {"num_hidden_layers": 2}, "num_hidden_layers: 2 cannot be expressed as a Rack; allowed: 3, None"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True},
     "scale_attn_by_inverse_layer_idx: True cannot be expressed as a Rack; allowed: false"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window: True cannot be expressed as a Rack; allowed: false"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 cannot be expressed as a Rack; "
     "allowed: 1, None"),
]  # fmt: skip


@pytest.mark.parametrize("name, changes, message", OVERRIDES)
def test_a_setting_that_transformers_would_read_otherwise_is_refused(name, changes, message, tmp_path):
    random_model(name).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(UserError) as error:
        rack_from_folder(tmp_path)
    assert str(error.value) == f"config.json: {message}"


def test_a_checkpoint_without_its_prefix_and_with_masks_is_read(tmp_path):
    # As GPT-2 was published.
    model = random_model("gpt2")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_equal(rack_from_folder(tmp_path), model, "right")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_read_as_they_are(dtype, tmp_path):
    random_model("llama").to(dtype).save_pretrained(tmp_path)
    rack = rack_from_folder(tmp_path)
    assert {p.dtype for p in rack.parameters()} == {torch.float32}
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(rack(IDS), model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_weights_that_are_no_numbers_are_refused(llama, tmp_path):
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} has the type torch.int8; weights must be floating-point numbers"):
        rack_from_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        rack_from_folder(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_weights_that_are_not_finite_are_refused_and_nothing_is_written(llama, tmp_path, name, value):
    folder = tmp_path / "theirs"
    shutil.copytree(llama, folder)
    tensors = load_file(llama / "model.safetensors")
    tensors[name] = tensors[name].clone()
    tensors[name][2, 1] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        import_folder(folder, tmp_path / "run")
    assert str(error.value) == f"{folder}/model.safetensors: {name} holds 1 values that are NaN or infinite in fp32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_experts_and_pickles_are_refused(llama, tmp_path):
    model = DeepseekV3Config(**SHARED, **LATENT, q_lora_rank=9, first_k_dense_replace=1)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="first_k_dense_replace: 1 leaves experts in 2 of 3 layers"):
        rack_from_folder(tmp_path)
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickles, which are never loaded"):
        rack_from_folder(tmp_path)
    with pytest.raises(
        UserError, match="--stacks: 4 is out of range; must be at least 1 and at most 3, the number of layers"
    ):
        rack_from_folder(llama, 4)


def test_shards_hold_what_one_file_holds(llama, tmp_path, monkeypatch):
    rack = rack_from_folder(llama)
    monkeypatch.setattr("stackwise.interop.export.SHARD_BYTES", 9000)
    export_rack(rack, None, tmp_path / "ours", 64)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 3
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(IDS).logits, rack(IDS))
    assert torch.equal(rack_from_folder(tmp_path / "ours")(IDS), rack(IDS))
    with pytest.raises(UserError, match="already exists"):
        export_rack(rack, None, tmp_path / "ours", 64)


def test_a_spec_goes_through_json(llama):
    spec = rack_from_folder(llama, 2).spec
    assert RackSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert create_rack_from_spec(spec).spec == spec


def test_a_tied_checkpoint_may_hold_its_matrix_twice_but_no_other_one(tmp_path):
    model = random_model("llama, tied, wide heads")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    table = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": table.clone()}, file)
    assert_equal(rack_from_folder(tmp_path), model, None)
    save_file({**tensors, "lm_head.weight": table + 1}, file)
    with pytest.raises(UserError, match=r"config.json ties the embeddings, but lm_head.weight is another matrix"):
        rack_from_folder(tmp_path)


def test_a_model_of_local_layers_alone_is_no_modernbert(tmp_path):
    # Versions of transformers before 5 would let its first layer see all tokens.
    model = ModernBertForMaskedLM(
        ModernBertConfig(**SHARED, local_attention=6, layer_types=["sliding_attention"] * L, cls_token_id=0,
                         sep_token_id=0, max_position_embeddings=64)
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path)
    rack = rack_from_folder(tmp_path)
    assert_equal(rack, model, "right")
    assert choose_family(rack.spec, 64) is None
