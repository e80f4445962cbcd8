"""Parts of figures that several reports share: an arm looks the same in all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any
from zlib import crc32

from ka_attention.harness.figures.statistics import deviation, mean
from ka_attention.harness.models.arms import Arm

COLOURS = {  # of kinds of arms
    "softmax": "C0",
    "KA": "C1",
    "KA, gate per head": "C2",
    "KA, gate per token": "C3",
    "KA, signed gate per token": "C4",
    "softmax, every other layer KA": "C5",
    "softmax, every other layer with a window": "C6",
    "GLA": "C3",
    "DeltaNet": "C4",
    "Mamba-2": "C7",
}
MARKERS = {None: "o", 4: "P", 8: "s", 16: "^", 32: "D", 64: "v", 256: "X"}  # of windows


def look(arm: Arm) -> dict[str, Any]:
    """The colour of an arm's kind, the marker of its window, and a dashed line where it has one."""
    colour = COLOURS.get(arm.kind) or f"C{3 + crc32(arm.kind.encode()) % 5}"  # not those of softmax and KA
    style = "-" if arm.window is None else "--"
    return {"color": colour, "marker": MARKERS.get(arm.window, "*"), "linestyle": style}


def line(ax: Any, x: Iterable[float], points: Sequence[Sequence[float]], **style: Any) -> None:
    """A line through the means of ``points``, one number per seed each, with their deviation where there are seeds."""
    spread = [deviation(numbers) for numbers in points]
    error = {"yerr": spread, "capsize": 2} if any(spread) else {}
    ax.errorbar(list(x), [mean(numbers) for numbers in points], **error, **style)


def powers_of_two(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with ticks at ``values``, written out: 64, 128, 256."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log", base=2)
    axis.set_ticks(list(values), [f"{value:,g}" for value in values])
    axis.set_ticks([], minor=True)


def powers_between(low: float, high: float, most: int = 6) -> list[float]:
    """At most so many powers of two from ``low`` or below to ``high`` or above."""
    exponents = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    return [2.0**power for power in exponents[:: -(-len(exponents) // most)]]


def digits(number: float) -> str:
    """Three digits, as far as they matter: 60.3, 108, 11,200."""
    if number < 100:
        return f"{number:.3g}" if number < 1 else f"{number:.1f}"
    return f"{round(number, 2 - math.floor(math.log10(number))):,.0f}"


def name_lines(ax: Any, most: int = 6) -> None:
    """Write each line's name at its right end, in its colour; above the axes where there are too many for that."""
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > most:
        ax.figure.legend(loc="outside upper center", ncols=2, fontsize=7)
        return
    ax.autoscale_view()
    lines = [handle if hasattr(handle, "get_xdata") else handle[0] for handle in handles]  # of error bars, the line
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in lines]
    points = [ax.transData.transform(end) * 72 / ax.figure.dpi for end in ends]
    placed: list[tuple[float, float]] = []
    for (x, y), end, label, drawn in sorted(zip(points, ends, labels, lines, strict=True), key=lambda each: each[0][1]):
        near = [height for beside, height in placed if abs(beside - x) < 72]
        height = max([y, *(height + 11 for height in near)])  # names that end close by stand above one another
        placed.append((x, height))
        style = {"color": drawn.get_color(), "fontsize": 8, "va": "center"}
        ax.annotate(label, end, (6, height - y), textcoords="offset points", **style)
