"""Short convolutions on queries, keys and values: the layer's definition, caches, padding, packing, refusals."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from test_cache import (
    TINY,
    check_batch,
    check_crop,
    check_reorder,
    check_training,
    check_turns,
    fixed,
    largest,
    parallel,
    run,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from zoo import make, tokens

from ka_attention.hf import (
    KACache,
    KAConfig,
    KAStaticCache,
    attach,
    attention_modules,
    cache_bytes,
    detach,
    load_adapter,
    reconfigure,
    save_adapter,
)
from ka_attention.hf.batching import check_batching
from ka_attention.hf.tensor_parallel import layer_of_heads
from ka_attention.nn import KAAttention

CONFIGS = {
    "full": KAConfig(convolution=4),
    "narrow": KAConfig(pattern="1:1", window=2, convolution=4),  # a convolution reads more than the window
    "windows": KAConfig(window=(1, 3, 2), convolution=4),  # masks cover fewer tokens than convolutions
    "softmax": KAConfig(layers=(), convolution=3, output_gate=True),
    "learned": KAConfig(gate="token", gate_init=0.5, convolution=2),
}
FAMILIES = ["llama", "qwen3", "gemma3_text", "mistral", "olmo2"]


def convolved(family="llama", ka=CONFIGS["narrow"], **settings):
    return attach(make(family, **settings), ka).double()


@pytest.mark.parametrize(("gate", "window"), [(1.0, None), (0.7, 3), (0.0, None)])
def test_a_layer_computes_what_the_layer_for_models_of_ones_own_does(gate, window):
    """KAAttention(convolution=4) is held to the definition and to the study's layer by its own tests."""
    model = convolved(ka=KAConfig(gate_init=gate, window=window, convolution=4))
    layer = KAAttention(32, 4, 2, gate=gate, window=window, convolution=4, bias=False).double()
    module = attention_modules(model)[1]
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer, name).weight.copy_(getattr(module, name).weight)
        layer.out_proj.weight.copy_(module.o_proj.weight)
        layer.convolution.copy_(module.ka_convolution.weight)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    positions = model.model.rotary_emb(x, torch.arange(7)[None])
    found = module(hidden_states=x, position_embeddings=positions, attention_mask=None)[0]
    assert largest(found - layer(x, position_embeddings=positions)) < TINY


