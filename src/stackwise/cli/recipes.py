"""``stackwise recipes``: the named ways to train."""

from __future__ import annotations

from stackwise.cli.train import Json


def recipes(as_json: Json = False) -> None:
    """List the recipes, best first: what each is for, and where it comes from."""
    from stackwise.cli.results import print_json
    from stackwise.growth.recipes import RECIPES

    if as_json:
        rows = [{"name": r.name, "summary": r.summary, "source": r.source} for r in RECIPES.values()]
        print_json(rows, "Recipe")
        return
    for recipe in RECIPES.values():
        print(f"{recipe.name}\n    {recipe.summary} ({recipe.source})")
