"""Numbers over seeds in words."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ka_attention.harness.figures.statistics import (
    caution,
    cell,
    changes,
    deviation,
    judged,
    mean,
    mean_sd,
    percent,
    percent_cell,
    seeds_of,
    signed,
    verdict,
)
from ka_attention.harness.models.arms import ArmResults, arm

KA = ArmResults(arm("ka"), (2.0, 4.0))


def test_a_figure_of_each_seed():
    assert KA.each(lambda ppl: 10 * ppl) == [20.0, 40.0]


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6))
def test_mean_and_deviation_are_the_textbook_ones(numbers):
    assert mean(numbers) == pytest.approx(sum(numbers) / len(numbers), abs=1e-9)
    assert deviation(numbers) == pytest.approx(math.sqrt(statistics.variance(numbers)), abs=1e-9)


def test_wording():
    assert mean_sd([439.1, 442.2, 445.3]) == "442.2 ± 3.1 (n=3)"
    assert mean_sd([1264.9], 0) == "1,265 (one seed)"
    assert mean_sd([]) == "–"
    assert percent([1.2, 1.6, 2.0]) == "+1.6 % ± 0.4 (n=3)"
    assert percent([-176.6]) == "−176.6 % (one seed)"
    assert signed(-0.04) == "+0.0 %"


def test_tables_and_captions_say_the_number_of_seeds_once():
    assert cell([439.1, 442.2, 445.3]) == "442.2 ± 3.1"
    assert percent_cell([-176.6]) == "−176.6 %"
    assert judged([-176.6]) == "−176.6 %"
    assert judged([5.0, 5.1, 4.9]) == "+5.0 % ± 0.1 (higher)"
    one = ArmResults(arm("softmax"), (1.0,))
    assert seeds_of([KA]) == "mean ± sd over 2 seeds"
    assert seeds_of([one]) == "one seed"
    assert "**one seed**" in caution([KA, one])
    assert "one seed" not in caution([KA])


def test_changes_are_paired_by_seed():
    assert changes([110.0, 90.0], [100.0, 100.0]) == pytest.approx([10.0, -10.0])
    with pytest.raises(ValueError, match="zip"):
        changes([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([5.0], "undecided"),
        ([5.0, 5.1, 4.9], "higher"),
        ([-5.0, -5.1, -4.9], "lower"),
        ([-3.0, 4.0, 1.0], "not different"),
        ([5.0, 5.5], "higher"),
        ([5.0, 7.0], "not different"),  # two seeds: the interval is 6 ± 12.71 · 1
        ([0.0, 0.0], "not different"),
        ([1.5, 2.5, 3.5], "higher"),  # three seeds: the interval is 2.5 ± 4.30 / √3 = 2.5 ± 2.48
        ([-1.5, -2.5, -3.5], "lower"),
        ([1.45, 2.45, 3.45], "not different"),
    ],
)
def test_verdict_follows_the_spread(numbers, words):
    assert verdict(numbers).startswith(words)


def t_quantile(freedom):
    """The t with P(|T| ≤ t) = 0.95, from the density by the midpoint rule."""
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    step, t, inside = 1e-3, 0.0, 0.0
    while inside < 0.95:
        inside += 2 * step * scale * (1 + (t + step / 2) ** 2 / freedom) ** (-(freedom + 1) / 2)
        t += step
    return t


@pytest.mark.parametrize("count", range(2, 11))
def test_verdict_turns_at_the_edge_of_students_interval(count):
    around = [(-1) ** i + (i == count - 1 and count % 2) * -1.0 for i in range(count)]
    assert sum(around) == 0
    half = t_quantile(count - 1) * math.sqrt(sum(x * x for x in around) / (count - 1) / count)
    for sign, words in ((1, "higher"), (-1, "lower")):
        assert verdict([sign * 1.004 * half + x for x in around]) == words
        assert verdict([sign * 0.996 * half + x for x in around]).startswith("not different")


def test_more_seeds_than_the_table_has_are_judged_by_its_last_entry():
    around = [1.0, -1.0] * 50
    assert verdict([x + 2.27 / math.sqrt(99) for x in around]) == "higher"
    assert verdict([x + 2.25 / math.sqrt(99) for x in around]).startswith("not different")
