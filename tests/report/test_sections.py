"""Sections of the evaluations: complete, and their words follow the numbers."""

import re
from dataclasses import replace

import pytest

from ka_attention.evaluations import caches, memory, perplexity, reversal
from ka_attention.harness.models.arms import ArmResults
from ka_attention.report.render import render

EVALUATIONS = {"perplexity": perplexity, "caches": caches, "memory": memory, "reversal": reversal}


def answers(arms, name, change=lambda found: found):
    """The answers of every arm to one evaluation, each of them changed."""
    return [ArmResults(each.arm, tuple(change(getattr(seed, name)) for seed in each.seeds)) for each in arms]


def words(name, arms, change=lambda found: found):
    sections = EVALUATIONS[name].sections(answers(arms, name, change))
    return " ".join(paragraph for section in sections for paragraph in section.paragraphs)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_page_of_a_comparison_renders(example, tmp_path, seeds):
    results = example(seeds)
    sections = [part for name, study in EVALUATIONS.items() for part in study.sections(answers(results, name))]
    render("Comparison", sections, {"python": "3"}, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert html.count("<svg") == 4
    for name in ("softmax, window 16", "KA, window 16"):
        assert name in html
    assert not re.search(r">[^<]*\b(nan|inf|None)\b", html.partition("</style>")[2])
    assert ("one seed" in html) == (seeds == 1)
    assert ("mean ± sd over 3 seeds" in html) == (seeds == 3)


def test_cache_table_follows_sign_and_spread(example):
    def swapped(arms, change=lambda found: found):
        own, swap = caches.sections(answers(arms, "caches", change))[0].tables[0].rows[:2]
        assert own[:4] == ["softmax", "KV (own)", own[2], "–"]
        return [own[2], *swap[2:4]]

    def better(found):
        kv, ka = found.kinds["kv"], found.kinds["ka"]
        return caches.Caches({"kv": kv, "ka": replace(ka, ppl=0.9 * kv.ppl)})

    assert swapped(example(3)) == ["109.1 ± 0.5", "301.9 ± 1.5", "+176.6 % ± 0.0 (higher)"]
    assert swapped(example(3), better)[2] == "−10.0 % ± 0.0 (lower)"
    assert swapped(example(1))[2] == "+176.6 %"
    assert "**one seed**" in words("caches", example(1))


def test_memory_words_say_that_ka_is_not_smaller(example):
    text = words("memory", example(1))
    assert "**not smaller**" in text
    assert "(2.50 ×)" in text  # one key head for four query heads: (1 + 4) / (1 + 1)
    assert "15 with w = 16" in text


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        (1.0, 1.0, "**nothing** about the Reversal Curse"),
        (0.8, 1.0, "told **forward only**"),
        (1.0, 0.8, "told **backward only**"),
        (0.8, 0.8, "in **both orders**"),
    ],
)
def test_reversal_words_follow_the_control(example, forward, backward, expected):
    def told(found):
        real = found.by_cache[found.own]["real"]
        real = replace(
            real,
            forward_ppl=forward * real.forward_shuffled_ppl,
            backward_ppl=backward * real.backward_shuffled_ppl,
        )
        by_cache = found.by_cache | {found.own: found.by_cache[found.own] | {"real": real}}
        return replace(found, by_cache=by_cache)

    text = words("reversal", example(2), told)
    assert expected in text
    assert "A ratio near 1 can mean equally bad" in text


def test_position_words_compare_with_the_first_arm(example):
    text = words("perplexity", example(1))
    assert "KA against softmax: +1.6 % at the start, +1.6 % at the end." in text
