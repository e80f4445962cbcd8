"""Dereference: how deep a chain of references can a model follow with so many layers?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ka_attention.harness.models.arms import arm
from ka_attention.harness.run.store import Store
from ka_attention.harness.tasks.learning import Plan, learn
from ka_attention.report.document import Section
from ka_attention.studies.dereference import report
from ka_attention.studies.dereference.recipes import RECIPES, DereferenceRecipe
from ka_attention.studies.dereference.report import Results


class DereferenceStudy:
    """Accuracy by depth of reference, for layers of softmax attention and of KA-attention."""

    name = "dereference"
    question = "How long a chain of references can a layer follow?"
    recipes: Mapping[str, Any] = RECIPES
    results = Results

    def run(self, recipe: DereferenceRecipe, store: Store, seeds: int) -> Results:
        """Train and test every arm with every number of layers."""
        plans = {
            f"{each.name}/{layers}": Plan("dereference", recipe.task, each, layers)
            for layers in recipe.layers
            for each in map(arm, recipe.arms)
        }
        return Results(learn(plans, recipe, store, seeds))

    def sections(self, recipe: DereferenceRecipe, results: Results) -> list[Section]:
        """How deep each number of layers reaches, at the training length and beyond."""
        return report.sections(recipe, results)


DEREFERENCE = DereferenceStudy()