@pytest.mark.parametrize("ka", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_fill_a_cache_gives_the_parallel_logits(family, ka):
    model, ids = convolved(family, ka), tokens(2, 10)
    want = parallel(model, ids)
    for sizes in ([1, 3, 1, 5], [1] * 10, [7, 1, 2]):
        for cache in (KACache(model.config), KAStaticCache(model.config, 13)):
            assert largest(run(model, ids.split(sizes, 1), cache) - want) < TINY


@pytest.mark.parametrize("ka", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", ["none", "growing", "static"])
def test_padding_on_either_side_changes_nothing(ka, kind):
    model, ids = convolved(ka=ka), tokens(2, 9)
    want = parallel(model, ids)
    padded, mask = F.pad(ids, (3, 0)), torch.ones(2, 12, dtype=torch.long)
    padded[1, :2], padded[1, 2:11], padded[1, 11] = 5, ids[1], 7
    mask[0, :3], mask[1, :2], mask[1, 11] = 0, 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if kind == "none":
        got = parallel(model, padded, attention_mask=mask, position_ids=positions)
    else:
        cache = KACache(model.config) if kind == "growing" else KAStaticCache(model.config, 12)
        pieces = []
        for start, end in ((0, 4), (4, 5), (5, 6), (6, 10), (10, 11), (11, 12)):
            inputs = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            pieces.append(run(model, [padded[:, start:end]], cache, **inputs))
        got = torch.cat(pieces, 1)
    assert largest(got[0, 3:] - want[0]) < TINY
    assert largest(got[1, 2:11] - want[1]) < TINY


@pytest.mark.parametrize("name", ["narrow", "windows"])
def test_padding_between_turns_counts_as_zeros(name):
    """Beyond it earlier tokens are read, also those that a narrow cache's masks have no column for."""
    model, ids = convolved(ka=CONFIGS[name]), tokens(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 3], mask[1, 5:7] = 0, 0
    positions = mask.cumsum(-1) - 1
    want = parallel(model, ids, attention_mask=mask, position_ids=positions)
    ids = torch.where(mask == 1, ids, 9)
    for cache in (KACache(model.config), KAStaticCache(model.config, 10)):
        for i in range(10):
            inputs = {"attention_mask": mask[:, : i + 1], "position_ids": positions[:, i : i + 1]}
            got = run(model, [ids[:, i : i + 1]], cache, **inputs)
            assert largest((got - want[:, i : i + 1])[mask[:, i] == 1]) < TINY


@pytest.mark.parametrize("ka", [CONFIGS["full"], CONFIGS["narrow"], CONFIGS["softmax"]])
def test_packed_sequences_do_not_read_each_other(ka):
    model, a, b = convolved(ka=ka), tokens(1, 5), tokens(1, 7, seed=3)
    ids, apart = torch.cat([a, b], 1), torch.cat([parallel(model, a), parallel(model, b)], 1)
    positions = {"position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None]}
    ends = {"cu_seq_lens_q": torch.tensor([0, 5, 12], dtype=torch.int32)}
    assert largest(parallel(model, ids, **positions) - apart) < TINY
    assert largest(parallel(model, ids, **positions, **ends) - apart) < TINY
    assert largest(parallel(model, ids, **ends) - apart) < 1e-5  # without a mask; angles are float32
    with pytest.raises(ValueError, match="attention_mask: convolutions of 12 tokens need"):
        parallel(model, ids, attention_mask=torch.ones(1, 2, 12, 12, dtype=torch.bool).tril())


@pytest.mark.parametrize("name", ["full", "narrow", "windows"])
def test_all_that_happens_to_caches(name):
    model, ids = convolved(ka=CONFIGS[name]), tokens()
    for check in (check_crop, check_reorder, check_batch, check_turns):
        assert check(model) < TINY
    assert check_batch(model, fixed) < TINY
    cache = KACache(model.config)
    run(model, [ids[:, :4]], cache)
    held = sum(x.numel() for layer in cache.layers for x in (layer.keys, layer.values))
    assert cache_bytes(cache) == 8 * (held + 3 * 2 * 3 * 64)
    kept, chosen, rows = copy.deepcopy(cache), copy.deepcopy(cache), torch.tensor([1, 1, 0])
    chosen.batch_select_indices(rows)
    assert largest(run(model, [ids[rows, 4:]], chosen) - parallel(model, ids[rows])[:, 4:]) < TINY
    run(model, [ids[:, :3]], cache)
    assert largest(run(model, [ids[:, 4:]], kept) - parallel(model, ids)[:, 4:]) < TINY


def test_tokens_are_taken_back_only_where_what_was_before_is_kept():
    model, ids = convolved(ka=KAConfig(convolution=4)), tokens()
    for cache in (KACache(model.config), fixed(model.config)):
        run(model, [ids[:, :5]], cache)
        cache.crop(0)
        with pytest.raises(RuntimeError, match=r"^crop: what convolutions read .* for 0 tokens, got 2; call activate"):
            cache.crop(-2)
    cache = KACache(model.config)
    cache.activate_past_recording()
    run(model, ids.split([3, 9], 1), cache)
    with pytest.raises(RuntimeError, match="kept for 12 tokens, got 13"):
        cache.crop(-13)


@pytest.mark.parametrize("settings", [
    {},
    {"num_beams": 3},
    {"do_sample": True, "num_return_sequences": 2},
    {"cache_implementation": "static"},
    {"prompt_lookup_num_tokens": 3},
    {"assistant_model": "narrow"},
], ids=str)  # fmt: skip
def test_generate_gives_what_it_gives_without_a_cache(settings):
    model = convolved()
    ids = tokens(1 if {"prompt_lookup_num_tokens", "assistant_model"} & settings.keys() else 2)
    if "assistant_model" in settings:
        settings = {"assistant_model": convolved(seed=1)}
        settings["assistant_model"].generation_config.assistant_confidence_threshold = 0
    ids = torch.cat([ids, ids[:, :6]], 1)
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        ids[1, :3], mask[1, :3] = 0, 0
    found = []
    for cached in (True, False):
        torch.manual_seed(3)
        of_caches = {"cache_implementation", "prompt_lookup_num_tokens", "assistant_model"}
        more = {name: x for name, x in settings.items() if cached or name not in of_caches}
        more = {"do_sample": False, "max_new_tokens": 12, "use_cache": cached, **more}
        found.append(model.generate(ids, attention_mask=mask, **more))
    assert torch.equal(*found)


def test_they_are_trained_checkpointed_compiled_and_copied():
    model, ids = convolved(ka=KAConfig(pattern="1:1", window=2, convolution=4, output_gate=True)), tokens()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(parallel(copied, ids), parallel(model, ids))
        assert all(m.q_proj._forward_hooks for m in attention_modules(copied))
    check_training(model, ids)
    assert all(m.ka_convolution.weight.grad.abs().sum() > 0 for m in attention_modules(model))


@pytest.mark.parametrize("name", ["full", "windows"])
def test_decoding_compiles_as_one_graph_that_is_not_made_again(name):
    model, ids = convolved(ka=CONFIGS[name]), tokens()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = KAStaticCache(model.config, 12 if name == "full" else 8)
    with torch.no_grad():
        outs = [model(ids[:, :4], past_key_values=cache).logits, compiled(ids[:, 4:5], past_key_values=cache).logits]
        where = [x.data_ptr() for layer in cache.layers for x in layer.tails.values()]
        with torch.compiler.set_stance("fail_on_recompile"):
            outs += [compiled(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5, 12)]
    assert largest(torch.cat(outs, 1) - parallel(model, ids)) < TINY
    cache.reset()
    assert where == [x.data_ptr() for layer in cache.layers for x in layer.tails.values()]


def test_gradients_through_a_cache_of_two_chunks():
    model, ids = convolved(), tokens()

    def gradients(chunks, cache):
        model.zero_grad()
        logits = torch.cat([model(chunk, past_key_values=cache).logits for chunk in chunks], 1)
        logits.sin().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    want = gradients([ids], None)
    got = gradients(ids.split([5, 7], 1), KACache(model.config))
    assert max(largest(a - b) for a, b in zip(got, want, strict=True)) < 1e-9


def test_they_are_saved_and_loaded(tmp_path):
    model, ids = convolved(), tokens()
    want = parallel(model, ids)
    model.save_pretrained(tmp_path / "model")
    save_adapter(model, tmp_path / "adapter")
    for kind in (AutoModelForCausalLM, type(model)):
        loaded = kind.from_pretrained(tmp_path / "model", dtype=torch.float64)
        assert torch.equal(parallel(loaded, ids), want)
    assert '"convolution": 4' in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    base = make("llama")
    before = parallel(base, ids)
    load_adapter(base, tmp_path / "adapter")
    assert torch.equal(parallel(base, ids), want)
    detach(base)
    assert torch.equal(parallel(base, ids), before)
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._forward_hooks_always_called for m in base.modules())
    assert not any(hasattr(m, "ka_convolution") or hasattr(m, "ka_reading") for m in base.modules())


def test_new_ones_are_drawn_and_may_be_made_the_identity(tmp_path):
    model = make("llama")
    before, ids = parallel(model, tokens()), tokens()
    attach(model, KAConfig(layers=(), convolution=4))
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config.to_dict()))
    without = {name: x for name, x in model.state_dict().items() if "ka_convolution" not in name}
    model.save_pretrained(tmp_path, state_dict=without)
    for each in (model, made, type(model).from_pretrained(tmp_path)):
        for module in attention_modules(each):
            weight = module.ka_convolution.weight
            assert weight.shape == (4, 64)
            assert 0.4 < weight.abs().max() <= 0.5
            assert largest(weight.mean()) < 0.1
    assert largest(parallel(model, ids) - before) > 0.1
    for module in attention_modules(model):
        module.ka_convolution.identity_()
    assert torch.equal(parallel(model, ids), before)


