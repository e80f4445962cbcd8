"""Saved KA models: they load as what they were or not at all."""

import copy
import hashlib
import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)
from zoo import FAMILIES, make, tokens

from ka_attention.hf import (
    KAConfig,
    attach,
    attention_modules,
    detach,
    is_attached,
    ka_classes,
    load_adapter,
    save_adapter,
)
from ka_attention.hf import types as ka_models
from ka_attention.hf.adapters import ADAPTERS

KA = KAConfig(layers=(0, 2), window=5, gate="token", gate_init=0.5)


class Scale(nn.Module):
    """The smallest adapter: one factor a head."""

    def __init__(self, heads):
        super().__init__()
        self.spec = {"kind": "test_scale", "heads": heads}
        self.weight = nn.Parameter(torch.rand(heads, 1, 1))

    def forward(self, a):
        return a * self.weight.to(a.dtype)


@pytest.fixture(autouse=True)
def known_kind(monkeypatch):
    monkeypatch.setitem(ADAPTERS, "test_scale", Scale)


def trained(family="llama", ka=KA, adapter=None):
    model = attach(make(family).float(), ka, adapter)
    for module in attention_modules(model):
        if hasattr(module, "ka_gate"):
            nn.init.normal_(module.ka_gate.bias)
            nn.init.normal_(module.ka_gate.weight)
    return model


def logits(model):
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def test_an_adapter_directory_restores_gates_and_adapters(tmp_path):
    model = trained(adapter={2: Scale(4)})
    save_adapter(model, tmp_path / "new" / "folder")
    again = load_adapter(make("llama").float(), tmp_path / "new" / "folder")
    assert torch.equal(logits(again), logits(model))
    assert again.config.ka_config == model.config.ka_config
    assert sorted(p.suffix for p in (tmp_path / "new" / "folder").iterdir()) == [".json", ".safetensors"]


def test_fixed_gates_need_no_weights(tmp_path):
    model = attach(make("gpt_neox"), KAConfig(window=4))
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(make("gpt_neox"), tmp_path)), logits(model))


def change(folder, edit_weights=lambda weights: None, edit=lambda description: None):
    """Edit an adapter, so that what it says of itself still holds."""
    weights = load_file(folder / "ka_adapter.safetensors")
    edit_weights(weights)
    save_file(weights, folder / "ka_adapter.safetensors")
    description = json.loads((folder / "ka_config.json").read_text())
    description["sha256"] = hashlib.sha256((folder / "ka_adapter.safetensors").read_bytes()).hexdigest()
    edit(description)
    (folder / "ka_config.json").write_text(json.dumps(description))


def first(value):
    """Put something else in the place of the first weight."""
    return lambda weights: weights.update({min(weights): value(weights[min(weights)])})


def flipped(folder):
    path = folder / "ka_adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


LINEAR = {"kind": "linear", "heads": 4, "head_dim": 8}
DAMAGE = {
    "a weight is missing": (lambda f: change(f, lambda w: w.popitem()), "missing"),
    "wrong shape": (lambda f: change(f, first(lambda t: torch.zeros(3, 3))), "must be"),
    "not a number": (lambda f: change(f, first(lambda t: t * torch.nan)), "must be finite"),
    "infinity": (lambda f: change(f, first(lambda t: t / 0)), "must be finite"),
    "integers": (lambda f: change(f, first(lambda t: t.long())), "must hold floating-point numbers"),
    "one bit": (flipped, "damaged: ka_adapter.safetensors is not what ka_config.json was written for"),
    "no checksum": (lambda f: change(f, edit=lambda d: d.pop("sha256")), "damaged: ka_config.json has no 'sha256'"),
    "no weights": (lambda f: (f / "ka_adapter.safetensors").unlink(), "no ka_adapter.safetensors"),
    "cut weights": (lambda f: (f / "ka_adapter.safetensors").write_bytes(b"cut"), "damaged"),
    "not JSON": (lambda f: (f / "ka_config.json").write_text("{"), "damaged"),
    "deep JSON": (lambda f: (f / "ka_config.json").write_text("[" * 10**5), "damaged"),
    "a list": (lambda f: (f / "ka_config.json").write_text("[]"), "damaged"),
    "not text": (lambda f: (f / "ka_config.json").write_bytes(b"\xff"), "damaged"),
    "unknown field": (lambda f: change(f, edit=lambda d: d["ka_config"].update(windw=4)), "damaged.*windw"),
    "base": (lambda f: change(f, edit=lambda d: d.update(base=3)), "damaged"),
    "no base": (lambda f: change(f, edit=lambda d: d.pop("base")), "damaged: ka_config.json has no 'base'"),
}
SPECS = {
    "unknown kind": ({"kind": "nobody knows"}, "unknown kind"),
    "no number": (LINEAR | {"heads": "four"}, "no 'linear' can be built"),
    "negative": (LINEAR | {"head_dim": -8}, "no 'linear' can be built"),
    "beyond memory": (LINEAR | {"head_dim": 10**9}, "no 'linear' can be built"),
    "beyond integers": (LINEAR | {"head_dim": 10**30}, "no 'linear' can be built"),
    "unknown setting": (LINEAR | {"headz": 4}, "no 'linear' can be built"),
    "other heads": (LINEAR | {"heads": 2}, "layer 0 is for heads 2, the model has 4"),
    "no dictionary": (3, "damaged"),
}


