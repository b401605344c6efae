import pytest
import torch

from stackwise.config import StackWiseConfig
from stackwise.errors import UserError
from stackwise.growth.phases import Growth
from stackwise.growth.preparation import grow_rack, set_trainable
from stackwise.model.architecture import create_rack_from_config
from stackwise.runs.builder import ProgressiveRackBuilder

V, C, F, H, G, N_BLOCKS = 37, 26, 19, 13, 1, 2


def config(*overrides):
    return StackWiseConfig.from_dict(
        {
            "model": {
                "vocab_size": V,
                "d_model": C,
                "n_heads": H,
                "n_kv_heads": G,
                "d_ff": F,
                "architecture": {"n_stacks": 3, "blocks_per_stack": N_BLOCKS},
            }
        },
        overrides,
    )


def builder(*overrides, mode=None, n_stacks=0):
    made = ProgressiveRackBuilder(config(*overrides), mode)
    for _ in range(n_stacks):
        made.add_stack()
    return made


def ids():
    return torch.randint(0, V, (3, 11), generator=torch.Generator().manual_seed(5))


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def order(rack):
    return [stack.stack_id for stack in rack.stacks]


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("mode", ["append", "prepend"])
def test_a_stack_that_starts_as_the_identity_leaves_the_logits_bit_identical(mode, tied):
    made = builder(
        "training.progressive.trunk_strategy=trainable", f"model.tie_embeddings={tied}", mode=mode, n_stacks=2
    )
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[1, 7:] = False
    before = made.rack(ids()), made.rack(ids(), mask)
    getattr(made, f"{mode}_stack")("identity")
    assert len(made.rack.stacks) == 3
    assert torch.equal(made.rack(ids()), before[0])
    assert torch.equal(made.rack(ids(), mask), before[1])


def test_a_random_stack_changes_the_logits():
    made = builder(n_stacks=2)
    before = made.rack(ids())
    made.append_stack("random")
    assert not torch.allclose(made.rack(ids()), before, atol=1e-2)


def test_an_identity_stack_is_random_but_for_its_residual_outputs():
    made = builder(n_stacks=1)
    identity = weights(made.append_stack("identity"))
    fresh = weights(builder(n_stacks=1).append_stack("random"))
    for name, value in identity.items():
        if "o_proj" in name or "down_proj" in name:
            assert torch.equal(value, torch.zeros_like(value))
        else:
            assert torch.equal(value, fresh[name])


@pytest.mark.parametrize("mode, source", [("append", 1), ("prepend", 1)])
def test_a_copy_has_its_neighbours_weights_in_storage_of_its_own(mode, source):
    made = builder(mode=mode, n_stacks=2)
    neighbour = made.rack.parts()[f"stack.{source}"]
    with torch.no_grad():  # as training would leave it
        for p in neighbour.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(7)))
    before = weights(neighbour)
    new = made.add_stack()
    assert same(weights(new), before)
    with torch.no_grad():
        for p in new.parameters():
            p.add_(1.0)
    assert same(weights(neighbour), before)


def test_a_copy_is_of_the_stack_beside_it():
    made = builder(mode="prepend", n_stacks=3)
    assert order(made.rack) == [2, 1, 0]
    with torch.no_grad():
        for stack in made.rack.stacks:
            stack.blocks[0].attention_norm.weight.fill_(stack.stack_id + 11)
    assert made.prepend_stack("copy").blocks[0].attention_norm.weight[0] == 13
    assert made.append_stack("copy").blocks[0].attention_norm.weight[0] == 11


def test_a_random_stack_does_not_depend_on_when_it_is_made():
    late = builder(n_stacks=2).append_stack("random")
    torch.randn(17)  # the global generator must not matter
    early = create_rack_from_config(config(), n_stacks=0)
    grow_rack(early, [Growth(2, "random")], [2], config())
    assert same(weights(late), weights(early.stacks[0]))
    whole = create_rack_from_config(config())
    assert same(weights(late), weights(whole.stacks[2]))


def test_random_stacks_differ_from_each_other_and_between_seeds():
    made = builder(n_stacks=1)
    a, b = weights(made.append_stack("random")), weights(made.append_stack("random"))
    c = weights(builder("training.seed=1", n_stacks=1).append_stack("random"))
    for name in a:
        if a[name].dim() == 2:
            assert not torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])


def test_a_stack_joins_the_rack_where_the_order_says():
    rack = create_rack_from_config(config())
    middle = rack.stacks[1]
    grow_rack(rack, [Growth(7, "random")], [0, 1, 7, 2], config())
    assert order(rack) == [0, 1, 7, 2]
    assert rack.stacks[1] is middle
    assert list(rack.parts()) == ["embedding", "stack.0", "stack.1", "stack.7", "stack.2", "norm", "head"]


def test_stacks_go_to_the_side_that_is_asked_for():
    made = builder(mode="prepend")
    made.append_stack()
    made.append_stack()
    made.prepend_stack()
    made.add_stack()
    assert order(made.rack) == [3, 2, 0, 1]


