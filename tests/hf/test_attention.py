"""The attention function: agreement with the definition, masks, layers, gates, adapters, training, clear refusals."""

import pytest
import torch
from definition import install
from torch import nn
from transformers import DynamicCache, StaticCache, Trainer, TrainingArguments
from zoo import FAMILIES, make, tokens

from ka_attention.hf import KACache, KAConfig, KAGate, attach, attention_modules, detach, register, use
from ka_attention.hf.attention import attention_forward

CONFIGS = [KAConfig(), KAConfig(window=3), KAConfig(layers=(1,), window=2), KAConfig(gate_init=0.0, window=3)]


def parallel(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, use_cache=False, **inputs).logits


def largest(difference):
    return difference.abs().max().item()


@pytest.mark.parametrize("ka", CONFIGS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_the_definition(family, ka):
    model, ids = attach(make(family), ka), tokens()
    truth = make(family, attention=install(ka, ka.gate_init))
    assert largest(parallel(model, ids) - parallel(truth, ids)) < 1e-11
    assert largest(parallel(model, ids) - parallel(make(family), ids)) > 0.1


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_padding_changes_nothing_for_real_tokens(family):
    """Pad queries attend nothing: their rows are 0, nobody reads them, and gradients stay finite."""
    model, ids = attach(make(family), KAConfig(window=4)), tokens(1, 9)
    alone = parallel(model, ids)
    for pads in ((3, 0), (0, 3)):
        padded = nn.functional.pad(ids, pads, value=5)
        mask = nn.functional.pad(torch.ones_like(ids), pads)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        real = slice(pads[0], pads[0] + 9)
        inputs = {"attention_mask": mask, "position_ids": positions}
        assert largest(parallel(model, padded, **inputs)[:, real] - alone) < 1e-11
        model.zero_grad()
        model(padded, use_cache=False, labels=padded.masked_fill(mask == 0, -100), **inputs).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_additive_masks_are_read_as_boolean_ones_and_biases_refused():
    model, ids = attach(make("llama")), tokens(1, 6)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril() & (torch.arange(6) != 2)
    boolean = parallel(model, ids, attention_mask=allowed[None, None])
    for minus in (float("-inf"), torch.finfo(torch.float64).min):
        additive = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~allowed, minus)[None, None]
        assert torch.equal(parallel(model, ids, attention_mask=additive), boolean)
    assert largest(boolean - parallel(model, ids)) > 0.1
    with pytest.raises(ValueError, match="additive"):
        parallel(model, ids, attention_mask=torch.full((1, 1, 6, 6), -0.5, dtype=torch.float64))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("how", [{}, {"layers": (1,)}, {"layers": (1,), "window": 3}, {"adapter": True}], ids=str)
def test_packed_sequences_do_not_see_each_other(family, how):
    """By their positions, as transformers makes a mask of them, and by their ends, whatever else there is."""
    how = dict(how)
    adapter = (lambda i: nn.Linear(8, 8)) if how.pop("adapter", None) else None
    torch.manual_seed(0)
    model, a, b = attach(make(family), KAConfig(**how), adapter).double(), tokens(1, 5), tokens(1, 7, seed=3)
    packed, positions = torch.cat([a, b], 1), torch.cat([torch.arange(5), torch.arange(7)])[None]
    apart = torch.cat([parallel(model, a), parallel(model, b)], 1)
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    flash = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}
    positions = {"position_ids": positions}
    assert largest(parallel(model, packed, **positions) - apart) < 1e-11
    with torch.no_grad():
        for cache in (None, KACache(model.config)):
            found = model(packed, **positions, **flash, past_key_values=cache, use_cache=cache is not None).logits
            assert largest(found - apart) < 1e-11
        with pytest.raises(ValueError, match="cu_seq_lens_q: packed sequences cannot continue a cache"):
            model(packed, **positions, **flash, past_key_values=cache)


def test_softmax_layers_are_bit_exact_scaled_dot_product_attention():
    for family in ("gpt_neox", "llama", "qwen3"):
        model, ids = make(family), tokens()
        before = parallel(model, ids)
        with use(model, gate=0):
            assert torch.equal(parallel(model, ids), before)
        with use(model, layers=()):
            assert torch.equal(parallel(model, ids), before)


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_softmax_layers_prefill_a_static_cache_of_transformers(family):
    """Its buffers are longer than the prompt, whose mask may be None: the first tokens are read causally."""
    model, ids = attach(make(family), KAConfig(layers=())), tokens(2, 6)
    with torch.no_grad():
        found = model(ids, past_key_values=StaticCache(model.config, 10)).logits
    assert largest(found - parallel(model, ids)) < 1e-11


