"""What `attach` and `detach` refuse, and that an attached model stays a KA model."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import make, tokens

from ka_attention.hf import KAConfig, attach, attention_modules, detach, is_attached, use


def logits(model):
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def made_as_ka(**ka):
    settings = make("llama").config.to_dict() | {"model_type": "ka_llama", "ka_config": KAConfig(**ka).to_dict()}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).double().eval()


@pytest.mark.parametrize("gate", ["fixed", "head"])
def test_a_model_made_as_a_ka_model_is_not_detached(gate):
    model = made_as_ka(gate=gate)
    before = logits(model)
    with pytest.raises(ValueError, match="KALlamaForCausalLM was made as a KA model"):
        detach(model)
    assert is_attached(model)
    assert torch.equal(logits(model), before)


ONE = {"kind": "linear", "heads": 4, "head_dim": 8}


@pytest.mark.parametrize(
    ("ka", "adapter", "named"),
    [
        (KAConfig(layers=(1,)), {0: nn.Identity(), 1: nn.Identity()}, "layers 0 "),
        (KAConfig(), {7: nn.Identity()}, "layers 7 "),
        (KAConfig(), {"0": nn.Identity()}, "layers '0' "),
        (KAConfig(gate_init=0.0), {2: nn.Identity()}, "layers 2 "),
        (KAConfig(layers=(1,), adapters={"0": ONE, "1": ONE}), None, "layers 0 "),
    ],
)
def test_adapters_of_layers_that_are_no_ka_layers_are_refused(ka, adapter, named):
    model = make("llama")
    with pytest.raises(ValueError, match=f"adapter: .*{named}"):
        attach(model, ka, adapter)
    assert not is_attached(model)
    assert not any(hasattr(m, "ka_adapter") for m in attention_modules(model))


def test_adapters_come_from_one_place():
    model = make("llama")
    with pytest.raises(ValueError, match=r"^adapter: ka\.adapters names adapters too"):
        attach(model, KAConfig(adapters={"1": ONE}), {0: nn.Identity()})
    assert not is_attached(model)


@pytest.mark.parametrize("model", [lambda: attach(make("llama")), made_as_ka], ids=["attached", "made"])
def test_a_ka_model_does_not_change_to_another_attention(model):
    model = model()
    before = logits(model)
    for other in ("sdpa", "eager", "paged|eager", {"": "sdpa"}):
        for part in (model, model.model):
            with pytest.raises(ValueError, match="a KA model runs 'ka' only"):
                part.set_attn_implementation(other)
        for name in ("_attn_implementation", "_attn_implementation_internal"):
            with pytest.raises(ValueError, match="a KA model runs 'ka' only"):
                setattr(model.config, name, other)
    with pytest.raises(ValueError, match="a KA model runs 'ka' only"):
        model.set_attn_implementation("paged|ka")
    model.set_attn_implementation("ka")
    assert torch.equal(logits(model), before)


def test_a_detached_model_is_free_again():
    model = make("llama")
    before = set(vars(model)), set(vars(model.model))
    with use(model):
        pass
    assert (set(vars(model)), set(vars(model.model))) == before
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