def test_build_rack_grows_to_its_target_and_no_further():
    made = builder(mode="append", n_stacks=1)
    first = made.rack.stacks[0]
    assert order(made.build_rack()) == [0, 1, 2]
    assert made.rack.stacks[0] is first
    assert order(made.build_rack(2)) == [0, 1, 2]


def test_unknown_modes_and_initialisations_are_refused():
    with pytest.raises(ValueError, match="insert"):
        ProgressiveRackBuilder(config(), "insert")
    made = builder(n_stacks=1)
    with pytest.raises(ValueError, match=r"zeros.*random, identity, copy"):
        made.append_stack("zeros")
    assert order(made.rack) == [0]


# ---- what trains


def trainable(rack):
    return {f"{part}/{name}" for part, name, p in rack.part_parameters() if p.requires_grad}


def test_set_trainable_gives_gradients_to_its_parts_only_and_turns_dropout_off_elsewhere():
    rack = create_rack_from_config(config())
    set_trainable(rack, ["stack.1", "norm"])
    assert {name.split("/")[0] for name in trainable(rack)} == {"stack.1", "norm"}
    assert all(module.training == (name in ("stack.1", "norm")) for name, module in rack.parts().items())
    assert not any(m.training for m in rack.stacks[0].modules())
    assert all(m.training for m in rack.stacks[1].modules())
    rack(ids()).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in rack.parameters())


def test_set_trainable_refuses_a_part_that_the_rack_lacks():
    with pytest.raises(ValueError, match=r"stack\.3"):
        set_trainable(create_rack_from_config(config()), ["stack.3"])


def test_what_never_trains_is_never_trainable():
    rack = create_rack_from_config(
        config("model.freeze_up_proj=true", "model.tokenizer_embedding.freeze_embeddings=true")
    )
    set_trainable(rack, rack.parts())
    frozen = {f"{part}/{name}" for part, name, _ in rack.part_parameters()} - trainable(rack)
    ups = {f"stack.{s}/blocks.{b}.ffn.up_proj.weight" for s in range(3) for b in range(N_BLOCKS)}
    assert frozen == {"embedding/weight"} | ups


@pytest.mark.parametrize("kind", ["swiglu", "geglu", "gelu"])
def test_what_never_trains_stays_in_a_training_loop_of_ones_own(kind):
    rack = create_rack_from_config(
        config("model.freeze_up_proj=true", "model.tokenizer_embedding.freeze_embeddings=true", f"model.ffn={kind}")
    ).train()
    before = {name: p.detach().clone() for name, p in rack.named_parameters()}
    optimizer = torch.optim.SGD(rack.parameters(), lr=0.1)
    rack(torch.tensor([[3, 1, 4, 1, 5]])).square().mean().backward()
    optimizer.step()
    same = {name for name, p in rack.named_parameters() if torch.equal(p, before[name])}
    assert same == {name for name, p in rack.named_parameters() if not p.requires_grad}
    assert same == {name for name in before if name.endswith("up_proj.weight") or name == "embedding.weight"}


@pytest.mark.parametrize("mode", ["append", "prepend"])
def test_freeze_trunk_leaves_the_newest_stack_the_norm_and_the_head(mode):
    made = builder(mode=mode, n_stacks=3)
    made.freeze_trunk()
    assert {name.split("/")[0] for name in trainable(made.rack)} == {"stack.2", "norm", "head"}


def test_freeze_trunk_of_a_tied_rack_leaves_the_embedding_frozen():
    made = builder("model.tie_embeddings=true", n_stacks=2)
    made.freeze_trunk()
    assert {name.split("/")[0] for name in trainable(made.rack)} == {"stack.1", "norm"}


def test_a_rack_without_stacks_has_no_trunk_to_freeze():
    with pytest.raises(ValueError, match="append_stack"):
        builder().freeze_trunk()


@pytest.mark.parametrize("tied", [False, True])
def test_rack_info_counts_parameters_as_one_does_by_hand(tied):
    made = builder(f"model.tie_embeddings={str(tied).lower()}", n_stacks=3)
    head_dim = C // H
    block = C * H * head_dim * 2 + 2 * C * G * head_dim + 3 * C * F + 2 * C  # q, o; k, v; gate, up, down; norms
    stack = N_BLOCKS * block
    total = V * C * (1 if tied else 2) + 3 * stack + C
    made.freeze_trunk()
    info = made.get_rack_info()
    assert info["parameters"] == total
    assert info["trainable_parameters"] == stack + C + (0 if tied else V * C)
    assert info["parts"]["stack.0"] == {"parameters": stack, "trainable_parameters": 0}
    assert info["parts"]["stack.2"] == {"parameters": stack, "trainable_parameters": stack}
    assert ("head" in info["parts"]) == (not tied)
    assert (info["n_stacks"], info["stacks"], info["n_blocks"]) == (3, [0, 1, 2], 6)


# ---- files


