"""The benchmark of training steps: that both arms train, from the same weights, and that goals find its figures."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # the benchmarks are no part of the package
from benchmarks import goals, training

TINY = replace(training.PYTHIA, vocab_size=32, hidden_size=16, layers=1, heads=2, intermediate_size=32)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("on_cpu")
def test_a_step_trains():
    losses = {}
    for attention in ("softmax", "ka"):
        call = training.step(attention, TINY, 2, 16)
        losses[attention] = [float(call()) for _ in range(4)]
        assert losses[attention] == sorted(losses[attention], reverse=True)
    assert losses["ka"][0] == pytest.approx(losses["softmax"][0], abs=0.02)  # the same weights and tokens
    assert losses["ka"] != losses["softmax"]


@pytest.mark.usefixtures("on_cpu")
def test_goals_find_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "steps", partial(training.steps, TINY, 2, 16, 0.0))
    monkeypatch.setattr(training, "processor", partial(training.processor, (1, 1, 4, 8), 0.0))
    file = tmp_path / "training.json"
    tables = list(training.run(file))
    found = json.loads(file.read_text())["records"]
    assert [record["pass"] for record in found] == ["step", "forward", "backward"]
    assert len(tables) == 2
    assert all(set(record["ms"]) > {"KA"} for record in found)
    judged = next(line for line in goals.judged(found).splitlines() if "Pythia-70M" in line)
    assert "not measured" not in judged
