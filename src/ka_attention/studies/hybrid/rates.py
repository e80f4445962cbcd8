"""What the report of the hybrid study says of learning rates: what each arm came to at each, and which it was given."""

from __future__ import annotations

from typing import Any

from ka_attention.harness.figures.statistics import cell
from ka_attention.report.document import Figure, Section, Table
from ka_attention.studies.hybrid.differences import Arms
from ka_attention.studies.hybrid.labels import Labels
from ka_attention.studies.hybrid.looks import LEGEND_ABOVE, axes, look
from ka_attention.studies.hybrid.results import HybridResults

CURVE = 3  # rates that make a curve


def peak(results: HybridResults, name: str) -> float:
    """The learning rate of an arm, at its highest."""
    return results.arms[name][0].training.learning_rate


def sentence(results: HybridResults) -> str:
    """Which rates there were."""
    peaks = {peak(results, name) for name in results.arms}
    if all(len(losses) == 1 for losses in results.rates.values()):
        return f"Learning rate at its peak: {', '.join(f'{rate:g}' for rate in sorted(peaks))} for all arms."
    alone = sum(len(losses) == 1 for losses in results.rates.values())
    return (
        "Seed 0 was trained with several learning rates, and each arm has the one with which its loss was lowest then"
        + (f" ({alone} {'arm was' if alone == 1 else 'arms were'} trained with one alone)." if alone else ".")
    )


def section(results: HybridResults, arms: Arms, labels: Labels) -> Section | None:
    """The arms that were trained with several rates."""
    several = {name: losses for name in arms if len(losses := results.rates[name]) > 1}
    if not several:
        return None
    rates = sorted({rate for losses in several.values() for rate in losses})

    def row(name: str) -> list[str]:
        losses = [cell(several[name][rate], 3) if rate in several[name] else "–" for rate in rates]
        return [labels(arms[name]), f"{peak(results, name):g}", *losses]

    caption = "The rate that an arm has, and the validation loss by rate (mean ± sd; without ±: seed 0)"
    table = Table(caption, ["arm", "its rate", *(f"{rate:g}" for rate in rates)], list(map(row, several)))
    curves = [name for name, losses in several.items() if len(losses) >= CURVE]

    def draw(ax: Any) -> None:
        for name in curves:
            points = sorted((rate, losses[0]) for rate, losses in several[name].items())
            ax.plot(*zip(*points, strict=True), label=labels(arms[name]), **look(arms[name]))
        ax.set_xscale("log", base=2)
        ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes(ax, "peak learning rate")

    figures = [Figure("hybrid_rates", "Validation loss by peak learning rate, seed 0", draw, LEGEND_ABOVE)]
    return Section("Learning rates", (), [table], figures if curves else ())
