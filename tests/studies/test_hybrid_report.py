"""What the hybrid study's report compares, and how it calls and draws arms."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from ka_attention.harness.figures import drawing
from ka_attention.studies.hybrid import curves, rates, report
from ka_attention.studies.hybrid.differences import beside_softmax, difference, leading, paired, paired_alike
from ka_attention.studies.hybrid.differences import section as differences
from ka_attention.studies.hybrid.labels import Labels
from ka_attention.studies.hybrid.looks import look, marks
from ka_attention.studies.hybrid.models import NAMES, arm


def _losses(arms):
    """Results of arms with these losses, a number a seed."""
    runs = {name: tuple(SimpleNamespace(loss=loss) for loss in losses) for name, losses in arms.items()}
    tried = {name: {0.002: losses} for name, losses in arms.items()}
    return SimpleNamespace(arms=runs, rates=tried), {name: arm(name) for name in arms}


def test_ka_is_set_beside_softmax_with_all_else_alike():
    names = ["3to1-ka-head-w8-from0", "3to1-ka-head-w4-qkv", "all-ka-w2-first", "3to1-ka-head-w4", "3to1-ka-w4-gated"]
    names += ["3to1-softmax-w8", "3to1-softmax-w4", "3to1-softmax-w4-qkv", "3to1-gdn", "full"]
    assert beside_softmax({name: arm(name) for name in names}) == [
        ("3to1-ka-head-w4-qkv", "3to1-softmax-w4-qkv"),
        ("3to1-ka-head-w4", "3to1-softmax-w4"),
        ("3to1-ka-head-w8-from0", "3to1-softmax-w8"),
    ]


def test_the_best_of_a_kind_has_the_most_seeds():
    results, arms = _losses(
        {"full": [9, 9], "3to1-softmax-w4": [3, 3], "3to1-softmax-w8": [2, 3], "3to1-softmax-w2": [1], "full-qkv": [4]}
    )
    assert leading(results, arms) == ["full", "3to1-softmax-w8", "full-qkv"]
    results, arms = _losses({"3to1-softmax-w4": [3, 3, 3, 3], "3to1-softmax-w8": [2, 2, 3], "3to1-softmax-w2": [1, 1]})
    assert leading(results, arms) == ["3to1-softmax-w8"]  # three are enough
    results, arms = _losses({"3to1-softmax-w4": [3, 3, 3, 9, 9], "3to1-softmax-w8": [4, 4, 4]})
    assert leading(results, arms) == ["3to1-softmax-w8"]  # as a table of means has it


def test_the_verdict_names_the_best_of_those_with_enough_seeds():
    results, arms = _losses({"full": [4, 4, 4.5], "3to1-ka-w4": [3, 3, 3], "3to1-softmax-w4": [3.5] * 5, "canon": [2]})
    results.decoding = {
        name: SimpleNamespace(computed_bytes=size) for name, size in zip(arms, (4, 1, 1, 4), strict=True)
    }
    said = report._verdict(results, arms, Labels(arms.values()))
    assert "**3:1 KA, window 4** has the lowest loss of the arms with 3 seeds or more, 3.000 nats (3 seeds)" in said
    assert "at 25 % of its state" in said
    assert "With all else alike KA is below softmax in 1 of 1 pairs with 3 seeds." in said


def test_pairs_with_enough_seeds_count_alike():
    losses = {"3to1-ka-w4": [3] * 3, "3to1-softmax-w4": [3.5] * 3, "3to1-ka-w8": [4] * 5, "3to1-softmax-w8": [3.5] * 5}
    results, arms = _losses(losses | {"3to1-ka-w2": [1], "3to1-softmax-w2": [2]})
    said = report._beside(results, arms)
    assert said == " With all else alike KA is below softmax in 1 of 2 pairs with 3 seeds or more, above softmax in 1."


def test_differences_are_paired_and_marked():
    results, _ = _losses({"full": [3.0, 4.0, 5.0], "canon": [2.5, 3.5, 4.5], "3to1-none": [2.75]})
    assert difference(paired(results, "canon", "full")) == "−0.5000 ± 0.0000 *"
    assert difference(paired(results, "3to1-none", "full")) == "−0.2500"
    assert difference([-0.1, 0.1, 0.0], 2) == "+0.00 ± 0.25"


def test_arms_alike_but_for_a_part_are_compared_at_rates_that_both_had():
    tried = {"tuned": {1.0: [3.0, 3.0], 2.0: [2.0, 2.5]}, "once": {1.0: [2.75]}, "elsewhere": {4.0: [1.0]}}
    tried["also tuned"] = {1.0: [1.5, 1.0, 1.0], 2.0: [1.75], 4.0: [0.5]}
    results = SimpleNamespace(rates=tried)
    assert paired_alike(results, "tuned", "once") == [0.25]  # not with the rate that was tried with one of them alone
    assert paired_alike(results, "tuned", "also tuned") == [0.5, 1.5]  # each with the best of the two
    assert paired_alike(results, "once", "elsewhere") == []


def test_rates_are_said_where_there_are_several():
    results, arms = _losses({"full": [3.0, 4.0], "canon": [2.5]})
    for name, rate in (("full", 0.004), ("canon", 0.002)):
        for one in results.arms[name]:
            one.training = SimpleNamespace(learning_rate=rate)
    results.rates["full"] = {0.002: [3.5], 0.004: [3.0, 4.0]}
    assert rates.sentence(results).endswith("its loss was lowest then (1 arm was trained with one alone).")
    section = rates.section(results, arms, Labels(arms.values()))
    assert section.tables[0].rows == [["full softmax", "0.004", "3.500", "3.500 ± 0.707"]]
    assert not section.figures  # two points make no curve
    results.rates["full"][0.008] = [5.0]
    assert [figure.name for figure in rates.section(results, arms, Labels(arms.values())).figures] == ["hybrid_rates"]
    results.rates["full"] = {0.004: [3.0, 4.0]}
    assert rates.section(results, arms, Labels(arms.values())) is None
    assert rates.sentence(results) == "Learning rate at its peak: 0.002, 0.004 for all arms."


def test_parts_are_compared_with_the_same_arm_without_them():
    names = ("full", "canon", "full-qkv", "full-normed", "3to1-ka-head-w4", "3to1-ka-head-w4-from0",
             "3to1-ka-head-w4-from0-fast", "3to1-ka-head-w8-from0-gated", "3to1-conv", "3to1-conv-drawn",
             "3to1-conv-gated")  # fmt: skip
    results, arms = _losses({name: [1.0, 1.0] for name in names})
    parts = differences(results, arms, Labels(arms.values())).tables[-1]
    assert [row[:2] for row in parts.rows] == [
        ["conv qkv", "full softmax"],
        ["conv in front", "full softmax"],
        ["norms on q, k", "full softmax"],
        ["output gates", "3:1 gated conv, from identity"],
        ["gates from 0", "3:1 KA, window 4"],
        ["fast gates", "3:1 KA, window 4, gates from 0"],
        ["start at random", "3:1 gated conv, from identity"],
    ]


MIXERS = ("softmax-w4", "ka-w4", "ka-w8", "ka-head-w4", "ka-token-w4", "ka-w2+4", "conv", "conv-drawn", "gdn", "mamba2")
ADDED = ("", "-gated", "-qkv", "-bias", "-normed", "-gated-qkv-bias", "-gated-qkv-normed")
EVERY = [
    *(f"{whole}{added}" for whole in ("full", "canon") for added in ADDED),
    *(f"{pattern}-{mixer}{added}" for pattern in ("3to1", "1to1") for mixer in MIXERS for added in ADDED),
    *(f"all-{mixer}{added}" for mixer in MIXERS for added in (ADDED if "-w" in mixer else ("", "-gated"))),
    *(f"3to1-ka-{gate}-w4-from{start}-fast" for gate in ("head", "token") for start in ("0", "0.5")),
    *(f"3to1-ka{gate}-w4-from{start}" for gate in ("", "-head", "-token") for start in ("0", "0.5", "1", "spread")),
    "3to1-ka-head-w4-first",
]


def test_every_kind_with_gates_has_a_figure_of_them():
    results, arms = _losses({name: [1.0] for name in EVERY if arm(name).mixer == "ka" and arm(name).gate == "head"})
    for runs in results.arms.values():
        runs[0].gates, runs[0].ungated_loss = {0: [0.5]}, 1.5
    figures = [figure.name for figure in report._gates(results, arms, Labels(arms.values())).figures]
    assert len(set(figures)) == len(figures) == len(leading(results, arms))


@pytest.mark.parametrize("number", [3, 8, 12])
def test_no_more_curves_are_drawn_than_can_be_told_apart_and_the_first_arm_always(number):
    kinds = [f"{kind}{more}" for more in ("", "-qkv", "-normed") for kind in ("3to1-ka-w4", "3to1-gdn", "3to1-mamba2")]
    kinds = ["full", "canon", *kinds, "3to1-softmax-w4", "3to1-conv"][:number]
    results, arms = _losses({name: [9.0 - i] for i, name in enumerate(kinds)})  # the first is the worst
    arms = dict(reversed(arms.items()))
    for runs in results.arms.values():
        runs[0].training = SimpleNamespace(rows=[SimpleNamespace(tokens=1, loss=runs[0].loss)])
    (figure,) = curves.on_the_way(results, arms, Labels(arms.values())).figures
    ax = Figure().gca()
    figure.draw(ax)
    assert ax.lines[-1].get_ydata()[0] == 0
    assert ax.lines[0].get_ydata()[0] == 1 - number
    assert len(ax.lines) == min(number, curves.SHOWN + 1)
    assert (f"{curves.SHOWN} of {number} kinds" in figure.caption) == (number > curves.SHOWN)


def test_two_arms_never_have_one_label():
    random = np.random.default_rng(0)
    for size in (2, 3, 5, 10, 25, len(EVERY)):
        for _ in range(200):
            chosen = {arm(name) for name in random.permutation(EVERY)[:size]}
            labels = Labels(chosen)
            assert len({labels(each) for each in chosen}) == len(chosen)


def test_labels_leave_out_what_arms_share():
    shared = ("3to1-ka-head-w4-from0-gated-qkv", "3to1-softmax-w4-gated-qkv", "full-gated-qkv")
    labels = Labels(map(arm, shared))
    assert [labels(arm(name)) for name in shared] == ["3:1 KA, window 4", "3:1 softmax, window 4", "full softmax"]
    assert "All arms have output gates in every layer and conv qkv." in labels.notes()
    assert "KA has a learned gate for each head, which starts at 0." in labels.notes()
    normed = Labels([arm("full-normed"), arm("full")])
    assert normed(arm("full-normed")) == "full softmax, norms on q, k"
    assert "*norms on q, k*: an RMSNorm a head" in normed.notes()
    fast = Labels([arm("3to1-ka-head-w4-fast"), arm("full")])
    assert fast(arm("3to1-ka-head-w4-fast")) == "3:1 KA, window 4"
    assert "Its gates have 10 times the learning rate of the weights." in fast.notes()
    mixed = ("full-gated", "3to1-ka-head-w4-gated-qkv", "3to1-ka-head-w4-from0-gated", "3to1-ka-w4-gated", "canon")
    labels = Labels(map(arm, mixed))
    assert [labels(arm(name)) for name in mixed] == [
        "full softmax",
        "3:1 KA, window 4 + conv qkv",
        "3:1 KA, window 4, gates from 0",
        "3:1 KA, fixed gates, window 4",
        "full softmax, no output gate + conv in front",
    ]
    assert "output gates in every layer unless a label says otherwise." in labels.notes()
    assert "which starts at 0.5 unless a label says otherwise." in labels.notes()


def test_no_two_arms_look_alike():
    added = ("", "-from0", "-fast", "-from0-fast", "-gated", "-qkv", "-from0-qkv", "-from0-bias", "-normed",
             "-from0-normed", "-gated-normed", "-qkv-normed")  # fmt: skip
    arms = [arm(f"3to1-ka-head-w4{rest}") for rest in added] + [arm("canon-gated"), arm("full-gated-normed")]
    looks = [str(sorted(look(each).items())) for each in arms]
    assert len(set(looks)) == len(looks)
    assert "half filled: norms on q, k" in marks(arms)


def test_attention_has_the_colour_that_it_has_in_other_reports():
    names = {"full": "full", "ka": "3to1-ka-w4", "softmax": "3to1-softmax-w4", "conv": "3to1-conv", "none": "3to1-none",
             "gdn": "3to1-gdn", "mamba2": "3to1-mamba2"}  # fmt: skip
    found = {mixer: to_rgb(look(arm(name))["color"]) for mixer, name in names.items()}
    windows = drawing.COLOURS["softmax, every other layer with a window"]
    elsewhere = {"full": drawing.COLOURS["softmax"], "ka": drawing.COLOURS["KA"], "softmax": windows}
    assert all(found[mixer] == pytest.approx(to_rgb(name)) for mixer, name in elsewhere.items())
    assert len(set(found.values())) == len(NAMES) + 1 == len(found)
