"""Synthetic tasks in hybrids: references, steps along a permutation, recall, permutations spelled out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from ka_attention.harness.figures.statistics import mean_sd
from ka_attention.harness.models.arms import Arm
from ka_attention.harness.models.passes import Passes
from ka_attention.harness.run.progress import bar
from ka_attention.harness.run.store import Store
from ka_attention.harness.run.timing import now
from ka_attention.harness.tasks.learning import (
    TRAINING,
    Exam,
    Learned,
    Plan,
    Task,
    TaskSettings,
    draw_groups,
    evaluate,
    learn,
)
from ka_attention.harness.tasks.learning import build as build_plan
from ka_attention.harness.tasks.statements import Depo, Dereference, Recall, Slots
from ka_attention.harness.training.pretraining import PretrainingSettings, adamw, set_rate, step, unchanged
from ka_attention.report.document import Figure, Section, Table
from ka_attention.studies.hybrid.labels import Labels
from ka_attention.studies.hybrid.looks import look
from ka_attention.studies.hybrid.models import LlamaSettings, arm, build, count
from ka_attention.studies.hybrid.recipes import HEAD, HybridRecipe

UNITS = {
    "dereference": "depth (references)",
    "depo": "k (steps)",
    "recall": "distance (tokens, rounded down to 2^n)",
    "slots": "position (statements)",
}
DRAWN = 8  # batches drawn at once
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
        batch_size=recipe.task_batch,
        learning_rate=recipe.task_rate,
        hidden_size=recipe.task_size,
        heads=max(1, recipe.task_size // HEAD),
        warmup_steps=100,
        least_seeds=1,
    )


def teach(recipe: HybridRecipe, store: Store, seeds: int) -> dict[str, Learned]:
    """Train and test every arm of ``task_arms`` in every number of layers; parts are named by what they depend on."""
    how = (recipe.task_length, recipe.task_hops, recipe.task_samples, recipe.task_size, recipe.task_batch)
    said = "-".join(map(str, (*how, recipe.task_rate)))
    plans = {
        f"tasks/{name}-{said}/{each}/{layers}": Plan(name, task, TaskArm(each, arm(each).label), layers)
        for name, task in tasks(recipe).items()
        for layers in recipe.task_layers
        for each in recipe.task_arms
    }
    return learn(plans, settings(recipe), store, seeds, _learn)


def _learn(plan: Plan, settings: TaskSettings, store: Store, part: str, seed: int) -> Exam:
    """As models of text are trained, so as one graph a step on CUDA; sequences are drawn as they are read."""
    device: Any = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = build_plan(plan, settings, seed).to(device)
    passes = Passes(compiled=device.type == "cuda", graphs=device.type == "cuda")
    length, size = settings.length, settings.batch_size
    how = PretrainingSettings(
        sequence_length=length,
        batch_size=size,
        train_tokens=settings.train_samples * length,
        validation_sequences=size,
        evaluations=1,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
    )
    optimizer = adamw(model, how, gate_rate=arm(plan.arm.name).gate_rate)

    def work(both: torch.Tensor) -> torch.Tensor:
        return step(model, optimizer, passes, both[:, 0], both[:, 1])

    batches = _batches(plan.task, size, length, np.random.default_rng([seed, TRAINING, length]))
    with unchanged(model, optimizer):
        study = passes.ready(work, next(batches).to(device))
    began = now(device)
    with bar(f"{plan.name}: {plan.arm.label}, {plan.layers} layers", how.steps) as advance:
        for number in range(how.steps):
            set_rate(optimizer, how.rate(number))
            study(next(batches).to(device))
            advance(1)
    return Exam(count(model), now(device) - began, evaluate(model, plan.task, settings, seed))


def _batches(task: Task, size: int, length: int, random: np.random.Generator) -> Iterator[torch.Tensor]:
    """Statements and answers ``[size, 2, length]``, without end."""
    while True:
        drawn = task.examples(DRAWN * size, length, random)
        yield from torch.stack([drawn.statements, drawn.answers], 1).split(size)


def sections(recipe: HybridRecipe, learned: Mapping[str, Learned]) -> list[Section]:
    """Right answers at both lengths, and by depth or k."""
    if not learned:
        return []
    lengths = recipe.task_length, LONGER * recipe.task_length
    labels = Labels(arm(entry.arm.name) for entry in learned.values())
    tables, figures = [], []
    for name in recipe.tasks:
        unit = UNITS[name.partition("-")[0]]
        found = [
            replace(entry, arm=replace(entry.arm, kind=labels(arm(entry.arm.name))))
            for entry in learned.values()
            if entry.task == name
        ]
        rows = [[entry.label, *(mean_sd(entry.percents(test)) for test in range(2))] for entry in found]
        columns = ["arm", *(f"{length} statements" for length in lengths)]
        tables.append(Table(f"{name}: right answers (%)", columns, rows))
        caption = f"{name}: right answers by {unit}, {lengths[0]} statements"
        figures.append(Figure(f"hybrid_{name.replace('-', '_')}", caption, partial(_draw, found, unit), (4.8, 4.6)))
    words = [
        "*Dereference*: chains of assignments, the value to name at each. *Depo*: the arrows of one shuffled cycle, "
        f"then questions which node stands k = 1 to {recipe.task_hops} steps on (arXiv 2512.17351). *Recall* of 1 or 8 "
        "pairs past fillers. *Slots*: permutations of 3 or 5 things, spelled out. Models of size "
        f"{recipe.task_size} are trained at {lengths[0]} statements and tested there and at {lengths[1]}; "
        f"{recipe.task_samples:,} training sequences. {labels.notes()}"
    ]
    return [Section("Tasks", words, tables, figures)]


def _draw(found: list[Learned], unit: str, ax: Any) -> None:
    draw_groups(found, 0, ax, _style)
    ax.set_xlabel(unit)
    ax.figure.legend(loc="outside upper center", ncols=1, fontsize=7)


def _style(of: Arm) -> dict[str, Any]:
    each = arm(of.name)
    return look(each) | ({"fillstyle": "none"} if each.pattern == "all" and each.mixer != "full" else {})
