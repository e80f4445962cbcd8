"""Settings of hybrids: patterns, sliding layers, a window a layer, a gate a head, output gates."""

import json

import pytest
import torch
import torch.nn.functional as F
from test_cache import check_training, largest, parallel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import FAMILIES, make, tokens

from ka_attention.hf import (
    KACache,
    KAConfig,
    KAStaticCache,
    attach,
    attention_modules,
    detach,
    load_adapter,
    reconfigure,
    save_adapter,
    use,
)
from ka_attention.hf.adapters import LinearAdapter

TINY = 1e-11
GATED = KAConfig(layers=(0, 2), window=4, gate="head", gate_init=0.5, output_gate=True)


def gated(family, ka=GATED):
    """With output gates that are neither small nor alike."""
    model = attach(make(family), ka).double()
    torch.manual_seed(5)
    for module in attention_modules(model):
        if hasattr(module, "ka_output_gate"):
            module.ka_output_gate.weight.data.normal_()
    return model


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [("3:1", (0, 1, 2, 4, 5, 6)), ("1:1", (0, 2, 4, 6)), ("5:1", (0, 1, 2, 3, 4, 6)), ("1:3", (0, 4))],
)
def test_a_pattern_is_repeated(pattern, layers):
    by_pattern, by_layers = KAConfig(pattern=pattern, window=3), KAConfig(layers=layers, window=3)
    for i in range(7):
        assert by_pattern.enabled(i) == by_layers.enabled(i)
        assert by_pattern.window_of(i, 5) == by_layers.window_of(i, 5)
    model, ids = make("llama", num_hidden_layers=7), tokens()
    with use(model, by_layers):
        want = parallel(model, ids)
    with use(model, by_pattern):
        assert torch.equal(parallel(model, ids), want)


def test_sliding_layers_of_the_model_are_replaced():
    model, ids = make("gemma3_text"), tokens()  # its third layer is full attention
    with use(model, layers=(0, 1), window=3):
        want = parallel(model, ids)
    with use(model, layers="sliding", window=3):
        assert torch.equal(parallel(model, ids), want)
        assert KAConfig.of(model.config).layers == (0, 1)
    with pytest.raises(ValueError, match="layers: 'sliding' needs a model whose layer_types"):
        attach(make("llama"), KAConfig(layers="sliding"))
    with pytest.raises(ValueError, match=r"ask KAConfig.of\(model.config\)"):
        KAConfig(layers="sliding").enabled(0)


def test_a_window_for_each_ka_layer():
    ka = KAConfig(layers=(0, 2), window=(2, 5))
    assert [ka.window_of(i) for i in range(3)] == [2, None, 5]
    assert [ka.window_of(i, 4) for i in range(3)] == [2, 4, 4]
    model, ids = make("llama"), tokens()
    with use(model, ka):
        mixed, cache = parallel(model, ids), KACache(model.config)
        with torch.no_grad():
            steps = torch.cat([model(x, past_key_values=cache).logits for x in ids.split(1, 1)], 1)
        assert largest(steps - mixed) < TINY
    with use(model, layers=(0, 2), window=(2, None)), use_window(model, (2, 99)):
        want = parallel(model, ids)
    with use(model, layers=(0, 2), window=(2, None)):
        assert torch.equal(parallel(model, ids), want)
    with pytest.raises(ValueError, match="window: expected one for each of 3 KA layers, got 2"):
        attach(make("llama"), KAConfig(window=(2, 5)))


def use_window(model, window):
    reconfigure(model, KAConfig(layers=(0, 2), window=window))
    return torch.no_grad()


@pytest.mark.parametrize("gate", ["fixed", "head", "token"])
def test_a_gate_for_each_head(gate):
    """Heads of gate 0 and 1 compute what they do in models where all heads have that gate."""
    model, ids = make("llama", num_hidden_layers=1), tokens()
    outs = {}
    for init in (0.0, 1.0, (0.0, 1.0, 1.0, 0.0)):
        with use(model, gate=gate, gate_init=init):
            seen = []
            projection = attention_modules(model)[0].o_proj
            hook = projection.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].unflatten(-1, (4, 8))))
            parallel(model, ids)
            hook.remove()
            outs[init] = seen[0]
    for head, start in enumerate((0.0, 1.0, 1.0, 0.0)):
        assert largest(outs[0.0, 1.0, 1.0, 0.0][:, :, head] - outs[start][:, :, head]) < TINY
    with pytest.raises(ValueError, match="gate_init: expected one for each of 4 query heads, got 2"):
        attach(make("llama"), KAConfig(gate=gate, gate_init=(0.0, 1.0)))


