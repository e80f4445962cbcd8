"""Numbers over seeds in words."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ka_attention.studies.statistics import (
    arms_with,
    caution,
    cell,
    changes,
    deviation,
    mean,
    mean_sd,
    percent,
    percent_cell,
    seeds_of,
    signed,
    values,
    verdict,
)

ARM = {"label": "KA", "seeds": [{"perplexity": {"ppl": 2.0}}, {"perplexity": {"ppl": 4.0}}]}


def test_values_of_all_seeds():
    assert values(ARM, "perplexity", "ppl") == [2.0, 4.0]
    assert values(ARM, "caches", "ka", "ppl") == []


def test_only_arms_with_the_evaluation_in_every_seed():
    half = {"label": "half", "seeds": [{"perplexity": {}}, {}]}
    results = {"arms": {"ka": ARM, "half": half, "none": {"label": "none", "seeds": []}}}
    assert [label for label, _ in arms_with(results, "perplexity")] == ["KA"]


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
    one = {"label": "KA", "seeds": [{}]}
    assert seeds_of([("KA", ARM)]) == "mean ± sd over 2 seeds"
    assert seeds_of([("KA", one)]) == "one seed"
    assert "**one seed**" in caution([("KA", ARM), ("other", one)])
    assert "one seed" not in caution([("KA", ARM)])


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
    ],
)
def test_verdict_follows_the_spread(numbers, words):
    assert verdict(numbers).startswith(words)
