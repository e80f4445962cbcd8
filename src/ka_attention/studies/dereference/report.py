"""The report of the dereference study: how deep each number of layers reaches, at the training length and beyond."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from ka_attention.harness.figures.drawing import name_lines
from ka_attention.harness.figures.statistics import mean, mean_sd
from ka_attention.harness.tasks.learning import SOLVED, Learned, draw_groups, reach
from ka_attention.report.document import Figure, Section, Table
from ka_attention.studies.dereference.recipes import DereferenceRecipe


@dataclass(frozen=True)
class Results:
    """By arm and number of layers."""

    arms: dict[str, Learned]


def sections(recipe: DereferenceRecipe, results: Results) -> list[Section]:
    """What was expected and what came, a table, and a figure for each test length."""
    arms, lengths = list(results.arms.values()), recipe.test_lengths
    setting = (
        "Sequences of assignments, `a = 7`, `b = a`, …: at each the model names the value. Trained with "
        f"{recipe.length} statements, {recipe.chains} chains each, so a guess is right 1 time in {recipe.chains}. A "
        "statement is one token, the sum of its symbols' embeddings, so that no layer is spent on finding out what "
        "stands beside what. Every model of a seed sees the same sequences, each once."
    )
    expected = (
        "**Expected:** a KA layer's output at a definition already is the resolved value, so one layer follows a "
        "chain of any length. A softmax layer can at best double the depth resolved, so L layers should end "
        "near depth 2^L − 1."
    )
    columns = ["arm", "parameters"]
    for length in lengths:
        columns += [f"right in {length} statements (%)", f"reach in {length} statements"]
    rows = []
    for entry in arms:
        rows.append([entry.label, f"{entry.seeds[0].parameters:,}"])
        for test in range(len(lengths)):
            rows[-1] += [mean_sd(entry.percents(test)), _reach(entry, test)]
    caption = (
        "Right answers, and reach: the depth up to which every depth is answered right at least "
        f"{100 * SOLVED:.0f} % of the time"
    )
    figures = []
    for test, length in enumerate(lengths):
        where = f"{length} statements" + (" (the training length)" if length == recipe.length else "")
        title = f"Right answers by depth in {where}; the grey line is a guess (all seeds together)"
        figures.append(Figure(f"dereference_{length}", title, partial(_draw, recipe, arms, test), (5.0, 4.2)))
    words = [setting, expected, _came(arms, lengths)]
    return [Section("Dereference", words, [Table(caption, columns, rows)], figures)]


def _reach(entry: Learned, test: int) -> str:
    depths = entry.by_group(test)
    far = reach(depths)
    return "none" if far < 0 else f"{far} (all)" if far == max(depths) else str(far)


def _came(arms: list[Learned], lengths: tuple[int, ...]) -> str:
    sentences = []
    for kind in dict.fromkeys(entry.arm.label for entry in arms):
        reaches = [
            f"{entry.layers} layer{'s' if entry.layers > 1 else ''}: "
            + ", ".join(f"{_reach(entry, test)} in {length} statements" for test, length in enumerate(lengths))
            for entry in arms
            if entry.arm.label == kind
        ]
        sentences.append(f"The reach of {kind} with " + "; ".join(reaches) + ".")
    against: dict[str, list[str]] = {"at": [], "below": [], "beyond": []}
    for entry in arms:
        if entry.arm.ka is None:
            far, bound = reach(entry.by_group(0)), 2**entry.layers - 1
            where = "at" if far == min(bound, max(entry.by_group(0))) else "below" if far < bound else "beyond"
            against[where].append(str(entry.layers))
    if against["at"]:
        sentences.append(f"Softmax ends where expected with L = {', '.join(against['at'])}.")
    if against["below"]:
        sentences.append(
            f"With L = {', '.join(against['below'])} softmax stays below 2^L − 1: what its layers would allow, it did "
            "not learn within this training."
        )
    if against["beyond"]:
        sentences.append(f"With L = {', '.join(against['beyond'])} softmax goes beyond 2^L − 1.")
    for entry in arms:
        if entry.arm.is_ka and entry.arm.ka and entry.arm.ka.gate == "fixed" and entry.layers <= 2:
            depths = entry.by_group(0)
            solved = "every depth is solved" if reach(depths) == max(depths) else "not every depth is solved"
            said = f"{entry.label}: {mean(entry.percents(0)):.1f} % right at length {lengths[0]}, {solved}"
            sentences.append(said + f"; {mean(entry.percents(-1)):.1f} % at length {lengths[-1]}.")
    return "**Came:** " + " ".join(sentences)


def _draw(recipe: DereferenceRecipe, arms: list[Learned], test: int, ax: Any) -> None:
    draw_groups(arms, test, ax)
    ax.axhline(100 / recipe.chains, color="gray", linewidth=1)
    ax.set_xlabel("depth (references to follow)")
    name_lines(ax)
