"""Text from Racks that predict masked tokens: a template whose gaps are filled, or a prompt and gaps after it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stackwise.config.base import StackWiseConfig
from stackwise.data.tokenizers import Tokenizer
from stackwise.errors import UserError
from stackwise.generation.denoisers import RackDenoiser, generate_blocks, predictions
from stackwise.generation.diffusion import unmask
from stackwise.kinds import OBJECTIVES, samplers
from stackwise.model.architecture import Rack
from stackwise.objectives import Objective, create_objective
from stackwise.objectives.depth import levels_of
from stackwise.objectives.diffusion import DiffusionObjective
from stackwise.ops.noise import divided

GAP = "░"
"""What a token that is not there yet looks like."""

STEPS = 32
"""Steps of all Stacks together, where depth is time and no number is given; one pass has one a Stack."""

_GAP = re.compile(r"\{(\d+)\}")


def template_ids(tokenizer: Tokenizer, template: str, mask_id: int) -> list[int]:
    """The ids of a text in which {20} stands for a gap of 20 tokens. UserError where there is none."""
    ids: list[int] = []
    for i, part in enumerate(_GAP.split(template)):
        ids += [mask_id] * int(part) if i % 2 else tokenizer.encode(part).tolist()
    if mask_id not in ids:
        raise UserError(f"template: {template!r} has no gap; write {{20}} where 20 tokens are to be filled in")
    return ids


def starting_ids(tokenizer: Tokenizer, prompt: str, n_tokens: int, template: str | None) -> list[int]:
    """The ids that ``fill_texts`` starts from: ``template``, or ``prompt`` and ``n_tokens`` gaps after it.

    Raises:
        UserError: both a prompt and a template are given, the template has no gap, or the tokenizer has no mask token.
    """
    mask_id = tokenizer.mask_id
    if mask_id is None:
        raise UserError("the run's tokenizer has no mask token, so there are no gaps to fill")
    if template is None:
        return [*tokenizer.encode(prompt).tolist(), *[mask_id] * n_tokens]
    if prompt:
        raise UserError("template and prompt are both given; the template holds what the text begins with")
    return template_ids(tokenizer, template, mask_id)


def fill_texts(
    rack: Rack,
    tokenizer: Tokenizer,
    config: StackWiseConfig,
    starts: Sequence[Sequence[int]],
    *,
    seed: int | Sequence[int] = 0,
    order: str | None = None,
    steps: int | None = None,
    guidance: float = 0.0,
    **options: Any,
) -> Iterator[list[str]]:
    """Yields all texts after every step, ``GAP`` for each token that is missing; the last are whole.

    Args:
        starts: ids, all of one length, the mask token at the gaps (``template_ids``).
        order, options: of ``unmask``; default ancestral, in blocks first_hitting, of mlm confidence.
        steps: of ``unmask``; where depth is time, of each Stack.
        guidance: from the tokens that are given; of diffusion only.

    Raises:
        UserError: at the call, for settings that do not fit.
    """
    mask_id = tokenizer.mask_id
    if OBJECTIVES[config.training.objective].sampler != "filling" or mask_id is None:
        raise UserError(
            f"this run was trained with {config.training.objective}; filling gaps needs "
            f"{' or '.join(samplers('filling'))}"
        )
    objective = create_objective(config, tokenizer)
    tokens = torch.tensor(starts, device=rack.device)
    never = tokenizer.special_ids | frozenset(range(tokenizer.vocab_size, rack.vocab_size))
    given: dict[str, Any] = {"mask_id": mask_id, "seed": seed, "suppressed_ids": never, **options}
    if guidance:
        given["guidance"] = guidance, tokens != mask_id
    variant, block = config.training.depth_variant, config.training.diffusion.block_length
    _refuse_guidance(config, objective, guidance, order)
    try:
        if block is not None:
            if guidance:
                raise ValueError(f"guidance is {guidance}, but block diffusion (block_length) has no guidance")
            if not isinstance(seed, int):
                given["seed"] = seed[0]
            many = generate_blocks(rack, tokens, block, order=order or "first_hitting", steps=steps, **given)
        elif not isinstance(objective, DiffusionObjective):
            given |= {"order": order or "confidence", "steps": steps}
            many = unmask(partial(predictions, rack), tokens, **given)
        else:
            how: dict[str, Any] = {"order": order or "ancestral", "steps": steps}
            if variant is not None and how["order"] == "ancestral":
                levels = levels_of(config)
                each = steps or (1 if variant == "prefix" else -(-STEPS // (len(levels) - 1)))
                how = {"order": "ancestral", "levels": divided(levels, each)}
            denoise = RackDenoiser(rack, objective)
            many = unmask(denoise, tokens, time_free=denoise.time_free, **how, **given)
    except ValueError as error:
        raise UserError(str(error)) from error
    return ([text_with_gaps(tokenizer, row, mask_id) for row in step.tolist()] for step in many)


def _refuse_guidance(config: StackWiseConfig, objective: Objective, guidance: float, order: str | None) -> None:
    """UserError where the objective, or depth as time in one pass, has no guidance, or no order but one."""
    if guidance and not isinstance(objective, DiffusionObjective):
        raise UserError(
            f"guidance is only used for runs trained with diffusion (this run was trained with {objective.name})"
        )
    if config.training.depth_variant == "prefix" and (guidance or order not in (None, "ancestral")):
        raise UserError(
            "depth_variant: prefix reveals tokens Stack by Stack in one pass; order must be "
            "ancestral, and there is no guidance"
        )


def text_with_gaps(tokenizer: Tokenizer, ids: Sequence[int] | Tensor, mask_id: int) -> str:
    """The text of ``ids``, ``GAP`` for each mask token."""
    text, run = "", list[int]()
    for token in (*ids, None):
        if token is not None and token != mask_id:
            run.append(int(token))
            continue
        text += tokenizer.decode(run) if run else ""
        text, run = text + (GAP if token is not None else ""), []
    return text