def spoil(spec):
    return lambda folder: change(folder, edit=lambda d: d["ka_config"].update(adapters={"0": spec}))


DAMAGE |= {name: (spoil(spec), says) for name, (spec, says) in SPECS.items()}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_directories_are_refused_and_change_nothing(tmp_path, damage):
    save_adapter(trained(), tmp_path)
    spoil, says = DAMAGE[damage]
    spoil(tmp_path)
    model = make("llama").float()
    before, config, names = logits(model), model.config, list(model.state_dict())
    with pytest.raises(ValueError, match=says) as caught:
        load_adapter(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert model.config is config
    assert not is_attached(model)
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model), before)


def test_another_models_adapter_is_refused(tmp_path):
    save_adapter(trained(), tmp_path)
    with pytest.raises(ValueError, match=r"another model: model_type llama there and qwen3 here"):
        load_adapter(make("qwen3"), tmp_path)
    with pytest.raises(ValueError, match=r"hidden_size 32 there and 64 here"):
        load_adapter(make("llama", hidden_size=64), tmp_path)
    with pytest.raises(ValueError, match="nothing to save"):
        save_adapter(make("llama"), tmp_path)
    with pytest.raises(ValueError, match="no `spec`"):
        save_adapter(attach(make("llama"), adapter=lambda i: nn.Identity()), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_model_loads_as_a_ka_model_of_its_own_type(tmp_path, family):
    model = trained(family)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"ka_{family}"
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert type(again) is type(model)
    assert type(again).__name__ == "KA" + type(make(family)).__name__
    again.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "second").eval()), logits(model))


def test_adapters_travel_in_a_model_of_its_own_type(tmp_path):
    model = trained(adapter={0: Scale(4)})
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model))


def test_a_ka_type_runs_nothing_but_ka_attention(tmp_path):
    trained().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a KA model runs 'ka' only"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")


def test_a_ka_type_can_be_built_from_scratch_and_from_base_weights(tmp_path):
    """Gates that a checkpoint does not hold start where the configuration says, not in uninitialised memory."""
    settings = make("llama").config.to_dict() | {"model_type": "ka_llama", "ka_config": KA.to_dict()}
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config)
    base = make("llama").float()
    base.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, config=config)
    for gates in ([m.ka_gate for m in attention_modules(x) if hasattr(m, "ka_gate")] for x in (model, loaded)):
        assert len(gates) == 2
        assert all((gate.bias == 0.5).all() and (gate.weight == 0).all() for gate in gates)
    assert torch.equal(logits(loaded.eval()), logits(attach(base, KA)))


class Mine(LlamaForCausalLM):
    pass


@pytest.mark.parametrize("other", [LlamaModel, LlamaForSequenceClassification, Mine])
def test_the_auto_classes_load_the_causal_language_model_whatever_was_attached_since(tmp_path, other):
    model = trained()
    model.save_pretrained(tmp_path)
    attach(other(make("llama").config), KA)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is ka_classes(LlamaForCausalLM)[1]
    assert torch.equal(logits(again), logits(model))


def test_a_class_of_ones_own_shares_the_type_and_loads_as_itself(tmp_path):
    model = attach(Mine(make("llama").config).eval(), KA)
    model.save_pretrained(tmp_path)
    assert type(model.config) is type(trained().config)
    again = ka_classes(Mine)[1].from_pretrained(tmp_path).eval()
    assert isinstance(again, Mine)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("other", [LlamaModel, LlamaForSequenceClassification])
def test_what_is_no_causal_language_model_saves_in_two_parts(tmp_path, other):
    model = attach(other(make("llama").config).eval(), KA)
    for module in attention_modules(model)[::2]:
        nn.init.normal_(module.ka_gate.bias)
    ids = tokens()
    with torch.no_grad():
        want = model(ids)[0]
        with pytest.raises(ValueError, match="would load as a softmax model"):
            model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="expected a causal language model"):
            ka_classes(other)
        save_adapter(model, tmp_path / "adapter")
        detach(model).save_pretrained(tmp_path)
        assert torch.equal(load_adapter(other.from_pretrained(tmp_path).eval(), tmp_path / "adapter")(ids)[0], want)


@pytest.mark.parametrize("made", [False, True], ids=["attached", "made"])
def test_models_are_pickled_and_copied(tmp_path, made):
    model = trained()
    if made:
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), loaded):
        assert type(again) is type(model)
        assert torch.equal(logits(again), logits(model))
        assert torch.equal(*(m.generate(tokens(), max_new_tokens=4) for m in (again, model)))


def test_a_pickled_model_runs_in_a_new_process(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    for i, kind in enumerate((model, AutoModelForCausalLM.from_pretrained(tmp_path).eval())):
        torch.save((kind, tokens(), kind.generate(tokens(), max_new_tokens=4)), tmp_path / f"{i}.pt")
    code = """
import sys, torch
for path in sys.argv[1:]:
    model, ids, want = torch.load(path, weights_only=False)
    assert torch.equal(model.generate(ids, max_new_tokens=4), want)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "0.pt", tmp_path / "1.pt"], check=True)


def test_ka_classes_are_found_by_name():
    assert ka_models.KALlamaForCausalLM is ka_classes(LlamaForCausalLM)[1]
    assert ka_models.KALlamaConfig is ka_classes(LlamaForCausalLM)[0]
    for name in ("KALlamaModel", "KANothing", "Llama", "KAtorch"):
        with pytest.raises(AttributeError, match=name):
            getattr(ka_models, name)
