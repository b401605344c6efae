import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stackwise.config import StackWiseConfig
from stackwise.errors import ConfigError
from stackwise.model.architecture import (
    create_block_spec,
    create_rack_from_config,
    create_rack_from_specs,
    create_simple_rack,
)
from stackwise.model.initialisation import RESIDUAL_OUTPUTS
from stackwise.model.reading import Reading

V, C, F, H, G = 37, 30, 52, 3, 1
B, T = 2, 11


def rack_and_ids(**settings):
    rack = create_simple_rack(2, 3, C, F, H, V, n_kv_heads=G, **settings)
    return rack, torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))


def llama_with_the_weights_of(rack, tied):
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=C,
        intermediate_size=F,
        num_hidden_layers=6,
        num_attention_heads=H,
        num_key_value_heads=G,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    llama = LlamaForCausalLM(config)
    pairs = {"model.embed_tokens.weight": rack.embedding.weight, "model.norm.weight": rack.norm.weight}
    if not tied:
        pairs["lm_head.weight"] = rack.head.weight
    for i, block in enumerate(rack.blocks()):
        layer = f"model.layers.{i}"
        pairs[f"{layer}.input_layernorm.weight"] = block.attention_norm.weight
        pairs[f"{layer}.post_attention_layernorm.weight"] = block.ffn_norm.weight
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            pairs[f"{layer}.self_attn.{name}.weight"] = getattr(block.attention, name).weight
        for name in ("gate_proj", "up_proj", "down_proj"):
            pairs[f"{layer}.mlp.{name}.weight"] = getattr(block.ffn, name).weight
    theirs = dict(llama.named_parameters())
    assert theirs.keys() == pairs.keys()
    with torch.no_grad():
        for name, parameter in pairs.items():
            theirs[name].copy_(parameter)
    return llama, pairs


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_gradients_equal_llama_with_the_same_weights(tied, padded):
    rack, ids = rack_and_ids(tie_embeddings=tied)
    with torch.no_grad():  # norms and embeddings that differ from their simple initial values
        for parameter in rack.parameters():
            g = torch.Generator().manual_seed(parameter.numel())
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    llama, pairs = llama_with_the_weights_of(rack, tied)
    mask = torch.ones(B, T, dtype=torch.bool)
    if padded:
        mask[0, 8:] = False
    logits = rack(ids, mask if padded else None)
    expected = llama(ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(logits[mask], expected[mask], atol=1e-5, rtol=1e-5)
    targets = torch.where(mask, ids.roll(-1, 1), -100)
    rack.cross_entropy(rack(Reading(ids, mask)), targets, 1 / B).backward()
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum") / B
    loss.backward()
    theirs = dict(llama.named_parameters())
    for name, parameter in pairs.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("padded", [False, True])
def test_no_future_token_changes_a_past_logit(padded):
    rack, ids = rack_and_ids()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 9:] = False
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % V
    before, after = (rack(i, mask if padded else None) for i in (ids, changed))
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
def test_padding_on_either_side_changes_nothing(side, mode):
    rack, ids = rack_and_ids(attention_mode=mode)
    pad = torch.zeros(B, 4, dtype=torch.long)
    blank = torch.zeros(B, 4, dtype=torch.bool)
    order = (lambda a, b: (b, a)) if side == "left" else (lambda a, b: (a, b))
    padded = torch.cat(order(ids, pad), 1)
    mask = torch.cat(order(torch.ones_like(ids, dtype=torch.bool), blank), 1)
    out = rack(padded, mask)[mask].view(B, T, V)
    torch.testing.assert_close(out, rack(ids), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_cached_decoding_equals_the_full_forward_pass(padded):
    rack, ids = rack_and_ids()
    mask = torch.ones(B, T, dtype=torch.bool)
    if padded:
        mask[0, :3] = False
    cache = rack.make_cache(T)
    out = [rack(Reading(ids[:, :5], mask[:, :5] if padded else None, cache=cache))]
    out += [rack(Reading(ids[:, t : t + 1], cache=cache)) for t in range(5, T)]
    full = rack(ids, mask if padded else None)
    torch.testing.assert_close(rack.logits(torch.cat(out, 1))[mask], full[mask], atol=2e-6, rtol=1e-5)


def test_a_cache_refuses_what_it_cannot_hold_and_bidirectional_windows():
    rack, ids = rack_and_ids()
    with pytest.raises(ValueError, match="5 tokens; 6 do not fit"):
        cache = rack.make_cache(5)
        rack(Reading(ids[:, :5], cache=cache))
        rack(Reading(ids[:, 5:6], cache=cache))
    with pytest.raises(ValueError, match="without windows"):
        spec = create_block_spec(C, F, H, G, "bidirectional", window=4)
        create_rack_from_specs(V, C, [{"stack_id": 0, "n_blocks": 1, "block_spec": spec}]).make_cache(5)


def test_a_cache_of_blocks_reads_them_as_the_whole_text_where_each_sees_itself_and_what_is_before():
    rack, ids = rack_and_ids(attention_mode="bidirectional")
    whole = rack.logits(rack(Reading(ids, block_length=4)))
    cache = rack.make_cache(T)
    for start in range(0, T, 4):
        part = ids[:, start : start + 4]
        for other in (part.flip(1), part):  # what is read and taken back leaves no trace
            logits = rack.logits(rack(Reading(other, cache=cache)))
            if other is not part:
                cache.rewind(start)
        torch.testing.assert_close(logits, whole[:, start : start + 4], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="cannot go back to 12"):
        cache.rewind(12)


def test_activation_checkpointing_changes_neither_loss_nor_gradients():
    rack, ids = rack_and_ids()
    grads = []
    for on in (False, True):
        rack.checkpoint_activations(on)
        rack.zero_grad()
        rack(ids).square().mean().backward()
        grads.append([p.grad.clone() for p in rack.parameters()])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_initial_loss_is_that_of_a_uniform_guess():
    for tied in (False, True):
        rack, ids = rack_and_ids(tie_embeddings=tied)
        loss = torch.nn.functional.cross_entropy(rack(ids).flatten(0, 1), ids.roll(-1, 1).flatten())
        assert abs(loss.item() - torch.log(torch.tensor(float(V))).item()) < 0.1


def test_initial_values_follow_the_table():
    rack = create_simple_rack(2, 4, 128, 320, 4, 1009)
    expected = {"embedding": 0.02, "head": 0.02}
    for part, name, p in rack.part_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p))
            continue
        kind = name.split(".")[-2] if "." in name else ""
        std = expected.get(part) or (p.shape[1] * (2 * 8 if kind in RESIDUAL_OUTPUTS else 1)) ** -0.5
        assert abs(p.std().item() / std - 1) < 0.03 and abs(p.mean().item()) < 4 * std / p.numel() ** 0.5, (part, name)


