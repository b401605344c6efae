"""A Stack's matrices in each storage: bytes, refusals, restoring."""

import pytest
import torch

from stackwise.growth.precision import PrecisionManager, parameters_of
from stackwise.growth.preparation import set_trainable
from stackwise.kinds import STORAGES
from stackwise.model.architecture import create_simple_rack
from stackwise.model.linear import linears
from stackwise.ops.storage import storage_of
from variants import BLOCKS, rack_of

MANAGER = PrecisionManager()


def rack(d_model=64, d_ff=160, n_stacks=3):
    return create_simple_rack(n_stacks, 1, d_model, d_ff, 4, 37)


@pytest.mark.parametrize("precision", STORAGES)
def test_a_stored_stack_takes_the_bytes_of_its_format(precision):
    stack = rack().stacks[0]
    weights = sum(layer.weight.numel() for _, layer in linears(stack))
    parameters = parameters_of(stack)
    changed = MANAGER.store(stack, precision)
    assert changed == (precision != "full") and not MANAGER.store(stack, precision)
    assert MANAGER.precision_of(stack) == precision
    assert parameters_of(stack) == parameters  # however they are stored
    held = sum(t.numel() * t.element_size() for t in stack.state_dict().values())
    norms = 2 * 64 * 4
    assert held - norms == pytest.approx(weights * storage_of(precision).bytes_per_weight, rel=0.05)


def test_a_frozen_trunk_in_four_bits_takes_less_than_sixteen_hundredths_of_fp32():
    model = rack(256, 640)
    full = [sum(t.numel() * t.element_size() for t in s.state_dict().values()) for s in model.stacks]
    for stack in model.stacks:
        MANAGER.store(stack, "nf4")
    stored = [sum(t.numel() * t.element_size() for t in s.state_dict().values()) for s in model.stacks]
    assert sum(stored) / sum(full) <= 0.16  # norms in fp32 included


@pytest.mark.parametrize("precision", STORAGES)
@pytest.mark.parametrize("name", BLOCKS)
def test_every_variant_runs_in_every_storage_with_gradients_to_its_input(name, precision):
    model = rack_of(name)
    ids = torch.arange(22).view(2, 11) % model.vocab_size
    before = model.eval()(ids)
    for stack in model.stacks:
        MANAGER.store(stack, precision)
    set_trainable(model, ["embedding", "norm"])
    after = model.eval()(ids)
    assert after.isfinite().all() and torch.equal(after, before) == (precision == "full")
    after.square().sum().backward()
    assert model.embedding.weight.grad.isfinite().all() and model.embedding.weight.grad.any()


@pytest.mark.parametrize("precision", [p for p in STORAGES if p not in ("full", "bfloat16")])
def test_a_part_that_cannot_train_is_refused_with_the_reason(precision):
    model = rack()
    MANAGER.store(model.stacks[1], precision)
    set_trainable(model, ["stack.0", "norm"])
    for part in ("stack.1", "stack.1/blocks.0"):
        with pytest.raises(ValueError, match=f"Stack 1 is stored in {precision}, which cannot be trained"):
            set_trainable(model, [part])


def test_storage_is_described_and_restored():
    model, other = rack(), rack()
    MANAGER.store(model.stacks[0], "nvfp4")
    MANAGER.store(model.stacks[2], "bfloat16")
    described = MANAGER.described(model)
    assert described == {"0": "nvfp4", "2": "bfloat16"}
    MANAGER.restore(other, described)
    assert MANAGER.described(other) == described
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(torch.arange(7)[None]), model(torch.arange(7)[None]))


def test_unknown_and_mixed_storage_are_refused():
    stack = rack().stacks[0]
    with pytest.raises(ValueError, match="precision is 'garbage'; allowed: full, half"):
        MANAGER.store(stack, "garbage")
    next(layer for _, layer in linears(stack)).store("int8")
    with pytest.raises(ValueError, match=r"stored in several ways: \['full', 'int8'\]"):
        MANAGER.precision_of(stack)
