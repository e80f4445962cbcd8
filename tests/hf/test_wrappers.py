"""`attach` on models that are compiled, wrapped, sharded, quantized, offloaded or inside: whole or not at all."""

import copy
from typing import get_type_hints

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from zoo import make, tokens

from ka_attention.hf import (
    KACache,
    KAConfig,
    attach,
    attention_modules,
    detach,
    is_attached,
    load_adapter,
    save_adapter,
    use,
)

LEARNED = KAConfig(gate="head", gate_init=0.5)


def logits(model):
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def state(model):
    """What `attach` could change."""
    return [(type(m), getattr(m, "config", None), set(vars(m)), set(m._modules)) for m in model.modules()]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    store = f"file://{tmp_path_factory.mktemp('store') / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [torch.compile, DistributedDataParallel, nn.DataParallel], ids=lambda f: f.__name__)
def test_a_wrapped_model_is_refused(wrap, one_process):
    inner = make("llama")
    model, before = wrap(inner), state(inner)
    with pytest.raises(ValueError, match=r"^model: expected a model of transformers, got a .*; attach first") as caught:
        attach(model)
    assert "\n" not in str(caught.value)
    assert state(inner) == before
    assert is_attached(wrap(attach(inner)))
    with pytest.raises(ValueError, match="attached already"):
        attach(wrap(inner))
    with pytest.raises(ValueError, match="not attached itself, a part of it is"):
        detach(wrap(inner))


