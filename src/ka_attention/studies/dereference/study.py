"""Dereference: how deep a chain of references can a model follow with so many layers?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ka_attention.errors import UserError
from ka_attention.harness.arms import arm
from ka_attention.harness.statistics import mean, mean_sd
from ka_attention.harness.store import Json, Store
from ka_attention.harness.tasks import Examples, Plan, TaskSettings, by_group, learn, percents
from ka_attention.report.document import Figure, Section, Table

SOLVED = 0.9  # accuracy from which a depth counts as reached
LINES = (":", "--", "-.", "-")  # fewest layers first


@dataclass(frozen=True)
class Dereference:
    """Assignments ``x = literal`` or ``x = earlier variable``; the answer at each is the value of x.

    ``chains`` different literals are assigned first. Every later statement copies the newest variable of one of the
    chains, picked with probability ∝ 1/rank in an order of its own for every sequence, so that some chains grow long. A
    name is assigned once; names are drawn anew for every sequence. Groups are depths, the references between a variable
    and its literal. Symbols: ``names`` names, then ``literals`` literals.
    """

    names: int
    literals: int
    chains: int

    @property
    def symbols(self) -> int:
        return self.names + self.literals

    def examples(self, count: int, length: int, random: np.random.Generator) -> Examples:
        """``count`` sequences of ``length`` statements."""
        shuffled = [random.permuted(np.tile(np.arange(n), (count, 1)), axis=1) for n in (self.names, self.literals)]
        left, values = shuffled[0][:, :length], shuffled[1][:, : self.chains]
        share = 1 / np.arange(1, self.chains + 1)
        ranks = random.choice(self.chains, size=(count, length), p=share / share.sum())
        chain = np.take_along_axis(random.permuted(np.tile(np.arange(self.chains), (count, 1)), axis=1), ranks, axis=1)
        chain[:, : self.chains] = np.arange(self.chains)[:length]
        newest, depth = self.names + values, np.full((count, self.chains), -1)
        right, depths, row = np.empty_like(left), np.empty_like(left), np.arange(count)
        for t in range(length):
            at = row, chain[:, t]
            depth[at] += 1
            right[:, t], depths[:, t] = newest[at], depth[at]
            newest[at] = left[:, t]
        answers = self.names + np.take_along_axis(values, chain, axis=1)
        return Examples(*(torch.from_numpy(x) for x in (left * self.symbols + right, answers, depths)))


@dataclass(frozen=True, kw_only=True)
class DereferenceRecipe(TaskSettings):
    """Which arms with how many layers; as many names as the longest test needs.

    literals, chains: how many literals there are, and how many of them a sequence uses. Guessing gives 1 / chains.
    """

    name: str
    summary: str
    arms: tuple[str, ...] = ("softmax", "ka", "ka-token")
    layers: tuple[int, ...] = (1, 2, 3, 4)
    literals: int = 16
    chains: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.chains <= self.literals:
            raise UserError(f"--set chains: expected 1 to literals = {self.literals}, got {self.chains}")

    @property
    def task(self) -> Dereference:
        return Dereference(max(self.length, *self.test_lengths), self.literals, self.chains)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        DereferenceRecipe(
            name="quick",
            summary="1 to 3 layers on chains in 32 and 96 statements, three seeds: minutes on two CPU cores",
            arms=("softmax", "ka", "ka-head"),
            layers=(1, 2, 3),
            length=32,
            test_lengths=(32, 96),
            train_samples=32 * 275,
            batch_size=32,
            test_samples=256,
        ),
        DereferenceRecipe(
            name="h100",
            summary="1 to 4 layers with seven times the training, three seeds: minutes on a GPU",
            length=32,
            test_lengths=(32, 96),
            train_samples=256 * 350,
            test_samples=2048,
            batch_size=256,
        ),
    )
}


class DereferenceStudy:
    """Accuracy by depth of reference, for layers of softmax attention and of KA-attention."""

    name = "dereference"
    question = "How long a chain of references can a layer follow?"
    recipes: Mapping[str, Any] = RECIPES

    def run(self, recipe: DereferenceRecipe, store: Store, seeds: int) -> dict[str, Json]:
        """Train and test every arm with every number of layers."""
        plans = {}
        for layers in recipe.layers:
            for each in map(arm, recipe.arms):
                label = f"{each.label}, {layers} layer{'s' if layers > 1 else ''}"
                plans[f"{each.name}/{layers}"] = Plan(recipe.task, each, layers, label)
        return {"arms": learn(plans, recipe, store, seeds)}

    def sections(self, results: dict[str, Json]) -> list[Section]:
        """How deep each number of layers reaches, at the training length and beyond."""
        recipe, arms = results["recipe"], results["arms"]
        lengths = recipe["test_lengths"]
        setting = (
            "Sequences of assignments, `a = 7`, `b = a`, …: at each the model names the value. Trained with "
            f"{recipe['length']} statements, {recipe['chains']} chains each, so a guess is right 1 time in "
            f"{recipe['chains']}. A statement is one token, the sum of its symbols' embeddings, so that no layer is "
            "spent on finding out what stands beside what. Every model of a seed sees the same sequences, each once."
        )
        expected = (
            "**Expected:** a KA layer's output at a definition already is the resolved value, so one layer follows a "
            "chain of any length. A softmax layer can at best double the depth resolved, so L layers should end "
            "near depth 2^L − 1."
        )
        columns = ["arm", "parameters", "training (s)"]
        for length in lengths:
            columns += [f"right in {length} statements (%)", f"reach in {length} statements"]
        rows = []
        for entry in arms.values():
            seconds = [one["seconds"] for one in entry["seeds"]]
            rows.append([entry["label"], f"{entry['seeds'][0]['parameters']:,}", mean_sd(seconds)])
            for test in range(len(lengths)):
                rows[-1] += [mean_sd(percents(entry, test)), _reach(entry, test)]
        caption = (
            f"Right answers, and reach: the depth up to which every depth is answered right at least {SOLVED:.0%} of "
            "the time. Training times are of this run; on a busy machine they do not compare"
        )
        figures = []
        for test, length in enumerate(lengths):
            where = f"{length} statements" + (" (the training length)" if length == recipe["length"] else "")
            title = f"Right answers by depth in {where}; the grey line is a guess (all seeds together)"
            draw = partial(_draw, arms, test, 100 / recipe["chains"])
            figures.append(Figure(f"dereference_{length}", title, draw, (5.0, 4.2)))
        words = [setting, expected, _came(arms, lengths)]
        return [Section("Dereference", words, [Table(caption, columns, rows)], figures)]


def reach(accuracies: Mapping[int, float]) -> int:
    """The greatest depth up to which all depths are SOLVED; −1 where not even literals are."""
    return next((depth - 1 for depth, right in accuracies.items() if right < SOLVED), max(accuracies))


def _reach(entry: dict[str, Json], test: int) -> str:
    depths = by_group(entry, test)
    far = reach(depths)
    return "none" if far < 0 else f"{far} (all)" if far == max(depths) else str(far)


def _came(arms: dict[str, Json], lengths: list[int]) -> str:
    sentences = []
    for kind in dict.fromkeys(entry["kind"] for entry in arms.values()):
        reaches = [
            f"{entry['layers']} layer{'s' if entry['layers'] > 1 else ''}: "
            + ", ".join(f"{_reach(entry, test)} in {length} statements" for test, length in enumerate(lengths))
            for entry in arms.values()
            if entry["kind"] == kind
        ]
        sentences.append(f"The reach of {kind} with " + "; ".join(reaches) + ".")
    against: dict[str, list[str]] = {"at": [], "below": [], "beyond": []}
    for entry in arms.values():
        if entry["kind"] == "softmax":
            far, bound = reach(by_group(entry, 0)), 2 ** entry["layers"] - 1
            where = "at" if far == min(bound, max(by_group(entry, 0))) else "below" if far < bound else "beyond"
            against[where].append(str(entry["layers"]))
    if against["at"]:
        sentences.append(f"Softmax ends where expected with L = {', '.join(against['at'])}.")
    if against["below"]:
        sentences.append(
            f"With L = {', '.join(against['below'])} softmax stays below 2^L − 1: what its layers would allow, it did "
            "not learn within this training."
        )
    if against["beyond"]:
        sentences.append(f"With L = {', '.join(against['beyond'])} softmax goes beyond 2^L − 1.")
    for entry in arms.values():
        if entry["kind"] == "KA" and entry["layers"] <= 2:
            depths = by_group(entry, 0)
            solved = "every depth is solved" if reach(depths) == max(depths) else "not every depth is solved"
            said = f"{entry['label']}: {mean(percents(entry, 0)):.1f} % right at length {lengths[0]}, {solved}"
            sentences.append(said + f"; {mean(percents(entry, -1)):.1f} % at length {lengths[-1]}.")
    return "**Came:** " + " ".join(sentences)


def _draw(arms: dict[str, Json], test: int, guess: float, ax: Any) -> None:
    kinds = list(dict.fromkeys(entry["kind"] for entry in arms.values()))
    counts = sorted({entry["layers"] for entry in arms.values()})
    for entry in arms.values():
        depths = by_group(entry, test)
        color, line = f"C{kinds.index(entry['kind'])}", LINES[counts.index(entry["layers"]) % len(LINES)]
        right = [100 * share for share in depths.values()]
        ax.plot(list(depths), right, label=entry["label"], color=color, linestyle=line)
    ax.axhline(guess, color="gray", linewidth=1)
    ax.set_ylim(0, 103)
    ax.set_xlabel("depth (references to follow)")
    ax.set_ylabel("right answers (%)")
    ax.legend(fontsize=7)


DEREFERENCE = DereferenceStudy()
