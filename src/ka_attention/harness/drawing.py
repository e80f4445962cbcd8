"""Parts of figures that several reports share: an arm looks the same in all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from zlib import crc32

from ka_attention.harness.arms import Arm
from ka_attention.harness.statistics import deviation, mean

COLOURS = {  # of kinds of arms
    "softmax": "C0",
    "KA": "C1",
    "KA, gate per head": "C2",
    "KA, gate per token": "C3",
    "KA, signed gate per token": "C4",
    "softmax, every other layer KA": "C5",
    "softmax, every other layer with a window": "C6",
}
MARKERS = {None: "o", 4: "P", 8: "s", 16: "^", 32: "D", 64: "v", 256: "X"}  # of windows


def look(arm: Arm) -> dict[str, Any]:
    """The colour of an arm's kind, the marker of its window, and a dashed line where it has one."""
    colour = COLOURS.get(arm.kind) or f"C{crc32(arm.kind.encode()) % 8}"
    style = "-" if arm.window is None else "--"
    return {"color": colour, "marker": MARKERS.get(arm.window, "*"), "linestyle": style}


def line(ax: Any, x: Iterable[float], points: Sequence[Sequence[float]], **style: Any) -> None:
    """A line through the means of ``points``, one number a seed each, with their deviation where there are seeds."""
    spread = [deviation(numbers) for numbers in points]
    error = {"yerr": spread, "capsize": 2} if any(spread) else {}
    ax.errorbar(list(x), [mean(numbers) for numbers in points], **error, **style)


def powers_of_two(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with ticks at ``values``, written out: 64, 128, 256."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log", base=2)
    axis.set_ticks(list(values), [f"{value:,g}" for value in values])
    axis.set_ticks([], minor=True)
