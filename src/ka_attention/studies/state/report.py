"""The report of the state study: one table a task, the share of right answers at the training length and beyond."""

from __future__ import annotations

from dataclasses import dataclass

from ka_attention.harness.figures.statistics import mean, mean_sd
from ka_attention.harness.tasks.learning import SOLVED, Learned
from ka_attention.report.document import Section, Table
from ka_attention.studies.state.recipes import TASKS, Slots, StateRecipe


@dataclass(frozen=True)
class Results:
    """By task, arm and number of layers."""

    arms: dict[str, Learned]


def sections(recipe: StateRecipe, results: Results) -> list[Section]:
    """What was expected and what came, and the tables."""
    lengths = recipe.test_lengths
    words = [
        "The state is a permutation, and every step multiplies it by another: of 2 things this is parity, of 5 it "
        "is as hard as any regular language (complete for NC¹). The model names the state after each token. **One "
        "token a step** is the usual form. **Spelled out**, a step has one token a slot, “slot k now holds what "
        "slot s held”, and the model names what the slot holds: a reference again, that goes one step back. Windows "
        "are two steps long.",
        f"Trained with {recipe.length} tokens, each sequence seen once; a table says what a guess gets.",
        "**Expected:** one token a step, weights that are not negative cannot flip a sign, so KA with gates in [0, "
        "1] fails at parity as softmax does, beyond what it counts by heart. A gate of −1 flips the sign of what "
        "is carried on, so signed gates could learn it. Spelled out, one KA layer suffices for every group, and a "
        "window of two steps is all it needs; softmax needs layers that grow with the length.",
        _came(recipe, results),
    ]
    tables = []
    for task in recipe.tasks:
        rows = []
        for entry in _of(results, task):
            accuracies = [mean_sd(entry.percents(test)) for test in range(len(lengths))]
            rows.append([entry.arm.label, str(entry.layers), f"{entry.seeds[0].parameters:,}", *accuracies])
        columns = ["arm", "layers", "parameters", *(f"right in {length} tokens (%)" for length in lengths)]
        guess = 100 / _answers(task)
        tables.append(Table(f"{TASKS[task][0].capitalize()} (a guess: {guess:.1f} %)", columns, rows))
    return [Section("State tracking", words, tables)]


def _of(results: Results, task: str) -> list[Learned]:
    return [entry for entry in results.arms.values() if entry.task == task]


def _answers(task: str) -> int:
    """From how many answers a guess picks."""
    made = TASKS[task][1]
    return made.degree if isinstance(made, Slots) else made.symbols


def _came(recipe: StateRecipe, results: Results) -> str:
    sentences = []
    for task in recipe.tasks:
        solved: dict[str, list[str]] = {"here": [], "beyond": []}
        for entry in _of(results, task):
            here, beyond = (mean(entry.percents(test)) >= 100 * SOLVED for test in (0, -1))
            if here:
                solved["beyond" if beyond else "here"].append(entry.label)
        said = []
        if solved["beyond"]:
            said.append(f"solved also at the longest test by {'; '.join(solved['beyond'])}")
        if solved["here"]:
            said.append(f"solved at the training length only by {'; '.join(solved['here'])}")
        sentences.append(f"{TASKS[task][0]} is {', and '.join(said) or 'solved by none'}.")
    return f"**Came** (solved: at least {100 * SOLVED:.0f} % right on average over the seeds): " + " ".join(sentences)
