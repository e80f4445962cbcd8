"""Figures over seeds in words: mean ± standard deviation, and differences between arms paired seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ka_attention.harness.models.arms import ArmResults

# Student's t for a two-sided 95 % interval, by degrees of freedom from 1; the last one serves beyond.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def mean(numbers: Sequence[float]) -> float:
    """The arithmetic mean."""
    return statistics.fmean(numbers)


def deviation(numbers: Sequence[float]) -> float:
    """The sample standard deviation (n − 1); 0 for a single number."""
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def mean_sd(numbers: Sequence[float], digits: int = 1) -> str:
    """``442.2 ± 3.1 (n=3)``; one number: ``442.2 (one seed)``; none: ``–``."""
    if not numbers:
        return "–"
    if len(numbers) == 1:
        return f"{numbers[0]:,.{digits}f} (one seed)"
    return f"{mean(numbers):,.{digits}f} ± {deviation(numbers):,.{digits}f} (n={len(numbers)})"


def cell(numbers: Sequence[float], digits: int = 1) -> str:
    """``mean_sd`` for a table whose caption names the seeds: ``442.2 ± 3.1``, ``442.2`` for one number."""
    return mean_sd(numbers, digits).split(" (")[0]


def caution(arms: Sequence[ArmResults]) -> str:
    """One sentence on what the number of seeds allows to conclude."""
    if min(len(arm.seeds) for arm in arms) == 1:
        return "These figures come from **one seed**: with another one differences may vanish."
    return (
        "Figures are mean ± standard deviation over seeds. A difference, paired by seed, counts only if 0 lies outside "
        "its 95 % confidence interval."
    )


def seeds_of(arms: Sequence[ArmResults]) -> str:
    """For captions: ``one seed`` or ``mean ± sd over 3 seeds``."""
    counts = sorted({len(arm.seeds) for arm in arms})
    return "one seed" if counts == [1] else f"mean ± sd over {' or '.join(map(str, counts))} seeds"


def changes(numbers: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """The change of each number against the baseline of the same seed, in percent."""
    return [100 * (number / base - 1) for number, base in zip(numbers, baseline, strict=True)]


def percent(numbers: Sequence[float], digits: int = 1) -> str:
    """Percent changes with their sign: ``+1.6 % ± 0.4 (n=3)``, ``−0.3 % (one seed)``."""
    if not numbers:
        return "–"
    text = signed(mean(numbers), digits)
    return (
        f"{text} (one seed)" if len(numbers) == 1 else f"{text} ± {deviation(numbers):,.{digits}f} (n={len(numbers)})"
    )


def percent_cell(numbers: Sequence[float], digits: int = 1) -> str:
    """``percent`` for a table whose caption names the seeds."""
    return percent(numbers, digits).split(" (")[0]


def judged(numbers: Sequence[float]) -> str:
    """``percent_cell`` of paired changes, over several seeds with their ``verdict``."""
    return percent_cell(numbers) + (f" ({verdict(numbers)})" if len(numbers) > 1 else "")


def signed(number: float, digits: int = 1) -> str:
    """A percentage with its sign: ``+1.6 %``; nothing prints as −0.0."""
    return f"{round(number, digits) + 0.0:+,.{digits}f} %".replace("-", "−")


def interval(numbers: Sequence[float]) -> tuple[float, float | None]:
    """The mean and half of its 95 % confidence interval (Student's t), None for a single number."""
    if len(numbers) < 2:
        return mean(numbers), None
    quantile = _T95[min(len(numbers) - 1, len(_T95)) - 1]
    return mean(numbers), quantile * deviation(numbers) / math.sqrt(len(numbers))


def verdict(numbers: Sequence[float]) -> str:
    """What paired changes (0: no change) allow to say: higher, lower, or not different beyond the spread of the seeds.

    A difference is one if 0 lies outside the 95 % confidence interval of the mean (Student's t).
    """
    middle, half = interval(numbers)
    if half is None:
        return "undecided: one seed proves nothing"
    if abs(middle) <= half:
        return "not different beyond the spread of the seeds"
    return "higher" if middle > 0 else "lower"
