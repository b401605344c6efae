"""How the weights of Stacks are stored (``ops.storage`` has the formats)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from stackwise.config.growth import PrecisionName
from stackwise.kinds import STORAGES
from stackwise.model.linear import linears
from stackwise.model.rack import Rack
from stackwise.model.stack import Stack


class PrecisionManager:
    """Stores the matrices of Stacks in a precision, frozen, and says which precision a Stack has.

    Every linear layer of attention and feed-forward is stored so; norms, biases, kernels' frequencies and adapters stay
    in fp32. Gradients flow through what is stored to the input.
    """

    def store(self, stack: Stack, precision: PrecisionName) -> bool:
        """Keeps the matrices of ``stack`` in ``precision``; whether that changed anything. ValueError if unknown."""
        changed = False
        for _, layer in linears(stack):
            changed |= layer.precision != precision
            layer.store(precision)
        return changed

    def precision_of(self, stack: Stack) -> PrecisionName:
        """How ``stack`` is stored. ValueError where its layers differ."""
        found = {layer.precision for _, layer in linears(stack)}
        if len(found) > 1:
            raise ValueError(f"the layers of Stack {stack.stack_id} are stored in several ways: {sorted(found)}")
        return found.pop() if found else "full"

    def check(self, rack: Rack, trains: Iterable[str]) -> None:
        """ValueError if a part of ``trains`` is stored in a precision that cannot train."""
        wanted = {part.partition("/")[0] for part in trains}
        trainable = [name for name, kind in STORAGES.items() if kind.trains]
        for stack in rack.stacks:
            precision = self.precision_of(stack)
            if f"stack.{stack.stack_id}" in wanted and precision not in trainable:
                raise ValueError(
                    f"Stack {stack.stack_id} is stored in {precision}, which cannot be trained; "
                    f"allowed for a Stack that trains: {', '.join(trainable)}; adapters train beside any storage"
                )

    def described(self, rack: Rack) -> dict[str, str]:
        """Stack id → precision, of those that are not ``full``."""
        found = {str(stack.stack_id): self.precision_of(stack) for stack in rack.stacks}
        return {k: precision for k, precision in found.items() if precision != "full"}

    def restore(self, rack: Rack, described: Mapping[str, str]) -> None:
        """Gives ``rack`` (whose values do not matter yet) the storage that ``described`` says."""
        for stack in rack.stacks:
            self.store(stack, described.get(str(stack.stack_id), "full"))


def parameters_of(module: nn.Module) -> int:
    """Weights of ``module``, however they are stored: a 4-bit code counts as one weight."""
    plain = sum(p.numel() for p in module.parameters())
    return plain + sum(layer.shape.numel() for _, layer in linears(module) if layer.weight is None)
