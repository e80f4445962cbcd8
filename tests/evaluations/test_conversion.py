"""What a comparison asks a softmax-trained model, and ka adapt, convert and generate, end to end on a tiny model."""

import json
import math
import re
from pathlib import Path

import pytest
import tiny
import torch
from typer.testing import CliRunner

from ka_attention.cli import app
from ka_attention.commands import convert
from ka_attention.commands.generate import first_difference
from ka_attention.conversion.raising import Conversion
from ka_attention.evaluations import adapters, conversion, decoding, heads
from ka_attention.harness.models.arms import ArmResults, arm, build
from ka_attention.harness.models.saved import load_model_and_tokenizer
from ka_attention.harness.run.records import from_json, to_json
from ka_attention.harness.text.tokenizer import train as train_tokenizer
from ka_attention.harness.training.perplexity import evaluate
from ka_attention.harness.training.trained import Trained
from ka_attention.hf import attach, load_adapter, use


@pytest.fixture(autouse=True)
def few_windows(monkeypatch):
    monkeypatch.setattr(conversion, "WINDOWS", (4,))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    build(arm("softmax"), tiny.recipe(), 0).save_pretrained(folder)
    train_tokenizer(tiny.documents(), 300).save_pretrained(folder)
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in tiny.documents(80)))
    return str(folder), str(text)


@pytest.fixture
def model():
    return build(arm("softmax"), tiny.recipe(), 0).eval()


def text(count):
    return torch.randint(300, (count, 16), generator=torch.Generator().manual_seed(count))


def ka_command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_cheapest_heads_go_first():
    cost = torch.tensor([[0.3, 0.1], [0.2, 0.4]])
    assert heads.cheapest(cost, 0).tolist() == [[0, 0], [0, 0]]
    assert heads.cheapest(cost, 2).tolist() == [[0, 1], [1, 0]]
    assert heads.cheapest(cost, 4).tolist() == [[1, 1], [1, 1]]


def test_the_curve_runs_from_softmax_to_the_swap(model):
    sample = text(8)
    found = heads.evaluate(model, text(4), sample, batch_size=8)
    softmax = evaluate(model, sample, batch_size=8).ppl
    with use(model):
        swap = evaluate(model, sample, batch_size=8).ppl
    assert [point.heads for point in found.curve] == [0, 1, 2, 3, 4]
    assert found.curve[0].ppl == pytest.approx(softmax, rel=1e-6)
    assert found.curve[-1].ppl == pytest.approx(swap, rel=1e-6)
    assert torch.tensor(found.cost).shape == (2, 2)


def test_the_control_and_free_gates_learn_from_the_text_alone(model, monkeypatch):
    """In stage one they would follow the softmax model, which the control is: it would learn nothing."""
    plans = []

    def record(converted, data, plan, folder, **settings):
        plans.append(plan)
        attach(converted, plan.result())

    monkeypatch.setattr(conversion, "convert", record)
    conversion.evaluate(model, text(32), text(8), original_tokens=10**4, learning_rate=1e-3, batch_size=8)
    control = next(plan for plan in plans if plan.target == "softmax" and plan.window is None)
    free = next(plan for plan in plans if plan.target == "learned")
    assert not any(plan.follows(step) for plan in (control, free) for step in range(plan.steps))
    largest = max(plan.steps for plan in plans)
    assert control.steps == largest
    assert all(plan.follows(0) for plan in plans if plan.target == "ka")


def test_everything_is_reported(model):
    train, sample = text(32), text(8)
    answers = {
        adapters: adapters.evaluate(model, train, sample, steps=2, batch_size=8),
        heads: heads.evaluate(model, train[:4], sample, batch_size=8),
        conversion: conversion.evaluate(
            model, train, sample, original_tokens=10 * train.numel(), learning_rate=1e-3, batch_size=8
        ),
        decoding: decoding.evaluate(model, contexts=(4, 8), batch_sizes=(1, 2)),
    }
    for answer in answers.values():
        assert from_json(type(answer), json.loads(json.dumps(to_json(answer)))) == answer
    converted = answers[conversion]
    assert {name: run.steps for name, run in converted.runs.items()} == {
        "0.01": 1, "0.02": 2, "0.05": 4, "0.1": 8, "control": 8, "learned": 2,
    }  # fmt: skip
    for row in converted.windows:
        assert (row.ka.steps, row.softmax.steps) == (2, 2)
        assert row.ka.untrained != row.softmax.untrained
    found = [
        section
        for evaluation, answer in answers.items()
        for section in evaluation.sections([ArmResults(arm("softmax"), (answer, answer))])
    ]
    assert [section.title for section in found] == [
        "Adapters", "Which heads", "Conversion", "Conversion to a window", "Decoding speed",
    ]  # fmt: skip
    assert all(section.tables for section in found)


