"""Synthetic tasks with one right answer per token: sequences of statements, the model that reads them, its accuracy.

A statement is one token made of two symbols, ``left = right``: its embedding is the sum of two embeddings. So a layer
needs no help from an earlier one to know what stands on either side.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPTNeoXForCausalLM, set_seed

from ka_attention.errors import UserError
from ka_attention.harness.figures.drawing import look
from ka_attention.harness.models.arms import Arm
from ka_attention.harness.run.settings import ModelSettings, TrainingSettings
from ka_attention.harness.run.store import Store, main_process
from ka_attention.harness.text.data import Sequences
from ka_attention.harness.training.trainer import train

NOT_ASKED = -100  # in the place of an answer
TRAINING, VALIDATION, TESTS = range(3)  # streams of random sequences, all different
BATCH = 64  # sequences read at once when tested
FEWEST = 30  # answers of a group over all seeds, below which its accuracy says nothing
DASHES = (":", "--", "-.", "-")  # fewest layers first
SOLVED = 0.9  # share of right answers from which a task, or a group of its questions, counts as solved


class Examples(NamedTuple):
    """Sequences of a task, each int64 ``[N, T]``."""

    statements: Tensor  # left · symbols + right
    answers: Tensor  # the symbol to name at this statement, or NOT_ASKED
    groups: Tensor  # what accuracy is told by: depth, step, distance


class Task(Protocol):
    """A synthetic task. Both sides of a statement and the answers are symbols, counted from 0."""

    @property
    def symbols(self) -> int: ...

    def examples(self, count: int, length: int, random: np.random.Generator) -> Examples:
        """``count`` sequences of ``length`` statements; the same for the same generator."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaskSettings(TrainingSettings):
    """A small model and how much it sees: every training sequence once.

    length:        statements in a training sequence.
    test_lengths:  statements in the test sequences.
    train_samples, test_samples: sequences for training, and for testing at each length.
    least_seeds:   at least so many seeds: what can be learned is no matter of one.
    """

    length: int
    test_lengths: tuple[int, ...]
    train_samples: int
    test_samples: int
    least_seeds: int = 3
    hidden_size: int = 64
    heads: int = 1
    batch_size: int = 64
    learning_rate: float = 1e-2
    schedule: str = "cosine"
    warmup_steps: int = 20
    epochs: int = 1
    patience: int = 1

    def __post_init__(self) -> None:
        for name in ("length", "test_lengths", "test_samples", "least_seeds", "heads", "batch_size", "layers"):
            given = getattr(self, name, 1)  # layers are a setting of some studies
            if min(given if isinstance(given, tuple) else [given], default=0) < 1:
                raise UserError(f"--set {name}: expected at least 1, got {given}")
        if self.hidden_size < 1 or self.hidden_size % (8 * self.heads):
            raise UserError(f"--set hidden_size: expected heads × a multiple of 8, got {self.hidden_size}")
        if self.train_samples < self.batch_size:
            raise UserError(
                f"--set train_samples: expected batch_size = {self.batch_size} or more, got {self.train_samples}"
            )


class Plan(NamedTuple):
    """One model to train: on what, called ``name``, with which attention in how many layers."""

    name: str
    task: Task
    arm: Arm
    layers: int


@dataclass(frozen=True)
class Group:
    """Share of right answers among the ``count`` questions of a group."""

    group: int
    accuracy: float
    count: int


@dataclass(frozen=True)
class Score:
    """Share of right answers in sequences of ``length`` statements, as a whole and by group."""

    length: int
    accuracy: float
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Exam:
    """A trained model: parameters, seconds of training, and its tests."""

    parameters: int
    seconds: float
    tests: tuple[Score, ...]


@dataclass(frozen=True)
class Learned:
    """What became of a plan: an exam per seed."""

    task: str
    arm: Arm
    layers: int
    seeds: tuple[Exam, ...]

    @property
    def label(self) -> str:
        """The arm and how many layers it has."""
        return f"{self.arm.label}, {self.layers} layer{'s' if self.layers > 1 else ''}"

    def percents(self, test: int) -> list[float]:
        """Accuracy in one of the tests in percent, one number per seed."""
        return [100 * exam.tests[test].accuracy for exam in self.seeds]

    def by_group(self, test: int) -> dict[int, float]:
        """Accuracy in one of the tests by group, all seeds together, where there are answers enough."""
        answers: dict[int, list[Group]] = {}
        for exam in self.seeds:
            for group in exam.tests[test].groups:
                answers.setdefault(group.group, []).append(group)
        totals = {group: sum(each.count for each in found) for group, found in answers.items()}
        return {
            group: sum(each.accuracy * each.count for each in answers[group]) / totals[group]
            for group in sorted(answers)
            if totals[group] >= FEWEST
        }


