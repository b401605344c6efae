"""Where Stacks join a Rack."""

from __future__ import annotations

from typing import Literal

Place = Literal["right", "left", "middle", "between"]


def placed(stacks: tuple[int, ...], group: list[int], at: Place) -> tuple[tuple[int, ...], dict[int, int | None]]:
    """The order once the Stacks of ``group`` have joined, and each one's neighbour among those that were there."""
    match at:
        case "right":
            return (*stacks, *group), dict.fromkeys(group, stacks[-1] if stacks else None)
        case "left":
            return (*group, *stacks), dict.fromkeys(group, stacks[0] if stacks else None)
        case "middle":
            left, right = stacks[: -(-len(stacks) // 2)], stacks[-(-len(stacks) // 2) :]
            return (*left, *group, *right), dict.fromkeys(group, left[-1] if left else None)
    order: list[int] = []
    neighbours: dict[int, int | None] = {}
    waiting = list(group)
    for i, stack in enumerate(stacks, 1):
        order.append(stack)
        # After i of P Stacks, i/P of the new ones have joined: the last one ends the Rack.
        while waiting and (len(group) - len(waiting) + 1) * len(stacks) <= i * len(group):
            neighbours[waiting[0]] = stack
            order.append(waiting.pop(0))
    return tuple(order), neighbours
