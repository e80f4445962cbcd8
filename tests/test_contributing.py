"""CONTRIBUTING.md adds a study and an evaluation by doing it: the blocks run, and each example stays short."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ka_attention.evaluations
import ka_attention.studies
from ka_attention.harness.models.arms import ArmResults, arm, build
from ka_attention.harness.run.study import open_store, publish, read, report
from ka_attention.harness.text.data import Text
from ka_attention.harness.training.trained import Trained
from ka_attention.studies.compare.recipes import COMPARE

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = dict(
    re.findall(r"^`((?:studies|evaluations)/[\w/]+\.py)`.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
)


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The files of the page, where the package finds them."""
    for name, text in FILES.items():
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for package in (ka_attention.studies, ka_attention.evaluations):
        room = package.__name__.rpartition(".")[2]
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / "src" / room)])


def test_the_examples_are_short():
    for room in ("studies/", "evaluations/"):
        lines = [line for name, text in FILES.items() if name.startswith(room) for line in text.split("\n") if line]
        assert 0 < len(lines) < 60


def test_the_study_runs_and_reports(added, tmp_path):
    study = importlib.import_module("ka_attention.studies.lag.study").LAG
    recipe = replace(study.recipes["quick"], least_seeds=1, hidden_size=16, train_samples=64)
    store = open_store(study, recipe, tmp_path / "run")
    publish(study, recipe, store, 1, study.run(recipe, store, 1))
    page = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "| 4 | KA | " in page
    report(study, read(tmp_path / "run", "results.json"), tmp_path / "run")
    assert (tmp_path / "run" / "report.md").read_text(encoding="utf-8") == page
    assert json.loads((tmp_path / "run" / "results.json").read_text())["arms"]["1/ka"]["task"] == "1"


def test_the_evaluation_answers(added):
    evaluation = importlib.import_module("ka_attention.evaluations.repeats")
    recipe = COMPARE["quick"]
    ids = torch.randint(recipe.vocab_size, (4, 32))
    trained = Trained(arm("ka"), replace(recipe, sequence_length=32), Text(None, ids, ids, None), 0, None, Path(), 4)
    vars(trained)["model"] = build(arm("ka"), recipe, 0).eval()
    answer = evaluation.run(trained)
    assert answer.once > 1
    (section,) = evaluation.sections([ArmResults(arm("ka"), (answer,))])
    assert section.tables[0].rows[0][0] == "KA"
