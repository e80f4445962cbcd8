"""The scripts of examples/ run as a user would run them, with tiny settings."""

import json
import runpy
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import tiny
from transformers import AutoModelForCausalLM, LlamaConfig

from ka_attention.harness.text.tokenizer import train as train_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_operator_reaches_through_its_window(run):
    assert [line.split()[-4] for line in run("reach.py").splitlines()] == ["2", "64"]


def test_a_hybrid_is_trained_saved_and_generates(run, tmp_path):
    out = run("train_hybrid.py", "--steps", 2, "--length", 32, "--out", tmp_path)
    assert "ka_qwen3" in (tmp_path / "config.json").read_text()
    assert "cache of 44 tokens" in out


def test_a_softmax_model_is_converted(run, tmp_path):
    documents = list(tiny.documents())
    tokenizer = train_tokenizer(documents, 300)
    tokenizer.save_pretrained(tmp_path / "base")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(documents))
    out = run("convert_model.py", tmp_path / "base", text, "--steps", 10, "--length", 16, "--out", tmp_path / "ka")
    assert "gate 1.00" in out
    assert "ka_llama" in (tmp_path / "ka" / "config.json").read_text()


def test_the_notebook_executes(monkeypatch, capsys):
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    namespace: dict = {}
    for cell in json.loads((EXAMPLES / "walks.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
    assert namespace["far"][0] == 0
    assert namespace["far"][-1] > 0.2


def test_no_example_is_left_out():
    tested = Path(__file__).read_text()
    assert all(f'"{script.name}"' in tested for script in EXAMPLES.glob("*.py"))
