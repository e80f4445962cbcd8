"""Pretraining: it learns, it goes on after a kill as if there had been none, rates, evaluations, gates, divergence."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ka_attention.errors import UserError
from ka_attention.harness.models.passes import Passes
from ka_attention.harness.text.tokens import TokenFile
from ka_attention.harness.training import pretraining
from ka_attention.harness.training.pretraining import (
    PretrainingSettings,
    evaluate,
    mean_loss,
    pretrain,
    scores,
    watched_gates,
)
from ka_attention.studies.hybrid.models import LlamaSettings, arm, build

MODEL = LlamaSettings(vocab_size=1024, hidden_size=32, layers=2, heads=2, intermediate_size=320)
SETTINGS = PretrainingSettings(
    sequence_length=20,
    batch_size=4,
    train_tokens=80 * 12,
    validation_sequences=8,
    evaluations=3,
    learning_rate=1e-2,
    warmup_steps=3,
)
ARM = "1to1-ka-head-w4-gated"
PASSES = Passes(compiled=False)


@pytest.fixture
def text(tmp_path):
    numbers = (
        np.random.default_rng(0).integers(7, size=2000).cumsum() % 50
    )  # steps are small: there is something to learn
    numbers.astype("<u2").tofile(tmp_path / "text.bin")
    return TokenFile(tmp_path / "text.bin", len(numbers)), TokenFile(tmp_path / "text.bin", len(numbers))


def model(seed=0):
    return build(arm(ARM), MODEL, SETTINGS.sequence_length, seed)


def run(model, text, folder, settings=SETTINGS, **options):
    return pretrain(model, text, settings, PASSES, folder, seed=0, label="test", **options)


def test_it_learns_and_says_how(text, tmp_path):
    trained = model()
    found = run(trained, text, tmp_path)
    assert found.loss < math.log(1024) - 1
    assert [row.tokens for row in found.rows] == [320, 640, 960]
    assert (found.tokens, found.steps, found.epochs) == (960, 12, pytest.approx(48 / 99))
    assert found.rows[0].seconds < found.rows[-1].seconds == found.seconds
    octaves = found.rows[-1].by_position
    assert [(each.first, each.last) for each in octaves] == [(0, 15), (16, 19)]
    assert mean_loss(octaves) == pytest.approx(found.loss)
    again = evaluate(lambda ids: scores(trained, PASSES, ids), text[1], SETTINGS, trained.device)
    assert mean_loss(again) == pytest.approx(found.loss)


def test_a_killed_training_goes_on_as_if_it_had_not_been(text, tmp_path, monkeypatch):
    whole = run(model(), text, tmp_path)
    steps = 0

    def kill(function, example, ready=PASSES.ready):
        learn = ready(function, example)

        def counted(ids):
            nonlocal steps
            steps += 1
            if steps == 10:
                raise KeyboardInterrupt
            return learn(ids)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(PASSES, "ready", kill)
        with pytest.raises(KeyboardInterrupt):
            run(model(), text, tmp_path, checkpoint_seconds=0)
    assert (tmp_path / "checkpoint.pt").exists()
    resumed = run(model(seed=5), text, tmp_path)  # what it starts with does not count
    assert [row.loss for row in resumed.rows] == [row.loss for row in whole.rows]
    assert [row.train_loss for row in resumed.rows] == pytest.approx([row.train_loss for row in whole.rows])
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.gpu
def test_steps_as_cuda_graphs_learn_the_same(text, tmp_path):
    settings = replace(SETTINGS, learning_rate=1e-3)
    found = []
    for graphs in (False, True):
        passes = Passes(compiled=False, graphs=graphs)
        made = model().cuda()
        found.append(pretrain(made, text, settings, passes, tmp_path, seed=0, label="test"))
    assert [row.loss for row in found[1].rows] == pytest.approx([row.loss for row in found[0].rows], rel=1e-3)


def test_rates_and_evaluations():
    assert [SETTINGS.rate(step) for step in range(3)] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert SETTINGS.rate(3) == 1e-2
    assert SETTINGS.rate(11) < 1e-3
    assert SETTINGS.evaluated_at() == [4, 8, 12]
    with pytest.raises(UserError, match="--set train_tokens"):
        replace(SETTINGS, train_tokens=100)
    with pytest.raises(UserError, match="--set validation_sequences"):
        replace(SETTINGS, validation_sequences=6)


def test_weight_decay_is_for_matrices_alone():
    made = model()
    decayed, others = pretraining.adamw(made, SETTINGS).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    assert {names[id(p)].rpartition(".")[0].rpartition(".")[2] for p in others["params"]} == {
        "input_layernorm", "post_attention_layernorm", "norm", "ka_gate",
    }  # fmt: skip


def test_gates_may_learn_faster():
    made = model()
    optimizer = pretraining.adamw(made, SETTINGS, gate_rate=10.0)
    (fast,) = [group for group in optimizer.param_groups if group["factor"] == 10]
    gates = [p for name, p in made.named_parameters() if "ka_gate" in name]
    assert gates
    assert list(map(id, fast["params"])) == list(map(id, gates))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(made.parameters()))
    pretraining.set_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [
        0.25 * group["factor"] for group in optimizer.param_groups
    ]


def test_gates_are_watched():
    made = build(arm("1to1-ka-token-w4"), MODEL, 20, 0)
    with watched_gates(made) as gates:
        PASSES.hidden_states(made, torch.randint(50, (2, 20)))
    assert gates == {0: pytest.approx([0.5, 0.5])}
    assert not made.model.layers[0].self_attn.ka_gate._forward_hooks


def test_what_diverges_is_one_line(text, tmp_path):
    broken = model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="training diverged by step 4"):
        run(broken, text, tmp_path)