def test_fixed_gates_of_heads_serve_all_gradient_modes():
    with use(make("llama"), gate=(0, 0.3, 0.7, 1)) as model:
        assert KAConfig.of(model.config) == KAConfig(gate_init=(0.0, 0.3, 0.7, 1.0))
    model, ids = attach(make("llama"), KAConfig(gate_init=(0.0, 0.3, 0.7, 1.0))), tokens()
    with torch.inference_mode():
        model(ids, use_cache=False)
    model(ids, use_cache=False, labels=ids).loss.backward()


@pytest.mark.parametrize("ka", [GATED, KAConfig(layers=(1,), output_gate="ka")], ids=["all", "ka"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_output_gate_multiplies_what_attention_gives(family, ka):
    """In every family: with hooks on both ends the projection reads silu(W_g x) · A, and no more has changed."""
    model, ids = gated(family, ka), tokens()
    modules = [m for m in attention_modules(model) if hasattr(m, "ka_output_gate")]
    assert [m.layer_idx for m in modules] == ([0, 1, 2] if ka is GATED else [1])
    inputs, outputs = [], []
    projection = next(p for name, p in modules[0].named_children() if name in ("o_proj", "dense", "c_proj"))
    modules[0].register_forward_pre_hook(
        lambda _, args, kw: inputs.append(args[0] if args else kw["hidden_states"]), with_kwargs=True
    )
    projection.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    parallel(model, ids)
    gate = F.silu(inputs[0] @ modules[0].ka_output_gate.weight.mT)
    reconfigure(model, KAConfig(**{**ka.to_dict(), "output_gate": False}))
    parallel(model, ids)
    assert largest(outputs[0] - gate * outputs[1]) < TINY


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama", "gemma3_text"])
def test_output_gates_in_caches(family):
    model, ids = gated(family), tokens()
    want = parallel(model, ids)
    for cache in (KACache(model.config), KAStaticCache(model.config, 12)):
        with torch.no_grad():
            got = [model(x, past_key_values=cache).logits for x in ids.split([4, 1, 1, 6], 1)]
        assert largest(torch.cat(got, 1) - want) < TINY


def test_output_gates_are_trained_checkpointed_and_compiled():
    model, ids = gated("llama"), tokens()
    check_training(model, ids)
    assert all(m.ka_output_gate.weight.grad.abs().sum() > 0 for m in attention_modules(model))


def test_output_gates_are_saved_and_loaded(tmp_path):
    model, ids = gated("llama"), tokens()
    want = parallel(model, ids)
    model.save_pretrained(tmp_path / "model")
    save_adapter(model, tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert torch.equal(parallel(loaded, ids), want)
    base = make("llama")
    before = parallel(base, ids)
    load_adapter(base, tmp_path / "adapter")
    assert torch.equal(parallel(base, ids), want)
    detach(base)
    assert torch.equal(parallel(base, ids), before)
    assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in base.modules())
    assert not any(hasattr(m, "ka_output_gate") for m in base.modules())


def test_new_output_gates_start_small_and_alike_in_distribution():
    """As the model's own weights do, in a model made as a KA model too."""
    model = make("llama", initializer_range=0.3)
    attach(model, KAConfig(output_gate=True))
    settings = make("llama").config.to_dict() | {"model_type": "ka_llama", "ka_config": GATED.to_dict()}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    for m in (model, made):
        for module in attention_modules(m):
            assert module.ka_output_gate.weight.std().item() == pytest.approx(0.3, rel=0.15)


def test_a_model_without_the_output_gate_that_its_configuration_asks_for():
    model = make("llama", attention="ka", ka_config={"output_gate": True})
    with pytest.raises(RuntimeError, match="layer 0 got no output gate"):
        model(tokens())


@pytest.mark.parametrize(
    "ka",
    [
        KAConfig(layers="sliding"),
        KAConfig(pattern="3:1", window=(2, 4, 8), gate="head", gate_init=(0.0, 0.5, 1.0, 1.0), output_gate=True),
        KAConfig(layers=range(2), window=[3, None], output_gate="ka"),
    ],
    ids=["sliding", "pattern", "lists"],
)
def test_settings_go_to_json_and_back(ka):
    assert KAConfig(**json.loads(json.dumps(ka.to_dict()))) == ka


def test_settings_of_before_still_load():
    before = {
        "layers": [1, 2], "window": 4, "gate": "fixed", "gate_init": 1.0, "gate_range": [0.0, 1.0], "adapters": None
    }  # fmt: skip
    assert KAConfig(**before) == KAConfig(layers=(1, 2), window=4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": "sideways"},
        {"pattern": "3"},
        {"pattern": "3:0"},
        {"pattern": "a:1"},
        {"pattern": 3},
        {"pattern": "3:1", "layers": (1,)},
        {"window": ()},
        {"window": (2, 0)},
        {"window": (2, True)},
        {"window": "2"},
        {"gate_init": ()},
        {"gate_init": (0.0, 1.5)},
        {"gate_init": (0.0, "1")},
        {"output_gate": "full"},
        {"output_gate": 2},
        {"output_gate": 1},
    ],
    ids=str,
)
def test_wrong_settings_of_hybrids_are_named(wrong):
    with pytest.raises(ValueError, match=rf"^[a-z_, ]*{next(iter(wrong))}[a-z_, ]*: expected .*, got .*$"):
        KAConfig(**wrong)


def test_reconfigure_is_the_one_way_to_change_a_model():
    model, ids = attach(make("gpt_neox"), KAConfig()), tokens()
    before = parallel(model, ids)
    cache = KACache(model.config)
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache)
    reconfigure(model, KAConfig(window=3))
    assert torch.equal(parallel(model, ids), parallel(attach(make("gpt_neox"), KAConfig(window=3)), ids))
    with pytest.raises(RuntimeError, match="made for another ka_config"):
        model(ids[:, 4:5], past_key_values=cache)
    reconfigure(model, KAConfig())
    assert torch.equal(parallel(model, ids), before)
    for change in ("in place", "anew"):
        reconfigure(model, KAConfig())
        if change == "in place":
            model.config.ka_config["window"] = 3
        else:
            model.config.ka_config = {"window": 3}
        with pytest.raises(RuntimeError, match=r"changed .* with ka_attention.hf.reconfigure"):
            parallel(model, ids)
    for ka in (KAConfig(gate="head"), KAConfig(output_gate=True), KAConfig(layers=(3,))):
        with pytest.raises(ValueError, match=r"which only ka_attention.hf.attach makes|^layers: "):
            reconfigure(model, ka)
    spec = LinearAdapter(4, 8).spec
    model = attach(make("llama"), KAConfig(gate="head", adapters={"0": spec}))
    for ka in (KAConfig(gate="token"), KAConfig(adapters={"0": {**spec, "kind": "mlp", "width": 2}})):
        with pytest.raises(ValueError, match="ka: layer 0 has no such ka_"):
            reconfigure(model, ka)
    with pytest.raises(ValueError, match="is no KA model"):
        reconfigure(make("llama"), KAConfig())


