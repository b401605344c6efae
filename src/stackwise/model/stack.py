"""Stack: a run of Blocks.

B batch, T tokens, C width (``d_model``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from stackwise.model.block import NO_CONTEXT, Block, Blocks, Context

ADAPTERS = ".adapters."
"""In the names of low-rank factors; they are parts of their own, ``adapters.<id>``, beside their Stack's."""


class Stack(nn.Module):
    """A run of Blocks: the unit of growth, freezing, checkpointing and caching.

    Args:
        stack_id: its name for life, whatever its position becomes.
        blocks: the Blocks, first to last.
    """

    def __init__(self, stack_id: int, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.stack_id = stack_id
        self.blocks = Blocks(blocks)
        self.activation_checkpointing = False
        self.fetch: Callable[[], Mapping[str, Tensor]] | None = None
        """Gives the tensors of a Stack whose own are elsewhere (on the meta device), for as long as they are used."""

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """(B, T, C) → (B, T, C). With ``activation_checkpointing`` the backward pass finds each Block's input only.

        An offloaded Stack is fetched for the forward pass and again for the backward pass, which recomputes it.
        """
        if self.fetch is None:
            return self._run(x, context)
        if not context.caches and _has_gradients(self, x, context.condition):
            return checkpoint(self._run_fetched, x, context, use_reentrant=False)
        return self._run_fetched(x, context)

    def own_tensors(self) -> dict[str, Tensor]:
        """Name → tensor of all that is the Stack's own: everything but its adapters."""
        named = self.state_dict(keep_vars=True).items()
        return {name: tensor.detach() for name, tensor in named if ADAPTERS not in name}

    def adapter_tensors(self, kind: str) -> dict[str, Tensor]:
        """Name → factor of the Stack's adapters of one kind."""
        named = self.state_dict(keep_vars=True).items()
        return {name: tensor.detach() for name, tensor in named if f"{ADAPTERS}{kind}." in name}

    def _run_fetched(self, x: Tensor, context: Context) -> Tensor:
        assert self.fetch is not None
        tensors = {f"stack.{name}": tensor for name, tensor in self.fetch().items()}
        return functional_call(_Run(self), tensors, (x, context))

    def _run(self, x: Tensor, context: Context) -> Tensor:
        # An offloaded Stack is recomputed as a whole already.
        again = self.activation_checkpointing and self.fetch is None and not context.caches
        for i, block in enumerate(self.blocks):
            if again and _has_gradients(block, x, context.condition):
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context.of_blocks(i, 1))
        return x


def _has_gradients(module: nn.Module, *inputs: Tensor | None) -> bool:
    """Whether a backward pass goes through ``module``: else nothing of it is kept, and nothing is to be recomputed."""
    tensors = (*inputs, *module.parameters())
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _Run(nn.Module):
    """Calls a Stack's own pass as a module, as ``functional_call`` needs it."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.stack._run(x, context)


class Stacks(nn.ModuleList):
    """A ``ModuleList`` that type checkers know to hold Stacks."""

    def __iter__(self) -> Iterator[Stack]:
        return super().__iter__()  # type: ignore[return-value]