def test_questions_that_do_not_arise_are_not_asked():
    """Of a model that was not trained with plain softmax attention nothing is loaded for them."""
    trained = Trained(arm("ka"), tiny.recipe(), None, 0, None, Path("nowhere"), 4)
    assert [evaluation.run(trained) for evaluation in (adapters, heads, conversion, decoding)] == [None] * 4


def test_both_caches_are_timed_on_the_same_weights(model):
    before = model.config.to_dict()
    found = decoding.evaluate(model, contexts=(4, 8), batch_sizes=(1, 3))
    assert [(row.batch, row.context) for row in found.models["MHA"]] == [(1, 4), (1, 8), (3, 4), (3, 8)]
    assert model.config.to_dict() == before
    key_heads = {"MHA": 2, "GQA": 1}
    for name, rows in found.models.items():
        for row in rows:
            for measured, stored in ((row.kv, 2 * key_heads[name]), (row.ka, key_heads[name] + 2)):
                assert measured.bytes_a_token == measured.computed == 2 * stored * 16 * 4
                assert measured.tokens_per_s > 0
                assert measured.prefill_tokens_per_s > 0


@pytest.mark.parametrize("command", ["adapt", "convert"])
def test_a_short_text_is_enough(checkpoint, command, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("\n".join(tiny.documents(8)))
    options = ("--data", text, "--length", 16, "--out", tmp_path / "out", "--tokens")
    refused = ka_command(command, checkpoint[0], *options, 10**6)
    assert refused.exit_code == 2
    advised = re.search(r"or --tokens (\d+)\n$", refused.stderr)
    result = ka_command(command, checkpoint[0], *options, advised[1])
    assert result.exit_code == 0, result.output
    part = json.loads((tmp_path / "out" / "parts" / "identity.json").read_text())
    assert 0 < part["data"]["validation_tokens"] < 64 * 16


def test_adapt_saves_an_adapter(checkpoint, tmp_path):
    folder, data = checkpoint
    options = ("--data", data, "--tokens", 512, "--length", 16, "--out", tmp_path / "out")
    result = ka_command("adapt", folder, *options)
    assert result.exit_code == 0, result.output
    model, _ = load_model_and_tokenizer(folder)
    load_adapter(model, tmp_path / "out")
    assert ka_command("adapt", folder, *options).output == result.output  # stored, not fitted again


def test_convert_saves_a_ka_model_that_generates(checkpoint, tmp_path):
    folder, data = checkpoint
    out = tmp_path / "out"
    result = ka_command("convert", folder, "--data", data, "--tokens", 512, "--length", 16, "--window", 8, "--out", out)
    assert result.exit_code == 0, result.output
    rows = convert.command(
        folder,
        data=data,
        tokens=512,
        length=16,
        plan=Conversion(steps=1, learning_rate=1e-4, window=8),
        seed=0,
        out=out,
    )
    assert [row["tokens"] for row in rows] == list(range(0, 513, 64))
    assert all(math.isfinite(row["ppl"]) for row in rows)
    assert load_model_and_tokenizer(str(out))[0].config.ka_config["window"] == 8
    shown = ka_command("generate", out, "def f", "--max-new-tokens", 3)
    assert shown.exit_code == 0
    assert shown.output.startswith("def f")
    both = ka_command("generate", out, "def f", "--max-new-tokens", 3, "--compare")
    assert "KA cache (own)" in both.output
    assert "KV cache (swap)" in both.output


@pytest.mark.parametrize("command", ["adapt", "convert"])
def test_a_folder_of_the_users_is_not_written_to(checkpoint, command, tmp_path):
    folder, data = checkpoint
    for out in (tmp_path, folder):
        (tmp_path / "config.json").write_text("precious")
        before = sorted((path, path.stat().st_mtime_ns) for path in Path(out).rglob("*"))
        result = ka_command(command, folder, "--data", data, "--tokens", 512, "--length", 16, "--out", out)
        assert result.exit_code == 2
        assert "--out:" in result.stderr
        assert sorted((path, path.stat().st_mtime_ns) for path in Path(out).rglob("*")) == before


def test_the_first_difference():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1], [1, 3]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("adapt", "{}", "--method", "magic"), "--method: expected one of ridge-value"),
        (("convert", "{}", "--tokens", 5), "--tokens: expected at least one sequence of 128 tokens, got 5"),
        (("convert", "{}", "--tokens", 300, "--data", "nowhere"), "--data: no file or folder 'nowhere'"),
        (("generate", "{}", "x", "--cache", "kq"), "--cache: expected kv or ka, got 'kq'"),
        (("generate", "{}", "x", "--cache", "ka", "--compare"), "--compare shows both caches"),
        (("generate", "{}", ""), "PROMPT: expected at least one token"),
        (("generate", "{}", "x", "--max-new-tokens", 2048), "at most 2,048 tokens, PROMPT has 1, got 2,048"),
    ],
)
def test_mistakes_are_one_line(checkpoint, arguments, message):
    result = ka_command(*(str(argument).format(checkpoint[0]) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert message in result.stderr
