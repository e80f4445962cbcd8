"""Perplexity by position at several lengths: the same text for all, exact octaves, words that follow the numbers."""

import dataclasses
import random

import pytest

from ka_attention.errors import UserError
from ka_attention.harness.models.arms import ArmResults, arm
from ka_attention.harness.run.study import open_store
from ka_attention.harness.text import data
from ka_attention.harness.training.lengths import AtLength, Read
from ka_attention.harness.training.perplexity import Perplexity, Run
from ka_attention.report.render import render
from ka_attention.studies.position.recipes import RECIPES
from ka_attention.studies.position.report import Results
from ka_attention.studies.position.study import POSITION


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
    render(POSITION.question, POSITION.sections(recipe, results), {}, tmp_path / "run")
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "undecided: one seed proves nothing" in report
    assert "| 32–62 |" in report
    assert (tmp_path / "run" / "figures" / "position_64.svg").exists()
    with pytest.raises(UserError, match="--set lengths: expected ascending numbers, got 64,16"):
        dataclasses.replace(recipe, lengths=(64, 16))


def test_words_follow_the_numbers():
    def read(start, end):
        runs = Run(0, 15, start), Run(16, 30, end)
        return Read(None, Perplexity(0.0, start, 31, runs))

    def entry(name, starts, ends):
        return ArmResults(arm(name), tuple(read(*pair) for pair in zip(starts, ends, strict=True)))

    arms = {
        "softmax": entry("softmax", (100.0, 100.0, 100.0), (50.0, 50.0, 50.0)),
        "ka": entry("ka", (102.0, 103.0, 104.0), (55.0, 55.5, 56.0)),
    }
    came = POSITION.sections(RECIPES["quick"], Results(None, (AtLength(31, arms),)))[0].paragraphs[2]
    assert "At 31 tokens **KA** stands at +3.0 % ± 1.0 (n=3) PPL against softmax in the positions 0–15" in came
    assert "at +11.0 % ± 1.0 (n=3) in 16–30 (the distance: higher at the end)" in came
