"""Tasks, arms and recipes of the state study."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import torch

from ka_attention.errors import UserError
from ka_attention.harness.models.arms import Arm, arm
from ka_attention.harness.tasks.learning import Examples, Task, TaskSettings
from ka_attention.harness.tasks.statements import Slots
from ka_attention.hf import KAConfig

SIGNED = "KA, signed gate per token"


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
    if base == "ka-signed":
        ka = KAConfig(window=window if windowed else None, gate="token", gate_init=0.5, gate_range=(-1.0, 1.0))
        return Arm(name, SIGNED, ka)
    return replace(arm(f"{base}-w{window}" if windowed else base), name=name)


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
