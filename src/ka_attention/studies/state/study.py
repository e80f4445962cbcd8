"""State tracking: what can KA-attention keep count of, with gates in [0, 1] and with signed gates?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch

from ka_attention.errors import UserError
from ka_attention.harness.arms import Arm, arm
from ka_attention.harness.statistics import mean, mean_sd
from ka_attention.harness.store import Json, Store
from ka_attention.harness.tasks import Examples, Plan, Task, TaskSettings, learn, percents
from ka_attention.hf import KAConfig
from ka_attention.report.document import Section, Table

SOLVED = 0.99  # share of right answers from which a task counts as solved
LABELS = {"ka-signed": "KA, signed gate per token"}


@dataclass(frozen=True)
class Product:
    """Permutations of ``degree`` things, one a token; the answer is the product of all so far. Degree 2 is parity.

    Symbols are the ``degree``! permutations in lexicographic order. The left side marks the first token (1, else 0).
    Groups are positions.
    """

    degree: int

    @property
    def symbols(self) -> int:
        return len(self.table)

    @property
    def table(self) -> np.ndarray:
        """``[degree!, degree]``: row p is the permutation p."""
        return np.array(list(permutations(range(self.degree))))

    def examples(self, count: int, length: int, random: np.random.Generator) -> Examples:
        """``count`` sequences of ``length`` permutations."""
        table = self.table
        # The number of a product of permutations: composed[a, b] is "first a, then b".
        number = {tuple(row): index for index, row in enumerate(table.tolist())}
        composed = np.array([[number[tuple(b[a].tolist())] for b in table] for a in table])
        factors = random.integers(len(table), size=(count, length))
        answers = factors.copy()
        for t in range(1, length):
            answers[:, t] = composed[answers[:, t - 1], factors[:, t]]
        statements = factors.copy()
        statements[:, 0] += self.symbols
        positions = np.broadcast_to(np.arange(length), answers.shape).copy()
        return Examples(*map(torch.from_numpy, (statements, answers, positions)))


@dataclass(frozen=True)
class Slots:
    """The same product spelled out: ``degree`` statements a step, "slot k now holds what slot s held before this step".

    The first ``degree`` statements put the things into the slots, in order. The answer is what the slot holds. Symbols
    are the slots, then the things. Groups are positions; a last incomplete step is allowed.
    """

    degree: int

    @property
    def symbols(self) -> int:
        return 2 * self.degree

    def examples(self, count: int, length: int, random: np.random.Generator) -> Examples:
        """``count`` sequences of ``length`` statements."""
        n = self.degree
        steps = -(-length // n)
        sources = random.permuted(np.tile(np.arange(n), (count, steps, 1)), axis=2)
        held = np.empty_like(sources)
        held[:, 0] = np.arange(n)
        for step in range(1, steps):
            held[:, step] = np.take_along_axis(held[:, step - 1], sources[:, step], axis=1)
        right = sources.copy()
        right[:, 0] = n + np.arange(n)
        statements = np.arange(n) * self.symbols + right
        positions = np.broadcast_to(np.arange(length), (count, length)).copy()
        flat = [x.reshape(count, -1)[:, :length].copy() for x in (statements, n + held)]
        return Examples(*map(torch.from_numpy, (*flat, positions)))


TASKS: dict[str, tuple[str, Task]] = {
    "parity": ("parity, one bit a token", Product(2)),
    "s3": ("S3, one permutation a token", Product(3)),
    "s5": ("S5, one permutation a token", Product(5)),
    "parity-slots": ("parity spelled out: 2 tokens a bit", Slots(2)),
    "s3-slots": ("S3 spelled out: 3 tokens a permutation", Slots(3)),
    "s5-slots": ("S5 spelled out: 5 tokens a permutation", Slots(5)),
}


def state_arm(name: str, task: Task) -> Arm:
    """An arm of ``arms.arm``, or ``ka-signed`` with gates in [−1, 1]; ``-w`` gives it a window of two steps."""
    base, windowed = name.removesuffix("-w"), name.endswith("-w")
    window = 2 * (task.degree if isinstance(task, Slots) else 1)
    label = LABELS.get(base) or arm(base).label
    label += ", window of 2 steps" if windowed else ""
    if base == "ka-signed":
        ka = KAConfig(window=window if windowed else None, gate="token", gate_init=0.5, gate_range=(-1.0, 1.0))
        return Arm(name, label, ka)
    return Arm(name, label, arm(f"{base}-w{window}" if windowed else base).ka)


@dataclass(frozen=True, kw_only=True)
class StateRecipe(TaskSettings):
    """Which tasks, which arms, and how many layers."""

    name: str
    summary: str
    tasks: tuple[str, ...] = tuple(TASKS)
    arms: tuple[str, ...] = ("softmax-w", "ka", "ka-w", "ka-signed-w")
    layers: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.tasks if name not in TASKS]:
            raise UserError(f"--set tasks: no task {unknown[0]!r}; allowed are {', '.join(TASKS)}")


RECIPES = {
    recipe.name: recipe
    for recipe in (
        StateRecipe(
            name="quick",
            summary="parity, and S5 spelled out, in 30 and 90 tokens, three seeds: minutes on two CPU cores",
            tasks=("parity", "s5-slots"),
            arms=("softmax-w", "ka", "ka-w", "ka-signed-w"),
            length=30,
            test_lengths=(30, 90),
            train_samples=32 * 200,
            batch_size=32,
            test_samples=256,
        ),
        StateRecipe(
            name="h100",
            summary="all tasks, one and two layers, three seeds: minutes on a GPU",
            length=30,
            test_lengths=(30, 90),
            train_samples=256 * 120,
            test_samples=1024,
            batch_size=256,
        ),
    )
}


class StateStudy:
    """Running products of permutations, one token a step and spelled out."""

    name = "state"
    question = "What state can KA-attention track?"
    recipes: Mapping[str, Any] = RECIPES

    def run(self, recipe: StateRecipe, store: Store, seeds: int) -> dict[str, Json]:
        """Train and test every arm on every task."""
        plans = {}
        for task in recipe.tasks:
            for layers in recipe.layers:
                for name in recipe.arms:
                    each = state_arm(name, TASKS[task][1])
                    label = f"{TASKS[task][0]}: {each.label}, {layers} layer{'s' if layers > 1 else ''}"
                    plans[f"{task}/{name}/{layers}"] = Plan(TASKS[task][1], each, layers, label)
        return {"arms": learn(plans, recipe, store, seeds)}

    def sections(self, results: dict[str, Json]) -> list[Section]:
        """One table a task: the share of right answers at the training length and beyond."""
        recipe, arms = results["recipe"], results["arms"]
        lengths = recipe["test_lengths"]
        words = [
            "The state is a permutation, and every step multiplies it by another: of 2 things this is parity, of 5 it "
            "is as hard as any regular language (complete for NC¹). The model names the state after each token. **One "
            "token a step** is the usual form. **Spelled out**, a step has one token a slot, “slot k now holds what "
            "slot s held”, and the model names what the slot holds: a reference again, that goes one step back.",
            f"Trained with {recipe['length']} tokens, each sequence seen once; a table says what a guess gets.",
            "**Expected:** one token a step, weights that are not negative cannot flip a sign, so KA with gates in [0, "
            "1] fails at parity as softmax does, beyond what it counts by heart. A gate of −1 flips the sign of what "
            "is carried on, so signed gates could learn it. Spelled out, one KA layer suffices for every group, and a "
            "window of two steps is all it needs; softmax needs layers that grow with the length.",
            _came(results),
        ]
        tables = []
        for task in recipe["tasks"]:
            rows = []
            for key, entry in arms.items():
                if key.split("/")[0] == task:
                    accuracies = [mean_sd(percents(entry, test)) for test in range(len(lengths))]
                    layers = str(entry["layers"])
                    rows.append([entry["kind"], layers, f"{entry['seeds'][0]['parameters']:,}", *accuracies])
            columns = ["arm", "layers", "parameters", *(f"right in {length} tokens (%)" for length in lengths)]
            guess = 100 / _answers(task)
            tables.append(Table(f"{TASKS[task][0].capitalize()} (a guess: {guess:.1f} %)", columns, rows))
        return [Section("State tracking", words, tables)]


def _answers(task: str) -> int:
    """From how many answers a guess picks."""
    made = TASKS[task][1]
    return made.degree if isinstance(made, Slots) else made.symbols


def _came(results: dict[str, Json]) -> str:
    sentences = []
    for task in results["recipe"]["tasks"]:
        solved: dict[str, list[str]] = {"here": [], "beyond": []}
        for key, entry in results["arms"].items():
            if key.split("/")[0] == task:
                here, beyond = (mean(percents(entry, test)) >= 100 * SOLVED for test in (0, -1))
                name = entry["label"].removeprefix(f"{TASKS[task][0]}: ")
                if here:
                    solved["beyond" if beyond else "here"].append(name)
        said = []
        if solved["beyond"]:
            said.append(f"solved also at the longest test by {'; '.join(solved['beyond'])}")
        if solved["here"]:
            said.append(f"solved at the training length only by {'; '.join(solved['here'])}")
        sentences.append(f"{TASKS[task][0]} is {', and '.join(said) or 'solved by none'}.")
    return f"**Came** (solved: at least {SOLVED:.0%} right on average over the seeds): " + " ".join(sentences)


STATE = StateStudy()
