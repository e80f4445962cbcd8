"""Made-up tasks in hybrids: references, steps along a permutation, recall, permutations spelled out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import LlamaForCausalLM

from ka_attention.harness.arms import Arm
from ka_attention.harness.statements import Depo, Recall, Slots
from ka_attention.harness.statistics import mean_sd
from ka_attention.harness.store import Store
from ka_attention.harness.tasks import Dereference, Learned, Plan, Task, TaskSettings, draw_groups, learn
from ka_attention.report.document import Figure, Section, Table
from ka_attention.studies.hybrid.models import LlamaSettings, arm, build
from ka_attention.studies.hybrid.recipes import HybridRecipe

UNITS = {
    "dereference": "depth (references)",
    "depo": "k (steps)",
    "recall": "distance (tokens, rounded down to 2^n)",
    "slots": "position (statements)",
}
LONGER = 3  # times the length of the training, in the second test


@dataclass(frozen=True)
class TaskArm(Arm):
    """An arm of `models.arm`, as a model that reads statements."""

    def install(self, model: Any) -> LlamaForCausalLM:
        """A Llama-like model of this arm in the place of a GPT-NeoX, of its size and with its embedding."""
        config = model.config
        settings = LlamaSettings(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            intermediate_size=2 * config.hidden_size + config.hidden_size // 2,
            tied=False,
            initial_sd=config.initializer_range,
        )
        made = build(arm(self.name), settings, config.max_position_embeddings, torch.initial_seed(), tolerance=0.05)
        made.set_input_embeddings(model.get_input_embeddings())
        return made


def tasks(recipe: HybridRecipe) -> dict[str, Task]:
    """The tasks by name."""
    longest = LONGER * recipe.task_length
    made: dict[str, Task] = {
        "dereference": Dereference(names=longest, literals=16, chains=4),
        "depo": Depo(nodes=longest // 2, hops=recipe.task_hops),
        "recall-1": Recall(64, 16, pairs=1),
        "recall-8": Recall(64, 16, pairs=8),
        "slots-3": Slots(3),
        "slots-5": Slots(5),
    }
    return {name: made[name] for name in recipe.tasks}


def settings(recipe: HybridRecipe) -> TaskSettings:
    """How models are trained on the tasks, and tested at the length of the training and at three times it."""
    return TaskSettings(
        length=recipe.task_length,
        test_lengths=(recipe.task_length, LONGER * recipe.task_length),
        train_samples=recipe.task_samples,
        test_samples=256,
        batch_size=32,
        learning_rate=3e-3,
        heads=4,
        least_seeds=1,
    )


def teach(recipe: HybridRecipe, store: Store, seeds: int) -> dict[str, Learned]:
    """Train and test every arm of ``task_arms`` in every number of layers; parts are named by what they depend on."""
    plans = {
        f"tasks/{name}-{recipe.task_length}-{recipe.task_hops}-{recipe.task_samples}/{each}/{layers}": Plan(
            name, task, TaskArm(each, arm(each).label), layers
        )
        for name, task in tasks(recipe).items()
        for layers in recipe.task_layers
        for each in recipe.task_arms
    }
    return learn(plans, settings(recipe), store, seeds)


def sections(recipe: HybridRecipe, learned: Mapping[str, Learned]) -> list[Section]:
    """Right answers at both lengths, and by depth or k."""
    if not learned:
        return []
    lengths = recipe.task_length, LONGER * recipe.task_length
    tables, figures = [], []
    for name in recipe.tasks:
        unit = UNITS[name.partition("-")[0]]
        found = [entry for entry in learned.values() if entry.task == name]
        rows = [[entry.label, *(mean_sd(entry.percents(test)) for test in range(2))] for entry in found]
        columns = ["arm", *(f"{length} statements" for length in lengths)]
        tables.append(Table(f"{name}: right answers (%)", columns, rows))
        caption = f"{name}: right answers by {unit}, {lengths[0]} statements"
        figures.append(Figure(f"hybrid_{name.replace('-', '_')}", caption, partial(_draw, found, unit), (4.8, 4.6)))
    words = [
        "*Dereference*: chains of assignments, the value to name at each. *Depo*: the arrows of one shuffled cycle, "
        f"then questions which node stands k = 1 to {recipe.task_hops} steps on (arXiv 2512.17351). *Recall* of 1 or 8 "
        "pairs past fillers. *Slots*: permutations of 3 or 5 things, spelled out. Models are trained "
        f"at {lengths[0]} statements and tested there and at {lengths[1]}; {recipe.task_samples:,} training sequences."
    ]
    return [Section("Tasks", words, tables, figures)]


def _draw(found: list[Learned], unit: str, ax: Any) -> None:
    draw_groups(found, 0, ax)
    ax.set_xlabel(unit)
    ax.figure.legend(loc="outside upper center", ncols=1, fontsize=7)