@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_saved_rack_loads_bit_identically_and_in_its_order(tmp_path, tied):
    made = builder(f"model.tie_embeddings={tied}", mode="prepend", n_stacks=2)
    made.append_stack("random")
    made.save_rack(tmp_path / "rack.safetensors")
    other = builder(f"model.tie_embeddings={tied}", "training.seed=3")
    loaded = other.load_rack(tmp_path / "rack.safetensors")
    assert loaded is other.rack and order(loaded) == [1, 0, 2]
    assert same(weights(loaded), weights(made.rack))
    assert torch.equal(loaded(ids()), made.rack(ids()))


def test_a_rack_without_stacks_is_saved_and_loaded_too(tmp_path):
    made = builder()
    made.save_rack(tmp_path / "rack.safetensors")
    assert order(builder(n_stacks=2).load_rack(tmp_path / "rack.safetensors")) == []


def test_a_saved_stack_loads_into_another_and_touches_nothing_else(tmp_path):
    made = builder(n_stacks=3)
    made.save_stack(1, tmp_path / "stack.safetensors")
    other = builder("training.seed=3", n_stacks=3)
    before = weights(other.rack)
    stack = other.load_stack(2, tmp_path / "stack.safetensors")
    assert same(weights(stack), weights(made.rack.stacks[1]))
    after = weights(other.rack)
    assert all(torch.equal(after[n], before[n]) for n in before if not n.startswith("stacks.2."))


def test_files_that_do_not_fit_are_the_users_error_and_change_nothing(tmp_path):
    made = builder(n_stacks=1)
    rack, stack, junk = (tmp_path / name for name in ("rack", "stack", "junk"))
    made.save_rack(rack)
    made.save_stack(0, stack)
    junk.write_bytes(b"no weights")
    before = weights(made.rack)
    with pytest.raises(UserError, match="not a Rack"):
        made.load_rack(stack)
    with pytest.raises(UserError, match="not a Stack"):
        made.load_stack(0, rack)
    with pytest.raises(UserError, match="no such file"):
        made.load_rack(tmp_path / "absent")
    with pytest.raises(UserError, match="safetensors"):
        made.load_stack(0, junk)
    with pytest.raises(ValueError, match="no Stack 4"):
        made.save_stack(4, tmp_path / "more")
    wider = builder("model.d_ff=23", n_stacks=1)
    kept = weights(wider.rack)
    with pytest.raises(UserError, match=r"shape \(26, 19\).*\(26, 23\)"):
        wider.load_stack(0, stack)
    with pytest.raises(UserError, match="shape"):
        wider.load_rack(rack)
    tied = builder("model.tie_embeddings=true", n_stacks=1)
    with pytest.raises(UserError, match="head/weight"):
        tied.load_rack(rack)
    assert same(weights(made.rack), before) and same(weights(wider.rack), kept)


QLORA = ("training.qlora.enabled=true", "training.qlora.rank=3", "training.progressive.trunk_strategy=qlora")
SECOND = ("training.qlora.progressive_enabled=true", "training.qlora.progressive_rank=2")


def ranks(rack):
    """{(Stack, kind): rank} of the adapters in the names and shapes of parameters."""
    return {
        (stack.stack_id, name.split(".adapters.")[1].split(".")[0]): p.shape[0]
        for stack in rack.stacks
        for name, p in stack.named_parameters()
        if name.endswith(".A")
    }


@pytest.mark.parametrize("mode, left_to_right", [("append", [0, 1, 2]), ("prepend", [2, 1, 0])])
def test_a_stack_gets_its_adapter_when_it_joins_and_the_trunk_its_second_one(mode, left_to_right):
    made = builder(*QLORA, *SECOND, mode=mode)
    add = made.append_stack if mode == "append" else made.prepend_stack
    add()
    assert ranks(made.rack) == {(0, "stack"): 3}
    add()
    assert ranks(made.rack) == {(0, "stack"): 3, (0, "progressive"): 2, (1, "stack"): 3}
    add()
    assert ranks(made.rack) == {(k, "stack"): 3 for k in range(3)} | {(k, "progressive"): 2 for k in (0, 1)}
    assert order(made.rack) == left_to_right
    made.freeze_all_but_qlora()
    learned = {name for name, p in made.rack.named_parameters() if p.requires_grad}
    assert learned == {name for name, _ in made.rack.named_parameters() if ".adapters." in name} and learned


def test_without_qlora_no_stack_gets_an_adapter():
    made = builder(n_stacks=2)
    assert ranks(made.rack) == {}
    with pytest.raises(ValueError, match="no adapters yet"):
        made.freeze_all_but_qlora()


def test_an_adapter_that_joins_leaves_the_logits_bit_identical():
    assert torch.equal(builder(*QLORA, *SECOND, n_stacks=3).rack(ids()), builder(n_stacks=3).rack(ids()))


def test_a_pattern_of_ranks_refuses_a_stack_that_it_does_not_count():
    made = builder(*QLORA, "training.qlora.strategy=variable", "training.qlora.rank_pattern=[4, 2, 5]", n_stacks=3)
    assert ranks(made.rack) == {(0, "stack"): 4, (1, "stack"): 2, (2, "stack"): 5}
    with pytest.raises(UserError, match="target_stacks: 3, but the Rack has a Stack 3"):
        made.append_stack()
