"""Figures: an arm looks the same everywhere, names stand apart at the ends of lines, numbers have few digits."""

from itertools import pairwise

import pytest
from matplotlib.figure import Figure

from ka_attention.harness.figures.drawing import digits, line, look, name_lines, powers_between, powers_of_two
from ka_attention.harness.models.arms import arm


def test_kinds_have_colours_and_windows_markers():
    softmax, ka, narrow, wide = (look(arm(name)) for name in ("softmax", "ka", "ka-w8", "ka-w16"))
    assert len({softmax["color"], ka["color"]}) == 2
    assert ka["color"] == narrow["color"] == wide["color"]
    assert len({ka["marker"], narrow["marker"], wide["marker"]}) == 3
    assert (ka["linestyle"], narrow["linestyle"]) == ("-", "--")


@pytest.mark.parametrize(("seeds", "bars"), [(1, False), (3, True)])
def test_error_bars_are_there_where_there_are_seeds(seeds, bars):
    ax = Figure().subplots()
    line(ax, [1, 2], [[1.0, 1.1, 1.2][:seeds], [2.0, 2.1, 2.2][:seeds]], label="KA")
    assert bool(ax.containers[0][2]) is bars


@pytest.mark.parametrize(
    ("number", "text"), [(0.0521, "0.0521"), (60.27, "60.3"), (9.96, "10.0"), (108.4, "108"), (11195.4, "11,200")]
)
def test_digits(number, text):
    assert digits(number) == text


def test_ticks_are_written_out():
    ax = Figure().subplots()
    ax.plot([64, 256], [1, 2])
    powers_of_two(ax.xaxis, powers_between(64, 256))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["64", "128", "256"]
    assert powers_between(22.5, 192) == [16.0, 32.0, 64.0, 128.0, 256.0]
    assert len(powers_between(1, 2**20)) <= 6


def test_names_stand_at_the_ends_and_apart():
    figure = Figure()
    ax = figure.subplots()
    for height in (1.0, 1.001, 5.0):
        ax.plot([0, 1], [0, height], label=f"to {height}")
    line(ax, [0, 1], [[0.0], [1.002]], label="to 1.002")
    name_lines(ax)
    assert {text.get_text() for text in ax.texts} == {"to 1.0", "to 1.001", "to 1.002", "to 5.0"}
    places = sorted(ax.transData.transform(text.xy)[1] * 72 / figure.dpi + text.xyann[1] for text in ax.texts)
    assert min(b - a for a, b in pairwise(places)) >= 10.9


def test_many_names_stand_above():
    figure = Figure()
    ax = figure.subplots()
    for number in range(9):
        ax.plot([0, 1], [0, number], label=str(number))
    name_lines(ax)
    assert not ax.texts
    assert len(figure.legends) == 1
