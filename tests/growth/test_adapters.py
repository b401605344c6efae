"""Adapters: on every linear layer, equal to W + BA, and in peft's folder format both ways."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from stackwise.errors import UserError
from stackwise.growth.adapters import (
    adapters_of,
    add_adapter,
    load_adapters,
    merge_adapters,
    plain_rack,
    plain_state,
    save_adapters,
)
from stackwise.growth.phases import Adapter
from stackwise.growth.precision import PrecisionManager
from stackwise.model.architecture import create_simple_rack
from stackwise.model.linear import linears
from variants import BLOCKS, rack_of

IDS = torch.arange(33).view(3, 11) % 37
BOTH = ("stack", "progressive")


def rack(seed=0):
    return create_simple_rack(3, 2, 26, 19, 13, 37, seed=seed)


def adapted(model, *kinds, seed=0):
    """``model`` with adapters of other ranks in every Stack, their factors drawn."""
    for kind in kinds:
        for stack in model.stacks:
            k = stack.stack_id
            add_adapter(stack, Adapter(k, kind, 2 + k + BOTH.index(kind), 3.0 + k), seed)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                p.copy_(0.3 * torch.randn(p.shape, generator=draw))
    return model


@pytest.mark.parametrize("name", BLOCKS)
def test_every_linear_of_attention_and_feed_forward_is_adapted(name):
    model = rack_of(name)
    count = 0
    for stack in model.stacks:
        assert add_adapter(stack, Adapter(stack.stack_id, "stack", 2, 4.0), 0)
        for layer, module in stack.named_modules():
            if isinstance(module, torch.nn.Linear):
                assert list(module.low_rank()) == ["stack"], layer
                count += 1
    gated, spec = model.blocks()[0].spec.ffn in ("swiglu", "geglu"), model.blocks()[0].spec.attention
    latent = {None: 4, "separate": 7, "shared": 5 if spec.r_q is not None else 4}
    attention = latent[None if spec.r_kv is None else spec.latents]
    assert count == len(model.blocks()) * (attention + (3 if gated else 2))


def test_adapters_start_without_effect_and_depend_on_seed_stack_kind_and_layer_alone():
    model, again, other = rack(), rack(1), rack()
    before = model(IDS)
    for made, seed in ((model, 0), (again, 0), (other, 1)):
        for stack in made.stacks:
            for kind in BOTH:
                add_adapter(stack, Adapter(stack.stack_id, kind, 3, 4.0), seed)
    assert torch.equal(model(IDS), before)
    drawn = [
        {name: layer.low_rank()[kind].A for name, layer in linears(m) for kind in BOTH} for m in (model, again, other)
    ]
    for name, layer in linears(model):
        for kind in BOTH:
            low = layer.low_rank()[kind]
            assert not low.B.any() and low.A.abs().max() <= layer.in_features**-0.5 and low.A.std() > 0
            assert not torch.equal(low.A, layer.low_rank()[BOTH[1 - BOTH.index(kind)]].A)
        assert torch.equal(drawn[0][name], drawn[1][name]) and not torch.equal(drawn[0][name], drawn[2][name])
    found = {(a.stack, a.kind) for a in adapters_of(model)}
    assert found == {(k, kind) for k in range(3) for kind in BOTH}


def test_the_same_adapter_is_added_once_and_another_one_refused():
    stack = rack().stacks[1]
    adapter = Adapter(1, "stack", 3, 4.0)
    assert add_adapter(stack, adapter, 0) and not add_adapter(stack, adapter, 0)
    with pytest.raises(ValueError, match="Stack 1 has another stack adapter"):
        add_adapter(stack, Adapter(1, "stack", 2, 4.0), 0)


@pytest.mark.parametrize("precision", ["full", "nf4", "int8", "half"])
def test_a_merged_adapter_is_the_base_plus_ba(precision):
    model = adapted(rack(), *BOTH)
    for stack in model.stacks:
        PrecisionManager().store(stack, precision)
    wanted = {}
    for name, layer in linears(model):
        wanted[name] = layer.dense().double()
        for low in layer.low_rank().values():
            wanted[name] += (low.alpha / low.rank) * low.B.detach().double() @ low.A.detach().double()
    before = model(IDS)
    state = plain_state(model.stacks[2])
    assert not any(".adapters." in name or "codes" in name for name in state)
    merge_adapters(model)
    for name, layer in linears(model):
        torch.testing.assert_close(layer.weight.double(), wanted[name], rtol=1e-6, atol=1e-7)
        assert not layer.adapters and layer.precision == "full"
        if name.startswith("stacks.2."):
            assert torch.equal(state[name.removeprefix("stacks.2.") + ".weight"], layer.weight)
    torch.testing.assert_close(model(IDS), before, rtol=1e-4, atol=1e-5)


def test_a_plain_rack_has_neither_codes_nor_adapters():
    model = adapted(rack(), "stack")
    PrecisionManager().store(model.stacks[0], "nvfp4")
    names = set(rack().state_dict())
    assert set(model.state_dict()) != names
    assert set(plain_rack(model).state_dict()) == names


@pytest.mark.parametrize("kind", BOTH)
def test_peft_loads_what_is_saved_here(tmp_path, kind):
    model = adapted(rack(), kind)
    save_adapters(model, tmp_path, kind)
    theirs = PeftModel.from_pretrained(rack(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    torch.testing.assert_close(theirs(IDS), model(IDS), rtol=1e-6, atol=1e-6)
    assert (model(IDS) - rack()(IDS)).abs().max() > 0.01


def test_what_peft_saved_is_loaded_here(tmp_path):
    settings = LoraConfig(
        r=5, lora_alpha=7, target_modules=["q_proj", "down_proj", "o_proj"], rank_pattern={"down_proj": 2},
        alpha_pattern={"blocks.1.attention.o_proj": 11}, init_lora_weights=False,
    )  # fmt: skip
    theirs = get_peft_model(copy.deepcopy(rack()), settings)
    theirs.save_pretrained(tmp_path)
    model = rack()
    load_adapters(model, tmp_path)
    torch.testing.assert_close(model(IDS), theirs(IDS), rtol=1e-6, atol=1e-6)
    alphas = {name: layer.low_rank()["stack"].alpha for name, layer in linears(model) if layer.adapters}
    assert alphas["stacks.0.blocks.1.attention.o_proj"] == 11 and alphas["stacks.0.blocks.0.attention.o_proj"] == 7
    # And once round: what came from peft goes out again the same.
    save_adapters(model, tmp_path / "again")
    again = rack()
    load_adapters(again, tmp_path / "again")
    assert torch.equal(again(IDS), model(IDS))


def test_wrong_folders_are_answered_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"adapter_config\.json: cannot be read"):
        load_adapters(rack(), tmp_path)
    with pytest.raises(UserError, match="no progressive adapter"):
        save_adapters(adapted(rack(), "stack"), tmp_path, "progressive")
    save_adapters(adapted(rack(), "stack"), tmp_path)
    with pytest.raises(UserError, match="which the Rack does not have"):
        load_adapters(create_simple_rack(2, 2, 26, 19, 13, 37), tmp_path)
    with pytest.raises(UserError, match="do not fit a layer of shape"):
        load_adapters(create_simple_rack(3, 2, 26, 23, 13, 37), tmp_path)