def test_capped_softmax_layers_drop_weights_in_training_and_ignore_padding():
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    model = attach(make("gemma2"), KAConfig(layers=()))
    layer = attention_modules(model)[0]

    def run(mask=None, dropout=0.0):
        return attention_forward(layer, q, k, v, mask, softcap=2.0, dropout=dropout)[0].transpose(1, 2)

    hidden = torch.ones(5, 5, dtype=torch.bool).tril()[None, None] & (torch.arange(5) != 0)
    assert torch.equal(run(hidden)[:, :, 0], torch.zeros(1, 2, 4))  # a row that may attend nothing is 0
    torch.testing.assert_close(run(hidden)[:, :, 1], v[:, :, 1])
    torch.manual_seed(0)
    dropped = torch.stack([run(dropout=0.5) for _ in range(2000)])
    assert largest(dropped[0] - run()) > 0.1
    assert largest(dropped.mean(0) - run()) < 6 * dropped.std(0).max() / 2000**0.5


def test_detach_restores_every_bit_and_the_configuration():
    model, ids = make("gemma3_text"), tokens()
    config, before = model.config, parallel(model, ids)
    keys = set(model.state_dict())
    attach(model, KAConfig(gate="token", gate_init=0.5))
    assert model.config is not config
    assert set(model.state_dict()) > keys
    detach(model)
    assert model.config is config
    assert set(model.state_dict()) == keys
    assert torch.equal(parallel(model, ids), before)
    with pytest.raises(ValueError, match="not attached"):
        detach(model)


def test_attach_leaves_other_models_of_the_same_configuration_alone():
    model = make("llama")
    twin = type(model)(model.config).double().eval()
    attach(model)
    assert twin.config._attn_implementation == "sdpa"
    assert not hasattr(twin.config, "ka_config")


@pytest.mark.parametrize("kind", ["head", "token"])
def test_learned_gates(kind):
    """They start at gate_init, content moves those of tokens, and gradients reach them within their bounds."""
    ids = tokens()
    model = attach(make("llama"), KAConfig(gate=kind, gate_init=0.5)).double()
    fixed = attach(make("llama"), KAConfig(gate_init=0.5))
    assert largest(parallel(model, ids) - parallel(fixed, ids)) < 1e-11
    gates = [m.ka_gate for m in attention_modules(model)]
    for gate in gates:
        gate.bias.data.fill_(1.7)
    assert largest(parallel(model, ids) - parallel(attach(make("llama")), ids)) < 1e-11
    for gate in gates:
        gate.bias.data.fill_(0.5)
    if kind == "token":
        for gate in gates:
            gate.weight.data.normal_()
        assert largest(parallel(model, ids) - parallel(fixed, ids)) > 0.1
    model(ids, use_cache=False, labels=ids).loss.backward()
    assert all(p.grad.abs().sum() > 0 for gate in gates for p in gate.parameters())
    model.zero_grad()
    model(
        ids[:, :1], use_cache=False
    ).logits.sum().backward()  # DistributedDataParallel waits for gradients of them all
    assert all(p.grad is not None and not p.grad.any() for gate in gates for p in gate.parameters())


def test_gates_reach_their_bounds_exactly():
    gate = KAGate(3, 0.0, (-1.0, 1.0))
    gate.bias.data = torch.tensor([-7.0, 0.3, 2.0])
    assert torch.equal(gate(torch.zeros(1, 3, 1, 2)), torch.tensor([-1.0, 0.3, 1.0]))


def test_beyond_a_bound_gates_learn_only_to_come_back():
    gate = KAGate(3, 0.0, (0.0, 1.0), head_dim=2)
    gate.bias.data = torch.tensor([-0.2, 0.3, 1.0])
    v = torch.zeros(1, 3, 1, 2, requires_grad=True)
    gate.weight.data.fill_(1.0)
    for sign, moves in ((1.0, [False, True, True]), (-1.0, [True, True, False])):
        v.grad = gate.bias.grad = None
        (sign * gate(v)).sum().backward()
        assert [bool(x) for x in gate.bias.grad] == moves
        assert [bool(x.any()) for x in v.grad[0]] == moves


def test_an_adapter_that_the_configuration_alone_knows_is_an_error():
    model = make("llama", attention="ka", ka_config=KAConfig(adapters={"1": {"kind": "linear"}}).to_dict())
    with pytest.raises(RuntimeError, match=r"ka_config has an adapter for layer 1, .* ka_attention.hf.attach"):
        model(tokens())


def test_a_missing_gate_is_an_error():
    register()
    model = make("llama", attention="ka", ka_config={"gate": "head"})
    with pytest.raises(RuntimeError, match="has none"):
        model(tokens())


