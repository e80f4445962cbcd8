"""State tracking: what can KA-attention keep count of, with gates in [0, 1] and with signed gates?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ka_attention.harness.run.store import Store
from ka_attention.harness.tasks.learning import Plan, learn
from ka_attention.report.document import Section
from ka_attention.studies.state import report
from ka_attention.studies.state.recipes import RECIPES, TASKS, StateRecipe, state_arm
from ka_attention.studies.state.report import Results


class StateStudy:
    """Running products of permutations, one token a step and spelled out."""

    name = "state"
    question = "What state can KA-attention track?"
    recipes: Mapping[str, Any] = RECIPES
    results = Results

    def run(self, recipe: StateRecipe, store: Store, seeds: int) -> Results:
        """Train and test every arm on every task."""
        plans = {
            f"{task}/{name}/{layers}": Plan(task, TASKS[task][1], state_arm(name, TASKS[task][1]), layers)
            for task in recipe.tasks
            for layers in recipe.layers
            for name in recipe.arms
        }
        return Results(learn(plans, recipe, store, seeds))

    def sections(self, recipe: StateRecipe, results: Results) -> list[Section]:
        """One table a task: the share of right answers at the training length and beyond."""
        return report.sections(recipe, results)


STATE = StateStudy()