class StatementEmbedding(nn.Module):
    """``left · symbols + right`` → the sum of the embeddings of both sides."""

    def __init__(self, symbols: int, size: int) -> None:
        super().__init__()
        self.symbols = symbols
        self.left, self.right = nn.Embedding(symbols, size), nn.Embedding(symbols, size)

    def forward(self, statements: Tensor) -> Tensor:
        return self.left(statements // self.symbols) + self.right(statements % self.symbols)


def build(plan: Plan, settings: TaskSettings, seed: int) -> GPTNeoXForCausalLM:
    """A GPT-NeoX that reads statements; for a seed all arms have the same weights (learned gates come on top)."""
    set_seed(seed)
    config = ModelSettings(
        vocab_size=plan.task.symbols,
        hidden_size=settings.hidden_size,
        layers=plan.layers,
        heads=settings.heads,
        intermediate_size=2 * settings.hidden_size,
    ).config()
    config._attn_implementation = "sdpa"
    # Attention that looks symbols up must be sharp; from transformers' 0.02 it takes far longer to become so.
    config.initializer_range = settings.hidden_size**-0.5
    model = GPTNeoXForCausalLM(config)
    model.set_input_embeddings(StatementEmbedding(plan.task.symbols, settings.hidden_size))
    return plan.arm.install(model)


def learn(
    plans: Mapping[str, Plan],
    settings: TaskSettings,
    store: Store,
    seeds: int,
    work: Callable[[Plan, TaskSettings, Store, str, int], Exam] | None = None,
) -> dict[str, Learned]:
    """Train and test each planned model with every seed; in a seed all models of a task see the same sequences.

    work: trains and tests one model of a plan, as a part of the store by this name and with this seed; by default with
          transformers' Trainer.
    """
    exams: dict[str, list[Exam]] = {key: [] for key in plans}
    for seed in range(max(seeds, settings.least_seeds)):
        for key, plan in plans.items():
            part = f"seed{seed}/{key}"
            exams[key].append(store.part(part, work or _learn, plan, settings, store, part, seed))
    return {key: Learned(plan.name, plan.arm, plan.layers, tuple(exams[key])) for key, plan in plans.items()}


def _learn(plan: Plan, settings: TaskSettings, store: Store, part: str, seed: int) -> Exam:
    def examples(count: int, length: int, stream: int) -> Examples:
        return plan.task.examples(count, length, np.random.default_rng([seed, stream, length]))

    folder = store.folder(f"weights/{part}")
    model = build(plan, settings, seed)
    training = _sequences(examples(settings.train_samples, settings.length, TRAINING))
    validation = _sequences(examples(settings.test_samples, settings.length, VALIDATION))
    label = f"{plan.name}: {plan.arm.label}, {plan.layers} layer{'s' if plan.layers > 1 else ''}"
    trained = train(model, training, validation, settings, folder, seed=seed, label=label)
    if main_process():
        shutil.rmtree(folder)  # there are many, and they are quickly trained again
    return Exam(trained.parameters, trained.seconds_per_epoch, evaluate(model, plan.task, settings, seed))


def evaluate(model: Any, task: Task, settings: TaskSettings, seed: int) -> tuple[Score, ...]:
    """What a model knows, at each of the lengths, of sequences that no training sees."""
    scores = []
    for length in settings.test_lengths:
        asked = task.examples(settings.test_samples, length, np.random.default_rng([seed, TESTS, length]))
        scores.append(accuracy(answer(model, asked.statements) == asked.answers, asked))
    return tuple(scores)


def _sequences(examples: Examples) -> Sequences:
    """For training: a language model's loss compares what is said at t with the label at t + 1."""
    return Sequences(F.pad(examples.statements, (0, 1)), F.pad(examples.answers, (1, 0), value=NOT_ASKED))


def answer(model: GPTNeoXForCausalLM, statements: Tensor) -> Tensor:
    """The symbol that the model names at each statement, ``[N, T]``."""
    model.eval()
    with torch.inference_mode():
        batches: Any = statements.split(BATCH)
        return torch.cat([model(input_ids=batch.to(model.device)).logits.argmax(-1).cpu() for batch in batches])


def accuracy(correct: Tensor, examples: Examples) -> Score:
    """Share of right answers, as a whole and by group; ``correct`` is bool ``[N, T]``."""
    asked = examples.answers != NOT_ASKED
    groups = []
    for group in examples.groups[asked].unique().tolist():
        right = correct[asked & (examples.groups == group)]
        groups.append(Group(group, right.double().mean().item(), right.numel()))
    return Score(correct.shape[1], correct[asked].double().mean().item(), tuple(groups))


def reach(accuracies: Mapping[int, float]) -> int:
    """The greatest group up to which all groups are SOLVED; −1 where not even the first is."""
    return next((group - 1 for group, right in accuracies.items() if right < SOLVED), max(accuracies))


def draw_groups(entries: Sequence[Learned], test: int, ax: Any, style: Callable[[Arm], dict[str, Any]] = look) -> None:
    """Right answers by group in one of the tests: ``style`` says how an arm looks, dashes are numbers of layers."""
    counts = sorted({entry.layers for entry in entries})
    for entry in entries:
        groups = entry.by_group(test)
        drawn = style(entry.arm) | {"linestyle": DASHES[counts.index(entry.layers) - len(counts)]}
        label = entry.label if len(counts) > 1 else entry.arm.label
        ax.plot(list(groups), [100 * right for right in groups.values()], label=label, **drawn)
    ax.set_ylim(0, 103)
    ax.set_ylabel("right answers (%)")
