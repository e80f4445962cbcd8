"""What the report of the hybrid study draws over training and along the text: losses less those of the first arm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ka_attention.harness.figures.statistics import cell, mean
from ka_attention.report.document import Figure, Section, Table
from ka_attention.studies.hybrid.differences import Arms, first_arm, leading
from ka_attention.studies.hybrid.labels import Labels
from ka_attention.studies.hybrid.looks import LEGEND_ABOVE, axes, look
from ka_attention.studies.hybrid.results import HybridResults

SHOWN = 8  # curves that can be told apart


def on_the_way(results: HybridResults, arms: Arms, labels: Labels) -> Section:
    base = first_arm(results)
    counts = [row.tokens for row in results.arms[base][0].training.rows]

    def losses(name: str, i: int) -> list[float]:
        return [one.training.rows[i].loss for one in results.arms[name]]

    rows = [[labels(each), *(cell(losses(name, i), 4) for i in range(len(counts)))] for name, each in arms.items()]
    columns = ["arm", *(f"{tokens / 1e6:,.1f} M tokens" for tokens in counts)]
    table = Table("Validation loss on the way, mean ± sd; without ±: one seed", columns, rows)
    points = [partial(losses, i=i) for i in range(len(counts))]
    ticks = [f"{tokens / 1e6:,.1f}" for tokens in counts]
    figures = _curves(results, arms, labels, "way", "on the way", points, ticks, "tokens read (millions)")
    return Section("On the way", figures=figures, folded=[table])


def by_position(results: HybridResults, arms: Arms, labels: Labels) -> Section:
    octaves = results.arms[first_arm(results)][0].training.rows[-1].by_position
    names = [f"{octave.first}–{octave.last}" for octave in octaves]

    def losses(name: str, i: int) -> list[float]:
        return [one.training.rows[-1].by_position[i].loss for one in results.arms[name]]

    rows = [
        [labels(each), *(f"{mean(losses(name, i)):.4f}" for i in range(len(octaves)))] for name, each in arms.items()
    ]
    table = Table("Validation loss by predicting position (mean over seeds)", ["arm", *names], rows)
    points = [partial(losses, i=i) for i in range(len(octaves))]
    figures = _curves(results, arms, labels, "position", "by position", points, names, "position (tokens)")
    return Section("By position", figures=figures, folded=[table])


def _curves(
    results: HybridResults,
    arms: Arms,
    labels: Labels,
    name: str,
    what: str,
    points: Sequence[Callable[[str], list[float]]],
    ticks: Sequence[str],
    axis: str,
) -> list[Figure]:
    """The best arm of each kind that mixes tokens, less the first arm: at each point the mean over common seeds.

    Of many kinds those SHOWN with the lowest losses, in the order of ``arms``, and the first arm.
    """
    base = first_arm(results)
    kinds = [name for name in leading(results, arms) if arms[name].mixer != "none"]
    kinds.sort(key=list(arms).index)
    shown = [name for name in kinds if name in kinds[:SHOWN] or name == base]

    def draw(ax: Any) -> None:
        for each in shown:
            both = [zip(losses(each), losses(base), strict=False) for losses in points]
            ax.plot([mean([a - b for a, b in pairs]) for pairs in both], label=labels(arms[each]), **look(arms[each]))
        ax.set_xticks(range(len(ticks)), ticks, rotation=45, ha="right")
        axes(ax, axis, "difference (nats)")

    which = f", {SHOWN} of {len(kinds)} kinds" if len(kinds) > SHOWN else ""
    caption = (
        f"Validation loss {what}, less that of {labels(arms[base])}: the best arm of each kind that mixes tokens{which}"
    )
    return [Figure(f"hybrid_{name}", caption, draw, LEGEND_ABOVE)] if len(shown) > 1 else []