def test_reconfigure_keeps_them_for_those_who_ask():
    model, ids = convolved(), tokens()
    before, ka = parallel(model, ids), CONFIGS["narrow"].to_dict()
    cache = KACache(model.config)
    run(model, [ids[:, :4]], cache)
    reconfigure(model, KAConfig(**{**ka, "convolution": None}))
    plain = attach(make("llama"), KAConfig(pattern="1:1", window=2))
    assert torch.equal(parallel(model, ids), parallel(plain, ids))
    assert largest(run(model, ids.split([3, 9], 1), KACache(model.config)) - parallel(plain, ids)) < TINY
    with pytest.raises(RuntimeError, match="made for another ka_config"):
        run(model, [ids[:, 4:5]], cache)
    plain_cache = KACache(model.config)
    reconfigure(model, KAConfig(**ka))
    assert torch.equal(parallel(model, ids), before)
    with pytest.raises(RuntimeError, match="made for another ka_config"):
        run(model, [ids[:, :4]], plain_cache)
    for wrong, at in ((KAConfig(**{**ka, "convolution": 3}), model), (KAConfig(convolution=4), plain)):
        with pytest.raises(ValueError, match="ka: layer 0 has no such ka_convolution, which only"):
            reconfigure(at, wrong)


def test_nothing_is_left_of_a_call_that_fails():
    model, ids = convolved(), tokens()
    want, module = parallel(model, ids), attention_modules(model)[1]
    hook = module.k_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        parallel(model, ids)
    hook.remove()
    assert module.v_proj.ka_reading is None
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    assert torch.equal(module.v_proj(x), x @ module.v_proj.weight.mT)
    assert torch.equal(parallel(model, ids), want)
    cache = KACache(model.config)
    run(model, [ids[:, :4]], cache)
    with pytest.raises(RuntimeError):
        run(model, [ids[:1, 4:5]], cache)  # another batch
    assert largest(run(model, [ids[:, 4:]], cache) - want[:, 4:]) < TINY


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "phi3"])
def test_models_with_one_projection_for_all_are_refused(family):
    model, ids = make(family), tokens()
    before = parallel(model, ids)
    with pytest.raises(ValueError, match=r"^convolution: \w+ needs q_proj, k_proj, v_proj of"):
        attach(model, KAConfig(convolution=4))
    assert torch.equal(parallel(model, ids), before)


