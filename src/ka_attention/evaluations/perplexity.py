"""Validation perplexity by position: does an error accumulate along the sequence?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ka_attention.harness.figures.drawing import line, look, name_lines
from ka_attention.harness.figures.statistics import cell, mean, seeds_of, signed
from ka_attention.harness.models.arms import ArmResults
from ka_attention.harness.training.perplexity import BUCKET, Perplexity, evaluate
from ka_attention.harness.training.trained import BATCH, Trained
from ka_attention.report.document import Figure, Section, Table


def run(trained: Trained) -> Perplexity:
    """Perplexity on the whole validation text with the attention that the model was trained with."""
    return evaluate(trained.model, trained.text.validation, batch_size=BATCH)


def sections(arms: Sequence[ArmResults[Perplexity]]) -> list[Section]:
    """Validation perplexity by position for every arm."""
    names = [run.name for run in arms[0].seeds[0].by_position]
    paragraphs = [
        f"Perplexity (PPL) of the validation tokens by the position that predicts them, in groups of {BUCKET}. More "
        "context should help; an error that accumulates along the sequence would show as a curve that turns up, or "
        "that falls behind the others towards the end.",
    ]
    if len(names) > 1:
        paragraphs.append(_against_first_arm(arms))
    table = Table(
        f"Validation PPL by position ({seeds_of(arms)})",
        ["positions", *(arm.label for arm in arms)],
        [[name, *(cell(_at(arm, i)) for arm in arms)] for i, name in enumerate(names)]
        + [["all", *(cell(arm.each(lambda found: found.ppl)) for arm in arms)]],
    )

    def draw(ax: Any) -> None:
        for arm in arms:
            line(ax, range(len(names)), [_at(arm, i) for i in range(len(names))], label=arm.label, **look(arm.arm))
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
        ax.set_xlabel("position in the sequence (tokens)")
        ax.set_ylabel("validation PPL")
        name_lines(ax)

    figure = Figure("ppl_by_position", f"Validation PPL by position, lower is better ({seeds_of(arms)})", draw)
    return [Section("Perplexity by position", paragraphs, [table], [figure])]


def _at(arm: ArmResults[Perplexity], run: int) -> list[float]:
    """PPL in a run of positions, one a seed."""
    return arm.each(lambda found: found.by_position[run].ppl)


def _against_first_arm(arms: Sequence[ArmResults[Perplexity]]) -> str:
    """How each arm's distance to the first one moves from the first positions to the last."""
    base, *others = arms
    start, end = (mean(_at(base, i)) for i in (0, -1))
    sentences = [f"{base.label}: PPL {start:,.1f} at the start, {end:,.1f} at the end."]
    for arm in others:
        start, end = (100 * (mean(_at(arm, i)) / mean(_at(base, i)) - 1) for i in (0, -1))
        sentences.append(f"{arm.label} against {base.label}: {signed(start)} at the start, {signed(end)} at the end.")
    return " ".join(sentences)