def test_a_stack_starts_the_same_whenever_it_is_made():
    config = StackWiseConfig.from_dict({"model": {"vocab_size": V, "d_model": C, "n_heads": H}})
    whole = create_rack_from_config(config.to_dict())
    first = create_rack_from_config(config, n_stacks=1)
    for (name, a), b in zip(first.stacks[0].named_parameters(), whole.stacks[0].parameters()):
        assert torch.equal(a, b), name
    assert not torch.equal(whole.stacks[0].blocks[0].ffn.up_proj.weight, whole.stacks[1].blocks[0].ffn.up_proj.weight)


def test_unequal_stacks_from_specs():
    specs = [
        {"stack_id": 0, "n_blocks": 3, "block_spec": create_block_spec(C, F, H, attention_mode="bidirectional")},
        {"stack_id": 1, "n_blocks": 1, "block_spec": create_block_spec(C, 44, 5, 1, freeze_up_proj=True)},
    ]
    rack = create_rack_from_specs(V, C, specs)
    assert [b.attention.attention_mode for b in rack.blocks()] == ["bidirectional"] * 3 + ["causal"]
    assert rack.stacks[1].blocks[0].ffn.down_proj.weight.shape == (C, 44)
    assert rack(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, V)
    specs[1]["block_spec"] = create_block_spec(C + 2, F, 1)
    with pytest.raises(ValueError, match="d_model 30"):
        create_rack_from_specs(V, C, specs)


def test_the_documented_calls_work_verbatim():
    rack = create_simple_rack(n_stacks=2, blocks_per_stack=4, d_model=64, d_ff=128, n_heads=8, vocab_size=1000)
    assert len(rack.blocks()) == 8
    assert sum(p.numel() for p in rack.parameters()) == 8 * (4 * 64**2 + 3 * 64 * 128 + 2 * 64) + 64 + 2 * 1000 * 64


FULL, GROUPED = 4 * 48 * 48, 2 * 48 * 48 + 2 * 48 * (3 * 4)
PRESET_BLOCKS = {
    # name: (whether a token sees those after it, matrices' entries of one attention with 12 heads of 4)
    "bert_style": (True, FULL),
    "gpt_style": (False, FULL),
    "efficient_gqa": (False, GROUPED),
    "mla_attention": (False, None),
    "kernel_attention": (False, FULL),
    "mlgka": (False, None),
    "custom": (False, FULL),
}


@pytest.mark.parametrize("preset", PRESET_BLOCKS)
def test_a_block_spec_takes_an_attention_preset_as_a_config_does(preset):
    spec = create_block_spec(48, 37, 12, attention_preset=preset)
    rack = create_rack_from_specs(V, 48, [{"stack_id": 0, "n_blocks": 2, "block_spec": spec}])
    sees_all, entries = PRESET_BLOCKS[preset]
    matrices = sum(p.numel() for p in rack.stacks[0].blocks[0].attention.parameters() if p.dim() == 2)
    assert entries in (None, matrices)
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    other = torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % V), dim=1)
    assert torch.equal(rack(ids)[:, 0], rack(other)[:, 0]) != sees_all
    model = {"d_model": 48, "d_ff": 37, "n_heads": 12, "vocab_size": V, "attention_preset": preset,
             "architecture": {"n_stacks": 1, "blocks_per_stack": 2}}  # fmt: skip
    training = {"progressive": {"training_objective": "mlm" if sees_all else "clm"}}
    named = create_rack_from_config(StackWiseConfig.from_dict({"model": model, "training": training}))
    assert torch.equal(rack(ids), named(ids))


def test_a_block_spec_takes_attention_custom_and_refuses_what_a_config_refuses():
    custom = {"attention_type": "mla", "attention_mode": "bidirectional", "mla_rkv": 7, "mla_latents": "separate"}
    spec = create_block_spec(48, 37, 12, attention_preset="custom", attention_custom=custom)
    rack = create_rack_from_specs(V, 48, [{"stack_id": 0, "n_blocks": 1, "block_spec": spec}])
    assert any(7 in p.shape for p in rack.stacks[0].blocks[0].attention.parameters())
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(5))
    other = torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % V), dim=1)
    assert not torch.equal(rack(ids)[:, 0], rack(other)[:, 0])
    with pytest.raises(ConfigError, match="kernel_dim: 13 is odd"):
        create_block_spec(48, 37, 12, attention_preset="mlgka", attention_custom={"kernel_dim": 13})
