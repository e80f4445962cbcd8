"""The report of the hops study: quality and cost against hops, and the walks of every layer and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

from ka_attention.harness.figures.drawing import name_lines, powers_of_two
from ka_attention.harness.figures.statistics import changes, mean, mean_sd, percent
from ka_attention.harness.text.data import Description
from ka_attention.harness.training.trainer import Training
from ka_attention.report.document import Figure, Section, Table
from ka_attention.studies.hops.recipes import HopsRecipe

ENOUGH = 1.0  # percent by which a perplexity may differ from the exact walk's and count as equal

Row = tuple[float, ...]


@dataclass(frozen=True)
class Cut:
    """Walks of at most ``hops`` hops: ``error`` is ‖A_n − A‖ / ‖A‖ of each layer, given the exact model's inputs."""

    hops: int
    ppl: float
    seconds: float
    error: Row


@dataclass(frozen=True)
class Cuts:
    """``ppl`` and ``seconds`` of a pass of the exact model, and of each cut.

    ``expected_hops`` and ``absorbed``, ``[L][H]``: the steps of a walk and the share that ends at token 0, means over
    the tokens after the first.
    """

    ppl: float
    seconds: float
    cut: tuple[Cut, ...]
    expected_hops: tuple[Row, ...]
    absorbed: tuple[Row, ...]


@dataclass(frozen=True)
class Model:
    """One KA model; ``training`` is None of a checkpoint."""

    hops: Cuts
    training: Training | None = None


@dataclass(frozen=True)
class Results:
    """A model a seed."""

    data: Description
    models: tuple[Model, ...]


@dataclass(frozen=True)
class Point:
    """What came of one number of hops: PPL and its change in percent by seed, and means of time and error."""

    hops: int
    ppl: list[float]
    change: list[float]
    time: float
    error: list[float]


def sections(recipe: HopsRecipe, results: Results) -> list[Section]:
    """Quality and cost against hops, and the walks of every layer and head."""
    found = [model.hops for model in results.models]
    return [_cut(recipe, found), _walks(found)]


def _points(recipe: HopsRecipe, found: Sequence[Cuts]) -> list[Point]:
    points = []
    for i, n in enumerate(recipe.hops):
        cuts = [each.cut[i] for each in found]
        ppl = [cut.ppl for cut in cuts]
        time = mean([cut.seconds / each.seconds for cut, each in zip(cuts, found, strict=True)])
        errors = [mean(layer) for layer in zip(*(cut.error for cut in cuts), strict=True)]
        points.append(Point(n, ppl, changes(ppl, [each.ppl for each in found]), time, errors))
    return points


def _cut(recipe: HopsRecipe, found: Sequence[Cuts]) -> Section:
    points, exact = _points(recipe, found), [each.ppl for each in found]
    rows = [
        [
            f"{point.hops}" + (" (softmax attention)" if point.hops == 1 else ""),
            mean_sd(point.ppl),
            percent(point.change),
            f"{min(point.error):.2g} to {max(point.error):.2g}",
            f"{point.time:.2f}",
        ]
        for point in points
    ]
    rows.append(["exact", mean_sd(exact), "–", "0", "1"])
    columns = ["hops", "validation PPL", "against exact", "output error by layer", "time, × exact"]
    table = Table("The walk cut after n hops in every layer; time is that of a pass of the whole model", columns, rows)

    def draw_ppl(ax: Any) -> None:
        ax.plot(recipe.hops, [mean(point.ppl) for point in points], label="cut after n hops")
        ax.axhline(mean(exact), color="C1", linestyle="--", label="exact")
        ax.set_ylabel("validation PPL")

    def draw_error(ax: Any) -> None:
        for layer in range(len(points[0].error)):
            ax.plot(recipe.hops, [max(point.error[layer], 1e-8) for point in points], label=f"layer {layer}")
        ax.set_ylabel("relative error of the output")
        ax.set_yscale("log")

    def against_hops(draw: Callable[[Any], None]) -> Callable[[Any], None]:
        def both(ax: Any) -> None:
            draw(ax)
            powers_of_two(ax.xaxis, recipe.hops)
            ax.set_xlabel("hops n")
            name_lines(ax)

        return both

    figures = [
        Figure(name, caption + " (mean over seeds)", against_hops(draw))
        for name, caption, draw in (
            ("ppl_by_hops", "Validation PPL when the walk is cut after n hops, lower is better", draw_ppl),
            ("error_by_hops", "Error of a layer's output when its walk is cut, its inputs being exact", draw_error),
        )
    ]
    expected = (
        "**Expected:** cut after n hops, KA-attention needs n attention calls and no recurrence. One hop is softmax "
        "attention on weights that were trained for KA, and should be clearly worse; from about the expected number of "
        "hops on the cut model should equal the exact one."
    )
    return Section("Cutting the walk", [expected, _came(points, found)], [table], figures)


