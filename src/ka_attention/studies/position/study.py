"""Does an error accumulate along the sequence? Perplexity by position, KA against softmax, for growing lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ka_attention.harness.models.arms import arm
from ka_attention.harness.run.store import Store
from ka_attention.harness.training.lengths import train_at_lengths
from ka_attention.report.document import Section
from ka_attention.studies.position import report
from ka_attention.studies.position.recipes import RECIPES, PositionRecipe
from ka_attention.studies.position.report import Results


class Position:
    """Train each arm at each length and read its perplexity by position."""

    name = "position"
    question = "Does KA-attention lose its way in long sequences?"
    recipes: Mapping[str, Any] = RECIPES
    results = Results

    def run(self, recipe: PositionRecipe, store: Store, seeds: int) -> Results:
        """Train and evaluate every arm at every length with every seed."""
        arms = [arm(name) for name in recipe.arms]
        return Results(*train_at_lengths(recipe, lambda _: arms, store, seeds))

    def sections(self, recipe: PositionRecipe, results: Results) -> list[Section]:
        """What was expected and what came, then a table and a figure for each length."""
        return report.sections(recipe, results)


POSITION = Position()
