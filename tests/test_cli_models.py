"""Commands that load a saved model: damaged, hostile and half-precision checkpoints, with and without a tokenizer."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_cli import ka, refused
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from ka_attention.commands import convert, serve
from ka_attention.harness.text import tokenizer as tokenizers
from ka_attention.harness.training import perplexity
from ka_attention.harness.training.trainer import save
from ka_attention.hf import attach

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LOADS = {
    "inspect": ("MODEL", ["def f(x):", "--out", "page.html"]),
    "generate": ("MODEL", ["def f(x):", "--compare", "--max-new-tokens", "4"]),
    "adapt": ("CHECKPOINT", ["--tokens", "640", "--length", "32", "--data", "text.jsonl", "--out", "out"]),
    "convert": ("CHECKPOINT", ["--tokens", "640", "--length", "32", "--data", "text.jsonl", "--out", "out"]),
}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(tiny.documents(), 300)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": text}) + "\n" for text in tiny.documents()]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def folder(here, tokenizer):
    """A softmax model with its tokenizer."""
    torch.manual_seed(0)
    save(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=300, **SIZES)), tokenizer, here / "model")
    (here / "model" / "model.safetensors.sha256").unlink()  # the tests change the weights
    return here / "model"


def load(command, model="model", *more):
    return ka(command, model, *LOADS[command][1], *more)


def change(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Code()}, folder / "pytorch_model.bin")


def remote(folder):
    change(folder, model_type="theirs", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (folder / "code.py").write_text("open('ran', 'w')\n")


DAMAGE = {
    "heads of 0": (lambda f: change(f, num_attention_heads=0), "cannot load model: ZeroDivisionError"),
    "a size no machine holds": (lambda f: change(f, hidden_size=10**8), "GiB of memory, this machine has"),
    "a vocabulary no machine holds": (lambda f: change(f, vocab_size=10**12), "GiB of memory, this machine has"),
    "layers without end": (lambda f: change(f, num_hidden_layers=10**9), "GiB of memory, this machine has"),
    "another size": (lambda f: change(f, hidden_size=64), "its weights have other shapes than its config.json says"),
    "no number": (lambda f: change(f, hidden_size="x"), "cannot load model"),
    "no layers": (lambda f: change(f, num_hidden_layers=0), "none of its layers has self-attention"),
    "a KA setting that is none": (lambda f: change(f, ka_config={"window": "x"}), "window: expected"),
    "deep nesting": (lambda f: (f / "config.json").write_text("[" * 100_000), "cannot load model"),
    "pickled code": (pickled, "its pickled weights hold more than tensors"),
    "code of its own": (remote, "model needs code of its own; read it, and give --trust-remote-code to run it"),
    "other weights": (
        lambda f: (f / "model.safetensors.sha256").write_text("0" * 64 + "  model.safetensors\n"),
        "its weights are not those of model.safetensors.sha256",
    ),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("tokenizer*")],
        "holds no tokenizer; give --tokenizer, a tokenizer.json file, a folder or a Hub name",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_hostile_checkpoint_is_one_line_and_none_of_its_code_runs(damage, folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    spoil, message = DAMAGE[damage]
    spoil(folder)
    for command, (argument, _) in LOADS.items():
        assert refused(load(command), f"{argument}: ", message)
    assert not Path("ran").exists()
    assert not Path("out").exists()


def test_code_of_a_model_runs_where_it_is_trusted(folder):
    remote(folder)
    refused(load("inspect", "model", "--trust-remote-code"), "MODEL: cannot load model")
    assert Path("ran").exists()


def test_code_of_a_tokenizer_does_not_run(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    shutil.copytree(folder, "theirs")
    remote(Path("theirs"))
    Path("theirs/tokenizer.json").unlink()
    words = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", None]}}
    Path("theirs/tokenizer_config.json").write_text(json.dumps(words))
    assert refused(
        ka("train", *tiny.arguments(), "--data", "text.jsonl", "--tokenizer", "theirs"),
        "--tokenizer: theirs needs code of its own",
    )
    assert not Path("ran").exists()


def test_a_model_without_a_tokenizer_takes_that_of_tokenizer(folder, tokenizer):
    tokenizer.backend_tokenizer.save("words.json")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    for command in LOADS:
        shutil.rmtree("out", ignore_errors=True)
        result = load(command, "model", "--tokenizer", "words.json")
        assert result.exit_code == 0, result.output


def test_a_tokenizer_that_does_not_fit_is_one_line(folder, tokenizer):
    save(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=299, **SIZES)), tokenizer, Path("small"))
    words = Tokenizer(models.WordLevel({"def": 0, "<|endoftext|>": 1}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained("words")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained("endless")
    for command, (argument, _) in LOADS.items():
        assert refused(load(command, "small"), f"{argument}: the tokenizer of small has 300 entries, the model 299")
        assert refused(load(command, "model", "--tokenizer", "words"), "cannot read", "Missing [UNK]")
        if argument == "CHECKPOINT":
            assert refused(load(command, "model", "--tokenizer", "endless"), "--tokenizer: ", "no end-of-text token")
    assert not Path("out").exists()


def test_more_tokens_than_positions_are_one_line(here, tokenizer):
    save(
        GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=16, n_embd=32, n_layer=2, n_head=2)),
        tokenizer,
        here / "gpt2",
    )
    text = "def f(x): return x + 1" * 2
    assert refused(ka("inspect", "gpt2", text), "TEXT: the model reads at most 16 tokens, it has")
    assert refused(ka("generate", "gpt2", text), "--max-new-tokens: the model reads at most 16 tokens, PROMPT has")
    for command in ("adapt", "convert"):
        assert refused(load(command, "gpt2"), "--length: the model reads at most 16 tokens, got 32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_trained_in_float32(dtype, folder):
    """In bfloat16 a step of 1e-5 of a weight is none: 94 % of them never moved."""
    GPTNeoXForCausalLM.from_pretrained(folder).to(dtype).save_pretrained(folder)
    before = load_file(folder / "model.safetensors")
    assert load("convert", "model", "--learning-rate", "1e-5").exit_code == 0
    after = load_file("out/model.safetensors")
    for name, weight in before.items():
        assert after[name].dtype == torch.float32
        assert after[name].isfinite().all()
        if after[name].dim() == 2:
            assert (after[name] != weight.float()).float().mean() > 0.6, name
    shutil.rmtree("out")
    assert load("adapt").exit_code == 0
    assert all(weight.dtype == torch.float32 for weight in load_file("out/ka_adapter.safetensors").values())


def test_the_perplexity_of_a_conversion_is_that_of_text_it_was_not_trained_on(folder, monkeypatch):
    seen, trained_on = [], []
    evaluate, raised = perplexity.evaluate, convert.convert
    monkeypatch.setattr(
        perplexity, "evaluate", lambda model, ids, **options: seen.append(ids) or evaluate(model, ids, **options)
    )
    monkeypatch.setattr(
        convert,
        "convert",
        lambda model, data, *more, **options: (
            trained_on.append(data.input_ids) or raised(model, data, *more, **options)
        ),
    )
    assert load("convert").exit_code == 0
    (train,) = trained_on
    rows = {tuple(row) for row in train.tolist()}
    assert len(seen) > 2
    for ids in seen:
        assert not rows & {tuple(row) for row in ids.tolist()}


def test_what_cannot_be_served(folder, monkeypatch):
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    assert refused(ka("serve", "model"), "the server needs fastapi, uvicorn and openai; pip install")
    monkeypatch.setattr(serve, "is_serve_available", lambda: True)
    assert refused(ka("serve", "nowhere"), "MODEL: no file or folder 'nowhere'")
    model = attach(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=30, **SIZES | {"hidden_size": 14, "rotary_pct": 0.5})))
    model.save_pretrained("odd")
    assert refused(ka("serve", "odd"), "MODEL: odd cannot be served: head_dim: continuous batching stores halves")
    assert refused(ka("serve", "model/config.json"), "MODEL: model/config.json is a file, not the folder of a model")
    attach(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=30, **SIZES))).save_pretrained("bare")
    assert refused(ka("serve", "bare"), "MODEL: bare has no tokenizer, which the server needs; tokenizer.save_")
