"""Sections of the evaluations: complete, and their words follow the numbers."""

import copy
import re

import pytest

from ka_attention.evaluations import caches, memory, reversal
from ka_attention.harness import perplexity
from ka_attention.report.render import render

STUDIES = (perplexity, caches, memory, reversal)


def words(study, results):
    return " ".join(paragraph for section in study.sections(results) for paragraph in section.paragraphs)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_page_of_a_comparison_renders(example, tmp_path, seeds):
    results = example(seeds)
    sections = [section for study in STUDIES for section in study.sections(results)]
    render("Comparison", sections, {"python": "3"}, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert html.count("<svg") == 4
    for name in ("Softmax, window 16", "KA, window 16"):
        assert name in html
    assert not re.search(r">[^<]*\b(nan|inf|None)\b", html.partition("</style>")[2])
    assert ("one seed" in html) == (seeds == 1)
    assert ("mean ± sd over 3 seeds" in html) == (seeds == 3)


@pytest.mark.parametrize("study", STUDIES)
def test_results_without_the_evaluation_give_no_section(example, study):
    results = example(1)
    for arm in results["arms"].values():
        for seed in arm["seeds"]:
            del seed[study.__name__.rpartition(".")[2]]
    assert study.sections(results) == []


def test_cache_words_follow_sign_and_spread(example):
    results = example(3)
    text = words(caches, results)
    assert "**Softmax**: PPL 109.1 ± 0.5 with its own KV cache, 301.9 ± 1.5 with a KA cache" in text
    assert "(+176.6 % ± 0.0; higher)" in text
    better = copy.deepcopy(results)
    for seed in better["arms"]["softmax"]["seeds"]:
        seed["caches"]["ka"]["ppl"] = seed["caches"]["kv"]["ppl"] * 0.9
    assert "(−10.0 % ± 0.0; lower)" in words(caches, better)
    assert "**one seed**, which proves nothing" in words(caches, example(1))


def test_memory_words_say_that_ka_is_not_smaller(example):
    text = words(memory, example(1))
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
    results = example(2)
    for arm in results["arms"].values():
        for seed in arm["seeds"]:
            figures = seed["reversal"]["by_cache"][seed["reversal"]["own"]]["real"]
            figures["forward_ppl"] = forward * figures["forward_shuffled_ppl"]
            figures["backward_ppl"] = backward * figures["backward_shuffled_ppl"]
    text = words(reversal, results)
    assert expected in text
    assert "A ratio near 1 can mean equally bad" in text


def test_position_words_compare_with_the_first_arm(example):
    text = words(perplexity, example(1))
    assert "KA against Softmax: +1.6 % at the start, +1.6 % at the end." in text
