"""Recipes: named curricula with their settings, which leave sizes, data and budget to the config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stackwise.config.base import StackWiseConfig
from stackwise.errors import UserError, allowed


@dataclass(frozen=True)
class Recipe:
    """A named way to train.

    Attributes:
        name: as on the command line.
        summary: what it is for.
        source: where it comes from.
        reason: why it has its place among the others.
        training: its settings under ``training``; every other setting that decides a curriculum takes its default.
    """

    name: str
    summary: str
    source: str
    reason: str
    training: dict[str, Any] = field(default_factory=dict)


def _grown(**settings: Any) -> dict[str, Any]:
    return {"strategy": "progressive", "progressive": settings}


def _phases(*entries: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"strategy": "phases", "phases": list(entries), "progressive": settings}


_LORA = {"enabled": True, "rank": 8, "alpha": 16.0, "progressive_enabled": True, "progressive_rank": 4}
_OWN = "this project"

_ALL = (
    Recipe(
        "grown",
        "Stacks join as copies of their neighbour and everything trains: fewer FLOPs for the same loss.",
        "G_stack 2405.15319",
        "everything trains and new Stacks are copies: the loss of end to end for fewer FLOPs (2405.15319)",
        _grown(trunk_strategy="trainable", new_stack_init="copy"),
    ),
    Recipe(
        "late-expansion",
        "One Stack for half the budget, then all the others at once: a single expansion disturbs least.",
        "2511.04981",
        "one expansion with everything trainable: within 0.2 % for a fifth of the FLOPs (2511.04981)",
        _phases(
            {"add": 1, "share": 0.5}, {"add": "rest", "share": 0.5}, trunk_strategy="trainable", new_stack_init="copy"
        ),
    ),
    Recipe(
        "end-to-end",
        "The whole Rack from the start, everything trains: what every other recipe is compared with.",
        "GPT-2 (Radford et al. 2019)",
        "everything trains from the start: the baseline",
        {"strategy": "end_to_end"},
    ),
    Recipe(
        "grown-checkpointed",
        "As grown, with activations recomputed: the same loss in less memory.",
        "2405.15319 and 1604.06174",
        "the losses of grown, for a third more FLOPs",
        {**_grown(trunk_strategy="trainable", new_stack_init="copy"), "activation_checkpointing": True},
    ),
    Recipe(
        "end-to-end-checkpointed",
        "End to end with activations recomputed, for a third more FLOPs: the first thing to try when memory is short.",
        "1604.06174",
        "the losses of end to end, for a third more FLOPs",
        {"strategy": "end_to_end", "activation_checkpointing": True},
    ),
    Recipe(
        "middle-insertion",
        "New Stacks join in the middle as the identity: the first and the last keep their work; everything trains.",
        "LEMON 2310.07999",
        "everything trains; the place is less tried than the end (2310.07999)",
        _phases({"add": 1}, {"add": "each", "at": "middle", "share": 0.7}, new_stack_init="identity"),
    ),
    Recipe(
        "prepend-trainable",
        "New Stacks join at the left and everything trains.",
        _OWN,
        "everything trains; no published result for language models",
        _grown(building_mode="prepend", trunk_strategy="trainable", new_stack_init="identity"),
    ),
    Recipe(
        "append-qlora",
        "The trunk is stored in 4 bits and adapts through two low-rank adapters a Stack, beside the new Stack.",
        "QLoRA 2305.14314",
        "the trunk adapts through low-rank factors (2305.14314)",
        {**_grown(trunk_strategy="qlora", trunk_precision="nf4", new_stack_init="identity"), "qlora": _LORA},
    ),
    Recipe(
        "prepend-qlora",
        "New Stacks join at the left of a 4-bit suffix that adapts through its adapters.",
        "QLoRA 2305.14314",
        "as append-qlora; no published result for language models",
        {
            **_grown(building_mode="prepend", trunk_strategy="qlora", trunk_precision="nf4", new_stack_init="identity"),
            "qlora": _LORA,
        },
    ),
    Recipe(
        "gradual-unfreezing",
        "Stacks grow on a frozen trunk, then train again from the last one to the first, one more in each phase.",
        "ULMFiT 1801.06146 §3.3",
        "frozen while it grows, and everything trains at the end (1801.06146)",
        _phases(
            {"add": "each", "trunk": "frozen", "share": 0.5},
            {"unfreeze": "right_to_left", "share": 0.5},
            new_stack_init="copy",
        ),
    ),
    Recipe(
        "fusion",
        "Stacks grow on a frozen trunk, then neighbours train in pairs, then everything together.",
        _OWN,
        "frozen while it grows, pairs together, and everything trains at the end",
        _phases(
            {"add": "each", "trunk": "frozen", "share": 0.5},
            {"sweep": "right_to_left", "group": 2, "share": 0.25},
            {"trains": "all", "share": 0.25},
            new_stack_init="copy",
        ),
    ),
    Recipe(
        "append-frozen-joint",
        "As append-frozen, and in the last quarter everything trains, which wins most of the loss back.",
        "MSLT 2011.13635",
        "frozen while it grows; a joint phase wins back most of the loss (2011.13635)",
        _grown(trunk_strategy="frozen", new_stack_init="copy", joint_fraction=0.25),
    ),
    Recipe(
        "block-coordinate",
        "Sweeps over the Stacks of a Rack grown early, with the optimizer state of the active one only.",
        "BAdam 2404.02827",
        "near Adam in fine-tuning, unproven from scratch (2404.02827)",
        _phases(
            {"add": "rest", "share": 0.25},
            {"sweep": "left_to_right", "cycles": 2},
            new_stack_init="random",
            optimizer_state="reset",
        ),
    ),
    Recipe(
        "append-cached",
        "As append-frozen, with the trunk run once and then off the device: time and memory of one Stack at any depth.",
        _OWN,
        "the losses of a frozen trunk, with the FLOPs and the memory of one Stack",
        _grown(trunk_strategy="frozen", new_stack_init="copy", cache_activations=True),
    ),
    Recipe(
        "append-frozen",
        "Each new Stack trains on a frozen trunk: the memory of one Stack, at a price in loss.",
        "greedy layer-wise training, Bengio et al. 2006",
        "a frozen trunk without a joint phase costs quality (2411.18700)",
        _grown(trunk_strategy="frozen", new_stack_init="copy"),
    ),
    Recipe(
        "append-frozen-nf4",
        "As append-frozen, with the trunk stored in 4 bits: for racks whose weights alone do not fit.",
        "QLoRA 2305.14314 §3",
        "as append-frozen, and the trunk is rounded to 4 bits",
        _grown(trunk_strategy="frozen", trunk_precision="nf4", new_stack_init="copy"),
    ),
    Recipe(
        "prepend-frozen",
        "New Stacks join at the left, gradients pass through the frozen suffix: the head side is learnt first.",
        _OWN,
        "gradients pass the frozen suffix; no published result for language models",
        _grown(building_mode="prepend", trunk_strategy="frozen", new_stack_init="identity"),
    ),
    Recipe(
        "stackwise",
        "The whole Rack is there and one Stack after another trains, once: little optimizer state, no growth.",
        _OWN,
        "one pass over Stacks that never train together",
        {"strategy": "end_to_end", "end_to_end_scope": "stackwise"},
    ),
    Recipe(
        "blockwise",
        "The whole Rack is there and one Block after another trains, once.",
        _OWN,
        "one pass over Blocks that never train together",
        {"strategy": "end_to_end", "end_to_end_scope": "blockwise"},
    ),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
"""By name, best first: by the loss to expect at equal FLOPs, whatever memory they need."""

_OWNED = ("strategy", "end_to_end_scope", "phases", "qlora", "activation_checkpointing")
"""Settings of ``training`` that a recipe decides; of ``training.progressive`` it decides all but the objective."""
_KEPT = ("target_stacks", "time_interpretation", "training_objective")


def recipe_names(text: str) -> list[str]:
    """``A,B,…`` or ``all`` as names. UserError, with the nearest name, for one that there is not."""
    names = list(RECIPES) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        _recipe(name, "--recipes")
    if not names:
        raise UserError(f"--recipes: {text!r} names no recipe; allowed: all, {', '.join(RECIPES)}")
    return names


def apply_recipe(config: StackWiseConfig, name: str) -> StackWiseConfig:
    """``config`` trained by a recipe, see ``with_recipe``.

    Raises:
        UserError: there is no such recipe, or it does not fit the config.
    """
    return StackWiseConfig.from_dict(with_recipe(config.to_dict(), name), (), f"recipe {name}")


def with_recipe(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Settings as a config file has them, trained by a recipe: the sizes, data, objective, budget, optimizer and
    schedule of ``settings``, the recipe's curriculum. Of phases that have objectives of their own, the objective is
    that of the last one.

    Sections of a wrong type are left as they are: reading the result as a config says what is wrong with them.

    Raises:
        UserError: there is no such recipe.
    """
    recipe = dict(_recipe(name).training)
    training = {} if settings.get("training") is None else settings["training"]
    progressive = training.get("progressive") if isinstance(training, dict) else None
    progressive = {} if progressive is None else progressive
    if not isinstance(training, dict) or not isinstance(progressive, dict):
        return settings
    phases = training.get("phases")
    last = phases[-1] if isinstance(phases, list | tuple) and phases else None
    kept = {key: value for key, value in progressive.items() if key in _KEPT}
    if isinstance(last, dict) and last.get("objective") is not None:
        kept["training_objective"] = last["objective"]
    kept |= recipe.pop("progressive", {})
    rest = {key: value for key, value in training.items() if key not in _OWNED and key != "progressive"}
    return {**settings, "training": {**rest, **recipe, "progressive": kept}}


def _recipe(name: str, option: str = "--recipe") -> Recipe:
    if name not in RECIPES:
        raise UserError(f"{option}: {name!r} is not a recipe; {allowed(name, RECIPES)}")
    return RECIPES[name]
