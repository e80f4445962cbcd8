"""Folders of KA models in the hands of those who do not know the package: an error, or KA-attention, never softmax."""

import json
import logging
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline
from zoo import FAMILIES, make, tokens

from ka_attention.hf import KAConfig, attach, attention_modules, is_attached, ka_classes


def logits(model):
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


@contextmanager
def transformers_logs():
    """Lets pytest see what transformers says, also where a command of an earlier test has quieted it."""
    logger = logging.getLogger("transformers")
    before = logger.propagate, logger.level
    logger.propagate = True
    logger.setLevel("WARNING")
    try:
        yield
    finally:
        logger.propagate = before[0]
        logger.setLevel(before[1])


def saved(folder, family="llama", **ka):
    model = attach(make(family).float(), KAConfig(**ka))
    for module in attention_modules(model):
        if hasattr(module, "ka_gate"):
            nn.init.uniform_(module.ka_gate.bias)
    model.save_pretrained(folder)
    return model


def test_a_folder_says_what_it_is(tmp_path):
    model = attach(make("llama").float(), KAConfig(window=5))
    model.config.trained_on = "three books"
    model.config._name_or_path = "someone/llama"
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["KALlamaForCausalLM"]
    assert config["model_type"] == "ka_llama"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_ka.KALlamaForCausalLM"
    assert config["layer_types"] == ["ka_attention"] * 3
    card = (tmp_path / "README.md").read_text()
    for text in ("pip install ka-attention", '"window": 5', "Trained on three books", "someone/llama", "`ka_llama`"):
        assert text in card
    (tmp_path / "README.md").write_text("# Mine\n")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# Mine\n")
    assert card.count("## KA-attention") == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_class_refuses_it(tmp_path, family):
    model = saved(tmp_path, family)
    with pytest.raises(Exception, match="ka_"):
        type(make(family)).from_pretrained(tmp_path)
    with pytest.raises(Exception, match="ka_"):
        type(make(family).config).from_dict(model.config.to_dict())


def test_a_folder_that_is_read_with_another_configuration(tmp_path, caplog):
    """What is in config.json is not read then: the weights say what they are, or the class does."""
    model = saved(tmp_path, window=5)
    stock = make("llama").config
    with caplog.at_level("WARNING"), transformers_logs():
        loaded, info = LlamaForCausalLM.from_pretrained(tmp_path, config=stock, output_loading_info=True)
    assert info["unexpected_keys"] == {"ka_attention"}
    assert "UNEXPECTED" in caplog.text
    for build in (partial(type(model), stock), partial(type(model).from_pretrained, tmp_path, config=stock)):
        with pytest.raises(ValueError, match="KALlamaForCausalLM is made from a KALlamaConfig, got a LlamaConfig"):
            build()
    weights = load_file(tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="ka_attention"):
        loaded.load_state_dict(weights)
    assert model.load_state_dict(weights).unexpected_keys == []
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    del weights["ka_attention"]  # a folder of before
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    before, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(before), logits(again))
    assert again.state_dict().keys() == loaded.state_dict().keys()


def test_weights_that_would_be_dropped_are_refused(tmp_path):
    model = saved(tmp_path, gate="head")
    weights = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["ka_config"]["gate"] = "fixed"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"holds .*ka_gate\.bias.*, for which its ka_config has no place"):
        type(model).from_pretrained(tmp_path)
    save_file(
        {n: t for n, t in weights.items() if "ka_gate" not in n}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    assert is_attached(type(model).from_pretrained(tmp_path))


def test_pipelines_and_pushes(tmp_path, monkeypatch):
    model = saved(tmp_path / "ka", window=5)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(97)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(tmp_path / "ka")
    generate = pipeline("text-generation", model=str(tmp_path / "ka"), device="cpu")
    assert type(generate.model) is type(model)
    assert torch.equal(logits(generate.model), logits(model))
    assert generate("t5", max_new_tokens=2, do_sample=False)

    pushed = {}

    def upload(self, folder, *args, **kwargs):
        pushed.update({path.name: path.read_bytes() for path in Path(folder).iterdir()})

    from transformers.utils import hub

    stand_in = type("Api", (), {"create_repo": lambda self, name, **_: type("Repo", (), {"repo_id": name})()})
    monkeypatch.setattr(hub, "hf_api", stand_in, raising=False)
    monkeypatch.setattr(hub, "create_repo", lambda name, **_: type("Repo", (), {"repo_id": name})(), raising=False)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *a, **k: Card())
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    model.push_to_hub("me/mine")
    assert b"pip install ka-attention" in pushed["README.md"]
    assert b"Model card of transformers" in pushed["README.md"]
    assert {"config.json", "model.safetensors", "modeling_ka.py"} <= set(pushed)


class Card:
    def save(self, path):
        with open(path, "w") as file:
            file.write("Model card of transformers\n")


STRANGER = """
import json, sys
sys.modules["ka_attention"] = None  # not installed
import torch
from transformers import AutoModelForCausalLM, pipeline
folder = sys.argv[1]

def told(name, load):
    try:
        model = load()
        found = [type(model).__name__, model(torch.arange(2, 12)[None], use_cache=False).logits[0, -1, :3].tolist()]
    except Exception as error:
        found = [type(error).__name__, str(error)]
    print("\\n" + json.dumps([name, *found]))

load = AutoModelForCausalLM.from_pretrained
told("auto", lambda: load(folder))
told("no remote code", lambda: load(folder, trust_remote_code=False))
told("pipeline", lambda: pipeline("text-generation", model=folder).model)
told("not installed", lambda: load(folder, trust_remote_code=True))
del sys.modules["ka_attention"]
told("installed", lambda: load(folder, trust_remote_code=True))
assert "ka_attention" in sys.modules
told("known", lambda: load(folder))
"""


def test_a_process_without_the_package_says_what_to_do(tmp_path):
    model = saved(tmp_path / "ka", gate="head")
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "ka")]
    run = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200)
    told = {
        name: (kind, said) for name, kind, said in (json.loads(x) for x in run.stdout.splitlines() if x[:2] == '["')
    }
    assert "[y/N]" not in run.stdout.split('"no remote code"')[0].split('["auto"')[1], "it asked"
    for name in ("auto", "no remote code", "pipeline"):
        assert "trust_remote_code" in told[name][1] or "ka_llama" in told[name][1], told
    assert told["not installed"][0] == "ImportError", told
    assert "pip install ka-attention" in told["not installed"][1].replace("ka_attention", "ka-attention")
    with torch.no_grad():
        want = model(torch.arange(2, 12)[None], use_cache=False).logits[0, -1, :3].tolist()
    for name in ("installed", "known"):
        assert told[name][0] == "KALlamaForCausalLM", run.stderr[-2000:]
        assert told[name][1] == pytest.approx(want, abs=1e-5)


def test_the_ka_class_is_the_stock_class_too():
    Config, Model = ka_classes(LlamaForCausalLM)
    assert issubclass(Model, LlamaForCausalLM)
    assert issubclass(Config, LlamaConfig)
