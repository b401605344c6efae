"""Makes a Rack what a phase trains: grown, stored, adapted, and with gradients where it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from stackwise.config.base import StackWiseConfig
from stackwise.errors import UserError
from stackwise.growth.adapters import adapters_of, add_adapter, plain_state
from stackwise.growth.phases import Adapter, Growth, Phase
from stackwise.growth.precision import PrecisionManager
from stackwise.model.architecture import Rack, Stack, Stacks, create_stack_from_config
from stackwise.model.initialisation import RESIDUAL_OUTPUTS
from stackwise.model.layers import never_trained
from stackwise.model.linear import linears


def set_trainable(rack: Rack, parts: Iterable[str], adapters: Iterable[Adapter] = ()) -> None:
    """Gives gradients to the parameters of ``parts`` and ``adapters`` and to no others.

    Args:
        parts: names of ``Rack.parts``, or of a single Block, ``stack.<id>/blocks.<index>``; what is frozen goes to
            evaluation mode. Parameters that their module declares as never trained stay frozen.
        adapters: those that train are told by their ``trains``.

    Raises:
        ValueError: the Rack has no such part, or it is stored in a precision that cannot train.
    """
    modules = rack.parts()
    wanted: dict[str, nn.Module] = {}
    for name in parts:
        part, _, inner = name.partition("/")
        if part not in modules:
            raise ValueError(f"the Rack has no part {part!r}; it has {', '.join(modules)}")
        wanted[name] = modules[part].get_submodule(inner)
    PrecisionManager().check(rack, wanted)
    fixed = never_trained(rack)
    rack.requires_grad_(False)
    for module in modules.values():
        module.eval()
    for module in wanted.values():
        module.train()
        for parameter in module.parameters():
            parameter.requires_grad_(parameter not in fixed)
    trained = {(adapter.stack, adapter.kind) for adapter in adapters if adapter.trains}
    for stack in rack.stacks:
        for _, layer in linears(stack):
            for kind, low in layer.low_rank().items():
                trains = (stack.stack_id, kind) in trained
                low.train(trains).requires_grad_(trains)


@torch.no_grad()
def zero_residual_outputs(stack: nn.Module) -> None:
    """Makes every Block of ``stack`` (or a single Block) the identity: x + 0 and x + 0."""
    for name, module in stack.named_modules():
        if name.split(".")[-1] in RESIDUAL_OUTPUTS and isinstance(module, nn.Linear):
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()


def _copy_stack(source: Stack, new: Stack) -> None:
    """Copies all that both have. A first Block without a norm before its attention gives none, and takes none."""
    there, wanted = plain_state(source), new.state_dict()
    odd = {name for name in there.keys() ^ wanted.keys() if ".attention_norm." not in name}
    odd |= {name for name in there.keys() & wanted.keys() if there[name].shape != wanted[name].shape}
    if odd:
        raise UserError(
            f"training.progressive.new_stack_init: 'copy' needs equal Stacks, but Stack {new.stack_id} differs from "
            f"Stack {source.stack_id} in {min(odd)}; set identity or random"
        )
    new.load_state_dict({name: there.get(name, value) for name, value in wanted.items()})


def grow_rack(rack: Rack, growth: Iterable[Growth], stacks: Iterable[int], config: StackWiseConfig) -> None:
    """Adds the Stacks of ``growth`` to ``rack`` at the places they have in ``stacks``, each initialised as it says."""
    insert_stacks(rack, make_stacks(rack, growth, config), stacks)


@torch.no_grad()
def make_stacks(rack: Rack, growth: Iterable[Growth], config: StackWiseConfig) -> list[Stack]:
    """The Stacks of ``growth``, each initialised as it says, beside ``rack``."""
    present = {stack.stack_id: stack for stack in rack.stacks}
    made = []
    for new in growth:
        present[new.stack] = _new_stack(new, present, config).to(rack.device)
        made.append(present[new.stack])
    return made


def insert_stacks(rack: Rack, made: Iterable[Stack], stacks: Iterable[int]) -> None:
    """Puts Stacks into ``rack``, whose order is then ``stacks``."""
    present = {stack.stack_id: stack for stack in (*rack.stacks, *made)}
    rack.stacks = Stacks(present[k] for k in stacks)


def _new_stack(growth: Growth, present: Mapping[int, Stack], config: StackWiseConfig) -> Stack:
    new = create_stack_from_config(growth.stack, config)
    if growth.init == "copy":
        assert growth.source is not None
        _copy_stack(present[growth.source], new)
    elif growth.init == "identity":
        zero_residual_outputs(new)
    return new


def prepare_phase(
    rack: Rack, phase: Phase, config: StackWiseConfig, stored: Callable[[], None] | None = None
) -> set[str]:
    """Makes ``rack`` what ``phase`` trains: grown, stored, adapted and frozen as it says.

    What is there already stays, so that a Rack from a checkpoint of the phase is left as it is.

    Args:
        stored: called when Stacks that were there have changed their precision, before anything joins.

    Returns:
        The parts whose tensors are other ones now.
    """
    precisions, changed = PrecisionManager(), set()
    present = {stack.stack_id for stack in rack.stacks}
    # Copies are taken before their source is stored in fewer bits.
    made = make_stacks(rack, [new for new in phase.growth if new.stack not in present], config)
    for stack in rack.stacks:
        if precisions.store(stack, phase.precision_of(stack.stack_id)):
            changed.add(f"stack.{stack.stack_id}")
    if changed and stored is not None:
        stored()
    for stack in made:
        precisions.store(stack, phase.precision_of(stack.stack_id))
        changed.add(f"stack.{stack.stack_id}")
    insert_stacks(rack, made, phase.stacks)
    wanted = {(adapter.stack, adapter.kind) for adapter in phase.adapters}
    extra = [a for a in adapters_of(rack) if (a.stack, a.kind) not in wanted]
    if extra:
        raise ValueError(
            f"the phase '{phase.name}' does not know the {extra[0].kind} adapter of Stack {extra[0].stack}"
        )
    stacks = {stack.stack_id: stack for stack in rack.stacks}
    for adapter in phase.adapters:
        if add_adapter(stacks[adapter.stack], adapter, config.training.seed):
            changed.add(f"adapters.{adapter.stack}")
    set_trainable(rack, phase.trains, phase.adapters)
    return changed