def test_a_sharded_model_is_refused_and_an_attached_one_is_sharded_and_saved(one_process, tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(make("llama").float(), mesh=one_process)
    before = state(model)
    with pytest.raises(ValueError, match=r"sharded \(DTensor\); attach first"):
        attach(model)
    assert state(model) == before

    model = attach(make("llama").float(), LEARNED)
    for module in attention_modules(model):
        nn.init.uniform_(module.ka_gate.bias)
    want = logits(model)
    sharded = fully_shard(model, mesh=one_process)
    assert hasattr(attention_modules(sharded)[0].ka_gate.bias, "full_tensor")
    save_adapter(sharded, tmp_path)
    assert torch.equal(logits(load_adapter(make("llama").float(), tmp_path)), want)
    with pytest.raises(ValueError, match="has become a FSDPKALlamaForCausalLM"):
        detach(sharded)


def test_a_model_compiled_in_place_runs_ka_attention(monkeypatch):
    model = make("llama")
    model.compile(backend="eager")
    softmax = logits(model)
    want = logits(attach(make("llama")))
    assert (logits(attach(model)) - want).abs().max() < 1e-12
    assert (logits(detach(model)) - softmax).abs().max() < 1e-12


class Quantized(nn.Module):
    """What a quantized linear layer is to others: buffers alone."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("codes", linear.weight.detach().clone())

    def forward(self, x):
        return x @ self.codes.mT


@pytest.mark.parametrize("ka", [KAConfig(), LEARNED, KAConfig(output_gate=True)], ids=["fixed", "learned", "output"])
def test_layers_without_parameters_take_gates(ka):
    model, plain = make("llama"), make("llama")
    for module in attention_modules(model):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(module, name, Quantized(getattr(module, name)))
    attach(plain, ka).double()
    attach(model, ka).double()
    for one, other in zip(attention_modules(plain), attention_modules(model), strict=True):
        for name in ("ka_gate", "ka_output_gate"):
            if hasattr(one, name):
                getattr(other, name).load_state_dict(getattr(one, name).state_dict())
    assert (logits(model) - logits(plain)).abs().max() < 1e-11


def test_an_offloaded_model_takes_fixed_gates_only():
    model = cpu_offload(make("llama"))
    before = state(model)
    with pytest.raises(ValueError, match=r"its layers are offloaded, learned gates .* attach first"):
        attach(model, LEARNED)
    assert state(model) == before
    assert torch.equal(logits(attach(model)), logits(attach(make("llama"))))


def test_a_bare_decoder_inside_a_model_is_not_saved_as_softmax(tmp_path):
    model = make("llama")
    before = logits(model)
    attach(model.model)
    with pytest.raises(ValueError, match="the decoder within this model is attached by itself"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"use ka_attention\.hf\.save_adapter"):
        model.model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(ValueError, match="attached already"):
        attach(model)
    copy.deepcopy(model)
    detach(model.model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).double().eval()), before)


def test_a_part_of_a_ka_model_is_not_attached_again():
    model = attach(make("llama"))
    before = state(model)
    with pytest.raises(ValueError, match="this LlamaModel is a part of a KA model already"):
        attach(model.model)
    assert state(model) == before


def test_two_models_of_one_configuration_do_not_share_what_is_attached():
    one = make("llama")
    other = type(one)(one.config).double().eval()
    other.load_state_dict(one.state_dict())
    before = logits(other)
    attach(one)
    assert torch.equal(logits(other), before)
    assert not is_attached(other)


def test_what_is_changed_in_the_configuration_meanwhile_stays():
    model = make("llama")
    config = model.config
    with use(model, window=4):
        model.resize_token_embeddings(120)
        model.config.pad_token_id = 3
        model.config.mine = "yes"
        assert model(torch.tensor([[110, 111]])).logits.shape[-1] == 120
    assert model.config is config
    assert (config.vocab_size, config.pad_token_id, config.mine) == (120, 3, "yes")
    assert config.model_type == "llama"
    assert not hasattr(config, "ka_config")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model(torch.tensor([[110, 111]])).logits.shape[-1] == 120


def test_gates_of_bfloat16_models_load_into_any_precision(tmp_path):
    model = attach(make("llama"), LEARNED).bfloat16()
    for module in attention_modules(model):
        nn.init.uniform_(module.ka_gate.bias)
    gates = [m.ka_gate.bias.float() for m in attention_modules(model)]
    save_adapter(model, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        again = load_adapter(make("llama").to(dtype), tmp_path)
        assert all(m.ka_gate.bias.equal(g) for m, g in zip(attention_modules(again), gates, strict=True))
        assert logits(again).isfinite().all()


def test_gates_that_are_not_finite_are_not_saved(tmp_path):
    model = attach(make("llama"), LEARNED)
    nn.init.constant_(attention_modules(model)[1].ka_gate.bias, torch.nan)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.ka_gate\.bias must be finite, the model has NaN"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def test_what_an_exporter_saw_is_not_kept():
    """Fixed gates that differ by head are a tensor, which an exporter and fake tensors get for themselves."""
    ka = KAConfig(gate_init=(0.1, 0.9, 0.5, 0.3))
    want = logits(attach(make("llama"), ka))
    model = attach(make("llama"), ka)
    for _ in range(2):
        exported = torch.export.export(Logits(model), (tokens(),), strict=False)
        assert torch.equal(exported.module()(tokens()), want)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert Logits(model)(fake.from_tensor(tokens())).shape == want.shape
        assert torch.equal(logits(model), want)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("ka", [{"gate_init": (0.1, 0.9, 0.5, 0.3)}, {"gate": "head"}, {"gate": "token", "window": 3}])
def test_an_ensemble_by_vmap(ka):
    models = [attach(make("llama", seed), KAConfig(**{"gate_init": 0.5, **ka})) for seed in (0, 1)]
    parameters, buffers = torch.func.stack_module_state(models)
    ids = tokens()

    def run(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (ids,), {"use_cache": False}).logits

    together = torch.vmap(run)(parameters, buffers)
    torch.testing.assert_close(together, torch.stack([logits(model) for model in models]), rtol=0, atol=1e-11)
    together.sum().backward()
    gates = {name: p.grad for name, p in parameters.items() if "ka_gate" in name}
    assert all(grad.isfinite().all() for grad in gates.values())
    for i, model in enumerate(models):
        model(tokens(), use_cache=False).logits.sum().backward()
        for name, grad in gates.items():
            torch.testing.assert_close(grad[i], model.get_parameter(name).grad, rtol=1e-9, atol=1e-9)


def test_attach_keeps_the_type_of_a_model():
    for function in (attach, detach, load_adapter):
        hints = get_type_hints(function)
        assert hints["model"] is hints["return"]


def test_an_unknown_way_to_make_caches_is_said(monkeypatch):
    model = attach(make("llama"))
    monkeypatch.setattr(type(model).ka_base, "_prepare_cache_for_generation", lambda *args: None)
    with pytest.raises(RuntimeError, match="makes its cache in a way that is not known here"):
        model.generate(tokens(), max_new_tokens=2)
    model.generate(tokens(), max_new_tokens=2, use_cache=False)
    monkeypatch.setattr(type(model).ka_base, "_can_set_attn_implementation", None)
    with pytest.raises(ValueError, match="does not say whether LlamaForCausalLM uses its attention interface"):
        attach(make("llama"))
    assert KACache(model.config)