def test_an_adapter_stands_in_the_recurrence():
    """With the identity nothing changes; a linear map changes what later tokens read, with and without a cache."""
    model, ids = make("llama"), tokens()
    with use(model, gate=0.5, window=5):
        plain = parallel(model, ids)
    with use(model, gate=0.5, window=5, adapter=lambda i: nn.Identity()):
        assert largest(parallel(model, ids) - plain) < 1e-11
    torch.manual_seed(0)
    adapters = {1: nn.Linear(8, 8).double()}
    with use(model, gate=0.5, window=5, adapter=adapters):
        outputs = model(ids, use_cache=False).logits
        assert largest(outputs.detach() - plain) > 0.1
        outputs.square().sum().backward()
        assert adapters[1].weight.grad.abs().sum() > 0
        cache = KACache(model.config)
        with torch.no_grad():
            chunks = [model(chunk, past_key_values=cache).logits for chunk in ids.split([4, 1, 1, 6], 1)]
        assert largest(torch.cat(chunks, 1) - outputs) < 1e-11


def test_an_adapter_has_each_token_s_own_gate():
    model, ids = make("llama"), tokens()
    outs = []
    for adapter in (None, lambda i: nn.Identity()):
        with use(model, gate="token", gate_init=0.5, adapter=adapter):
            torch.manual_seed(0)
            for module in attention_modules(model):
                module.ka_gate.double().weight.data.normal_()
            outs.append(parallel(model, ids))
    assert largest(outs[0] - outs[1]) < 1e-11


def test_stock_trainer_with_checkpointing_and_mixed_precision(tmp_path):
    """The stock Trainer runs; gradient checkpointing gives the same losses; bfloat16 autocast stays close."""
    data = [{"input_ids": row, "labels": row} for row in tokens(16, 24)]

    def losses(checkpointing=False, **settings):
        model = attach(make("gpt_neox", initializer_range=0.02).float(), KAConfig(window=6, gate="head", gate_init=0.5))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        arguments = TrainingArguments(
            tmp_path, max_steps=3, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1, seed=0,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, **settings,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        assert all((m.ka_gate.bias != 0.5).all() for m in attention_modules(model))
        return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

    plain = losses()
    assert plain[-1] < plain[0]
    assert torch.equal(losses(checkpointing=True), plain)
    assert largest(losses(bf16=True) - plain) < 0.02


def test_autocast_does_not_reach_the_weights():
    """Under bfloat16 autocast the softmax is float32: the error stays within that of bfloat16 inputs."""
    model, ids = attach(make("llama", initializer_range=0.02).float()), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        low = parallel(model, ids)
        cache = KACache(model.config)
        with torch.no_grad():
            steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(12)]
    assert largest(low - parallel(model, ids)) < 0.01
    assert largest(torch.cat(steps, 1) - low) < 0.01


def test_refusals():
    model, ids = attach(make("gpt_neox", attention_dropout=0.1)), tokens()
    model.train()
    with pytest.raises(ValueError, match="attention_dropout"):
        model(ids)
    model.eval()
    for name in ("s_aux", "sinks", "position_bias", "block_indices"):
        with pytest.raises(ValueError, match=name):
            model(ids, **{name: torch.zeros(1)})
    with pytest.raises(ValueError, match="already"):
        attach(model)
    with pytest.raises(ValueError, match="layers 0 to 2, got"):
        attach(make("gpt_neox"), KAConfig(layers=(3,)))
    with pytest.raises(ValueError, match="not both"), use(make("gpt_neox"), KAConfig(), window=3):
        pass


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": ("a",)},
        {"layers": 3},
        {"layers": (-1,)},
        {"window": 0},
        {"window": True},
        {"gate": "row"},
        {"gate_init": "1"},
        {"gate_init": 1.5},
        {"gate_range": (0,)},
        {"gate_range": 0.5},
        {"adapters": {"x": {}}},
        {"adapters": {"1": 2}},
    ],
    ids=str,
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=rf"^[a-z_, ]*{next(iter(wrong))}[a-z_, ]*: expected .*, got .*$"):
        KAConfig(**wrong)


@pytest.mark.parametrize(
    ("stored", "message"),
    [({"gait": 1}, r"^ka_config: unknown settings \['gait'\]"), ({"layers": [1, 9]}, r"^layers: .*, got \[9\]")],
)
def test_a_wrong_stored_configuration_is_named(stored, message):
    model = make("llama", attention="ka", ka_config=stored)
    with pytest.raises(ValueError, match=message):
        model(tokens())


def test_wrong_pairings_raise():
    model, ids = attach(make("llama")), tokens()
    plain = DynamicCache(config=model.config)
    model(ids, past_key_values=plain)
    with pytest.raises(RuntimeError, match="plain cache"):
        model(ids[:, :1], past_key_values=plain)
    cache, other = KACache(model.config), KACache(model.config)
    detach(model)
    with pytest.raises(RuntimeError, match='attn_implementation="ka"'):
        model(ids, past_key_values=cache)
    with use(model, layers=(0,)), pytest.raises(RuntimeError, match="another ka_config"):
        model(ids, past_key_values=other)


def test_output_attentions_is_refused():
    model = attach(make("llama"))
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens(), output_attentions=True)