def _came(points: list[Point], found: Sequence[Cuts]) -> str:
    first = points[0]
    text = f"**Came:** with {_hops(first)} the PPL is {percent(first.change)} against the exact walk. "
    near = list(takewhile(lambda point: max(map(abs, point.change)) <= ENOUGH, reversed(points)))
    expected = [hops for each in found for layer in each.expected_hops for hops in layer]
    walks = (
        f"a walk has {mean(expected):.1f} hops on average over all heads, {max(expected):.1f} in the head with the "
        "longest"
    )
    if not near:
        return text + f"No cut comes within {ENOUGH:g} % of the exact PPL; {walks}."
    least = near[-1]
    cost = "cutting gains nothing here"
    if not 0.95 <= least.time <= 1.05:
        cost = "cutting pays" if least.time < 1 else "cutting does not pay here"
    return (
        text + f"From {_hops(least)} on it stays within {ENOUGH:g} % of it; {walks}. A pass with {least.hops} then "
        f"takes {least.time:.2f} × the time of the exact one: {cost}."
    )


def _hops(point: Point) -> str:
    return f"{point.hops} hop{'s' if point.hops > 1 else ''}"


def _walks(found: Sequence[Cuts]) -> Section:
    hops, absorbed = (_mean([getattr(each, name) for each in found]) for name in ("expected_hops", "absorbed"))
    heads = [(value, layer, head) for layer, row in enumerate(absorbed) for head, value in enumerate(row)]
    sinks = sum(value > 0.5 for value, *_ in heads)
    value, layer, head = max(heads)
    words = (
        "Means over the tokens after the first. A walk steps from a token to one it attends to, and ends where a token "
        "attends to itself, at token 0 at the latest. A head whose walks end at token 0 has collapsed to the value of "
        f"that token: for every query it says the same. Here {sinks} of {len(heads)} heads end more than half of their "
        f"walks there; layer {layer}, head {head} the most, {100 * value:.0f} %."
    )
    percents = [[100 * value for value in row] for row in absorbed]
    figures = [
        Figure(name, caption + ", by layer and head (mean over seeds)", partial(_heat, rows, text))
        for name, caption, rows, text in (
            ("expected_hops", "Expected hops of a walk", hops, "{:.1f}"),
            ("absorbed_at_0", "Percent of the walks that end at token 0", percents, "{:.0f}"),
        )
    ]
    return Section("How far heads walk", [words], (), figures)


def _mean(matrices: Sequence[Sequence[Row]]) -> list[list[float]]:
    """The mean of ``[L][H]`` matrices, number by number."""
    return [[mean(numbers) for numbers in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def _heat(rows: list[list[float]], text: str, ax: Any) -> None:
    """Layers × heads as tinted cells with their numbers, readable on light and dark paper."""
    largest = max(max(map(max, rows)), 1e-9)
    for layer, row in enumerate(rows):
        for head, value in enumerate(row):
            ax.fill_between(
                [head - 0.5, head + 0.5], layer - 0.5, layer + 0.5, color="C0", alpha=0.7 * value / largest, linewidth=0
            )
            ax.text(head, layer, text.format(value), ha="center", va="center", fontsize=min(9, 72 / len(row)))
    ax.set_xticks(range(len(rows[0])))
    ax.set_yticks(range(len(rows)))
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
