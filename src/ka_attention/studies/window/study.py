"""Windows: how much quality does a cache of constant size keep, for softmax attention and for KA-attention?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ka_attention.harness.models.arms import Arm
from ka_attention.harness.models.saved import cache_size
from ka_attention.harness.run.store import Store
from ka_attention.harness.tasks.learning import Plan, learn
from ka_attention.harness.training.lengths import train_at_lengths
from ka_attention.report.document import Section
from ka_attention.studies.window import peers, report
from ka_attention.studies.window.recipes import RECIPES, WindowRecipe, window_arm
from ka_attention.studies.window.report import Results


class WindowStudy:
    """Perplexity and synthetic tasks against the bytes of the cache."""

    name = "window"
    question = "What does a short window cost, and does KA-attention reach beyond it?"
    recipes: Mapping[str, Any] = RECIPES
    results = Results

    def run(self, recipe: WindowRecipe, store: Store, seeds: int) -> Results:
        """Train every arm on text at every length, and some on the tasks."""
        arms = [window_arm(name, recipe.layers) for name in recipe.arms]
        plans = {
            f"tasks/{task}/{name}": Plan(task, made, window_arm(name, recipe.task_layers), recipe.task_layers)
            for task, made in recipe.tasks.items()
            for name in recipe.task_arms
        }

        def distinct(length: int) -> Sequence[Arm]:
            return [each for each in arms if each is arms[0] or (each.window or 0) < length]

        data, lengths = train_at_lengths(recipe, distinct, store, seeds)
        sizes = {
            run.length: {each.name: _cache_bytes(recipe.at(run.length), each) for each in distinct(run.length)}
            for run in lengths
        }
        return Results(data, lengths, sizes, learn(plans, recipe.task_settings, store, seeds))

    def sections(self, recipe: WindowRecipe, results: Results) -> list[Section]:
        """Perplexity against cache bytes at each length, then the tasks."""
        return report.sections(recipe, results)


def _cache_bytes(settings: WindowRecipe, arm: Arm) -> int:
    if isinstance(arm, peers.Peer):
        return arm.state_bytes(settings.config())
    return cache_size(settings.config(), arm.ka, arm.own_cache, settings.sequence_length)


WINDOW = WindowStudy()