@pytest.mark.parametrize("kind", ["head", "token"])
@pytest.mark.parametrize(
    "change", [{"gate_range": (0.0, 0.3), "gate_init": 0.2}, {"gate": "fixed"}, {"layers": (1,), "output_gate": "ka"}]
)
def test_a_reconfigured_model_decodes_and_is_saved_as_what_it_is(kind, change, tmp_path):
    ka = {"gate": kind, "gate_init": 0.5, "window": 4, "output_gate": True}
    model, ids = attach(make("llama"), KAConfig(**ka)), tokens()
    for module in attention_modules(model):
        for parameter in module.ka_gate.parameters():
            nn.init.uniform_(parameter)
    before = parallel(model, ids)
    reconfigure(model, KAConfig(**{**ka, **change}))
    now = parallel(model, ids)
    assert largest(now - before) > 0.1
    for cache in (KACache(model.config), KAStaticCache(model.config, 12)):
        with torch.no_grad():
            steps = [model(token, past_key_values=cache).logits for token in ids.split(1, 1)]
        assert largest(torch.cat(steps, 1) - now) < TINY
    model.save_pretrained(tmp_path / "model")
    assert largest(parallel(type(model).from_pretrained(tmp_path / "model"), ids) - now) < 1e-4  # float32 gates
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(detach(attach(make("llama"))), tmp_path / "adapter")
    if "output_gate" in change:
        assert "ka_output_gate" not in attention_modules(again)[0]._modules
    assert largest(parallel(again, ids) - now) < TINY
    reconfigure(model, KAConfig(**ka))
    assert torch.equal(parallel(model, ids), before)


def test_layers_beyond_a_model_are_refused_whatever_was_asked_before():
    ka = KAConfig(layers=(6,))
    attach(make("llama", num_hidden_layers=8), ka)
    with pytest.raises(ValueError, match="the layers 0 to 3, got"):
        attach(make("llama", num_hidden_layers=4), ka)
    small = make("llama", num_hidden_layers=4, attention="ka", ka_config=ka.to_dict())
    with pytest.raises(ValueError, match="the layers 0 to 3, got"):
        small(tokens())