def test_caches_that_do_not_hold_what_is_read_are_refused():
    for layers in ((), None):
        model, ids = convolved(ka=KAConfig(layers=layers, convolution=4)), tokens()
        cache = DynamicCache(config=make("llama").config)
        assert torch.equal(run(model, [ids[:, :4]], cache), parallel(model, ids[:, :4]))
        for plain, chunk in ((cache, ids[:, 4:5]), (StaticCache(make("llama").config, max_cache_len=9), ids[:, :4])):
            with pytest.raises(RuntimeError, match="does not hold what convolutions read"):
                run(model, [chunk], plain)
    with pytest.raises(ValueError, match="cache: continuous batching does not hold what convolutions read"):
        attention_modules(model)[0](hidden_states=torch.zeros(1, 2, 32), attention_mask=None, cache=object())


def test_a_projection_that_takes_the_place_of_another_is_convolved():
    """Alone, or around the other one, which then is not."""

    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    model, ids = convolved(), tokens()
    modules = attention_modules(model)
    want = convolved()
    with torch.no_grad():
        for module in attention_modules(want):
            module.q_proj.weight *= 2
            module.v_proj.weight *= 3
    for module in modules:
        module.q_proj, kept = Twice(module.q_proj), module.v_proj
        module.v_proj = nn.Linear(32, 16, bias=False).double()
        module.v_proj.weight.data = 3 * kept.weight.data
    assert largest(parallel(model, ids) - parallel(want, ids)) < TINY
    assert check_turns(model) < TINY
    for module in modules:
        module.q_proj = module.q_proj.inner
    assert largest(parallel(model, ids) - parallel(want, ids)) > 1e-3
    detach(model)
    assert not any(m._forward_hooks for m in model.modules())


def test_what_else_is_refused(monkeypatch):
    model, ids = convolved(), tokens()
    with pytest.raises(ValueError, match="cache: continuous batching does not hold what convolutions read"):
        check_batching(model)
    module = attention_modules(model)[0]
    with pytest.raises(ValueError, match="tp_size: layers with a convolution keep their heads together"):
        layer_of_heads(module.ka_layer, model.config, 0, 2)
    with pytest.raises(ValueError, match="was given its mask or cache by position"):
        module(torch.randn(1, 2, 32).double(), None)
    wider = make("llama")
    attention_modules(wider)[1].v_proj = nn.Linear(32, 48)
    with pytest.raises(ValueError, match=r"q_proj, k_proj, v_proj of \(32, 16, 16\) channels, has \(32, 16, 48\)$"):
        attach(wider, KAConfig(convolution=4))
    with monkeypatch.context() as patch:
        patch.setattr(type(module), "forward", lambda self, hidden_states, mask=None, past_key_values=None: None)
        with pytest.raises(ValueError, match=r"takes its mask or cache by another name$"):
            attach(make("llama"), KAConfig(convolution=4))
    with monkeypatch.context() as patch:
        split = SimpleNamespace(cp_size=2, sp_size=1)
        patch.setitem(AcceleratorState._shared_state, "parallelism_config", split)
        with pytest.raises(ValueError, match=r"^parallelism_config: .*split sequences"):
            parallel(convolved(ka=KAConfig(layers=(), convolution=4)), ids)
    with pytest.raises(ValueError, match="convolution: 4 tokens are more than the model's own window of 3"):
        convolved("mistral", sliding_window=3)
    for wrong in (0, 1, True, 2.0, "4"):
        with pytest.raises(ValueError, match=r"^convolution: expected None or an integer >= 2, got"):
            KAConfig(convolution=wrong)
    bare = make("llama", attention="ka", ka_config={"convolution": 4})
    with pytest.raises(RuntimeError, match="asks for a convolution and layer 0 has none"):
        bare(ids)
