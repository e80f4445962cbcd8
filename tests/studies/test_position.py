"""Perplexity by position at several lengths: the same text for all, exact octaves, words that follow the numbers."""

import dataclasses
import math
import random

import pytest

from ka_attention.errors import UserError
from ka_attention.harness import data
from ka_attention.harness.study import open_store
from ka_attention.report.render import render
from ka_attention.studies.position import study as position
from ka_attention.studies.position.study import POSITION, RECIPES


def test_octaves():
    ppl = [2.0, 3.0, 4.0, 9.0, 5.0, 5.0, 5.0, 20.0]
    runs = [{"first": 16 * i, "last": 16 * i + 15, "ppl": p} for i, p in enumerate(ppl)]
    runs[-1]["last"] = 126  # the last position predicts nothing
    names, found = zip(*position.by_octave(runs), strict=True)
    assert names == ("0–15", "16–31", "32–63", "64–126")
    last = math.exp((48 * math.log(5) + 15 * math.log(20)) / 63)
    assert found == pytest.approx((2.0, 3.0, 6.0, last))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_shipped_lengths_have_the_same_tokens(recipe):
    sizes = {
        (at.train_samples * n, at.validation_samples * n, at.batch_size * n)
        for n in recipe.lengths
        for at in [recipe.at(n)]
    }
    assert len(sizes) == 1


@pytest.mark.parametrize("length", [0, 64, 200, 128 * 3])
def test_wrong_lengths(length):
    with pytest.raises(UserError, match=f"--set lengths: expected multiples of sequence_length = 128 .* got {length}"):
        RECIPES["quick"].at(length)


def test_study(tmp_path, monkeypatch):
    rng = random.Random(0)
    (tmp_path / "text").mkdir()
    for i in range(24):
        (tmp_path / "text" / f"{i}.txt").write_text(" ".join(rng.choices(["one", "two", "three", "four"], k=200)))
    small = {"hidden_size": 32, "heads": 2, "layers": 1, "intermediate_size": 32, "vocab_size": 300, "epochs": 1}
    counts = {"sequence_length": 16, "lengths": (16, 64), "train_samples": 32, "validation_samples": 8, "batch_size": 8}
    recipe = dataclasses.replace(RECIPES["quick"], data=str(tmp_path / "text"), **small, **counts)
    seen = []
    sequences = data.Sequences.__init__
    monkeypatch.setattr(data.Sequences, "__init__", lambda self, ids: seen.append(ids) or sequences(self, ids))
    results = POSITION.run(recipe, open_store(POSITION, recipe, tmp_path / "run"), 1)
    assert {tuple(ids.shape) for ids in seen} == {(32, 16), (8, 16), (8, 64), (2, 64)}
    assert len({tuple(ids.flatten().tolist()) for ids in seen}) == 2  # one text to train on and one to validate with
    assert POSITION.run(recipe, open_store(POSITION, recipe, tmp_path / "run"), 1) == results
    results = {"recipe": dataclasses.asdict(recipe), **results}
    render(POSITION.question, POSITION.sections(results), {}, tmp_path / "run")
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "undecided: one seed proves nothing" in report
    assert "| 32–62 |" in report
    assert (tmp_path / "run" / "figures" / "position_64.svg").exists()
    with pytest.raises(UserError, match="--set lengths: expected ascending numbers, got 64,16"):
        POSITION.run(dataclasses.replace(recipe, lengths=(64, 16)), open_store(POSITION, recipe, tmp_path / "run"), 1)


def test_words_follow_the_numbers():
    def entry(label, starts, ends):
        def seed(start, end):
            runs = [{"first": 0, "last": 15, "ppl": start}, {"first": 16, "last": 30, "ppl": end}]
            return {"perplexity": {"ppl": start, "by_position": runs}}

        return {"label": label, "seeds": [seed(*pair) for pair in zip(starts, ends, strict=True)]}

    arms = {
        "softmax": entry("softmax", (100.0, 100.0, 100.0), (50.0, 50.0, 50.0)),
        "ka": entry("KA", (102.0, 103.0, 104.0), (55.0, 55.5, 56.0)),
    }
    results = {"recipe": {"train_samples": 10, "sequence_length": 31}, "lengths": [{"length": 31, "arms": arms}]}
    came = POSITION.sections(results)[0].paragraphs[2]
    assert "At 31 tokens **KA** stands at +3.0 % ± 1.0 (n=3) PPL against softmax in the positions 0–15" in came
    assert "at +11.0 % ± 1.0 (n=3) in 16–30 (the distance: higher at the end)" in came
