"""The report of the position study: perplexity by position, KA against softmax, at each length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ka_attention.harness.figures.drawing import name_lines
from ka_attention.harness.figures.statistics import changes, mean_sd, percent, seeds_of, verdict
from ka_attention.harness.text.data import Description
from ka_attention.harness.training.lengths import AtLength, draw_octaves, octaves
from ka_attention.report.document import Figure, Section, Table
from ka_attention.studies.position.recipes import PositionRecipe


@dataclass(frozen=True)
class Results:
    """Every arm at every length, on one text."""

    data: Description
    lengths: tuple[AtLength, ...]


def sections(recipe: PositionRecipe, results: Results) -> list[Section]:
    """What was expected and what came, then a table and a figure for each length."""
    *shorter, longest = results.lengths
    return [_summary(recipe, results), *(_at(run, [_figure(run)]) for run in shorter), _at(longest, [])]


def _summary(recipe: PositionRecipe, results: Results) -> Section:
    tokens = recipe.train_samples * recipe.sequence_length
    paragraphs = [
        f"Every arm is trained from scratch at each length, from the same weights, on the same {tokens:,} tokens an "
        "epoch with as many tokens per step. The training and validation texts are the same, cut at that length.",
        "**Expected:** no accumulation. An output of KA-attention is an average of values, however many steps lead to "
        "it, so an error is averaged and not amplified; the distance to softmax should not grow along the sequence.",
        "**Came:** " + " ".join(sentence for run in results.lengths for sentence in _came(run)),
    ]
    labels = [arm.label for arm in results.lengths[0].arms.values()]
    rows = [
        [f"{run.length:,}", *(mean_sd(arm.each(lambda read: read.ppl)) for arm in run.arms.values())]
        for run in results.lengths
    ]
    table = Table("Validation PPL over all positions", ["tokens", *labels], rows)
    return Section("By length", paragraphs, [table], [_figure(results.lengths[-1])])


def _came(run: AtLength) -> list[str]:
    """For each arm after the first: its distance to the first in the first and in the last octave, and the growth."""
    base, *others = run.arms.values()
    names = list(octaves(base))
    first, last = names[0], names[-1]
    sentences = []
    for arm in others:
        start, end = (changes(octaves(arm)[name], octaves(base)[name]) for name in (first, last))
        growth = [b - a for a, b in zip(start, end, strict=True)]
        sentences.append(
            f"At {run.length:,} tokens **{arm.label}** stands at {percent(start)} PPL against {base.label} in the "
            f"positions {first} and at {percent(end)} in {last} (the distance: {verdict(growth)} at the end)."
        )
    return sentences


def _at(run: AtLength, figures: list[Figure]) -> Section:
    arms = list(run.arms.values())
    base, *others = arms
    rows = [
        [name, *(mean_sd(octaves(arm)[name]) for arm in arms)]
        + [percent(changes(octaves(arm)[name], ppl)) for arm in others]
        for name, ppl in octaves(base).items()
    ]
    columns = [
        "positions",
        *(arm.label for arm in arms),
        *(f"{arm.label} against {base.label}" for arm in others),
    ]

    table = Table(f"Validation PPL by position at {run.length:,} tokens", columns, rows)
    return Section(f"{run.length:,} tokens", (), [table], figures)


def _figure(run: AtLength) -> Figure:
    arms = list(run.arms.values())

    def draw(ax: Any) -> None:
        draw_octaves(arms, ax)
        name_lines(ax)

    caption = f"Validation PPL by position at {run.length:,} tokens, lower is better ({seeds_of(arms)})"
    return Figure(f"position_{run.length}", caption, draw)
