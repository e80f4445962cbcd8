"""The mask that a model means is the mask that counts: honoured, or refused in one line."""

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from test_cache import TINY, largest, parallel, run
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, Llama4TextConfig
from zoo import FAMILIES, SMALL, make, tokens

from ka_attention.hf import KACache, KAConfig, KAStaticCache, attach, attention_modules, register, use
from ka_attention.hf.attention import attention_forward

FUTURE = "attention_mask: it lets tokens attend to later ones"

HIDES = "attention_mask: it hides tokens within the sequences of cu_seq_lens_q"


def gemma3():
    torch.manual_seed(0)
    text = {**SMALL, **FAMILIES["gemma3_text"], "initializer_range": 0.3}
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=95, boi_token_index=93,
        eoi_token_index=94,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config).double().eval()


@pytest.mark.parametrize("cached", [False, True])
def test_images_that_see_themselves_are_honoured_at_gate_0_and_refused_elsewhere(cached):
    model, ids = gemma3(), tokens(1, 14).clamp(max=90)
    ids[:, 4:8] = 95
    torch.manual_seed(0)
    inputs = {
        "input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16).double(), "token_type_ids": (ids == 95).long()
    }  # fmt: skip
    with torch.no_grad():
        want = model(**inputs, use_cache=False).logits

        def logits():
            cache = {"past_key_values": KACache(model.config)} if cached else {"use_cache": False}
            return model(**inputs, **cache).logits

        for settings in ({"gate": 0}, {"layers": ()}, {"gate": 0, "window": 14}):
            with use(model, **settings):
                assert largest(logits() - want) < TINY
        for settings in ({}, {"gate": 0, "window": 4}, {"layers": (2,)}):
            with use(model, **settings), pytest.raises(ValueError, match=FUTURE):
                logits()


@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_that_is_to_look_both_ways(padded):
    """As softmax attention it may; nothing else does without a word what it was not asked for."""
    model, ids = make("llama"), tokens(2, 8)
    inputs = {"attention_mask": (torch.arange(8) > torch.tensor([[2], [-1]])).long()} if padded else {}
    want = parallel(model, ids, is_causal=False, **inputs)
    for settings in ({"gate": 0}, {"layers": ()}):
        with use(model, **settings):
            assert torch.equal(parallel(model, ids, is_causal=False, **inputs), want)
    for settings in ({}, {"gate": 0, "window": 4}, {"layers": (2,)}):
        with use(model, **settings), pytest.raises(ValueError, match="is_causal: KA-attention and its windows look"):
            parallel(model, ids, is_causal=False, **inputs)
    plain = make("llama", attention="ka")
    with pytest.raises(ValueError, match="is_causal: "):
        parallel(plain, ids, is_causal=False)


def test_four_dimensional_masks():
    model, ids = make("llama"), tokens(2, 8)
    everything = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    prefix = everything.tril() | (torch.arange(8) < 3)
    for mask in (everything, prefix):
        want = parallel(model, ids, attention_mask=mask)
        with use(model, layers=()):
            assert largest(parallel(model, ids, attention_mask=mask) - want) < TINY
            for cache in (KACache(model.config), KAStaticCache(model.config, 9)):
                padded = nn.functional.pad(mask, (0, 1)) if isinstance(cache, KAStaticCache) else mask
                assert largest(run(model, [ids], cache, attention_mask=padded) - want) < TINY
        for settings in ({}, {"window": 3}, {"gate": 0, "window": 3}, {"gate": "head"}):
            with use(model, **settings):
                for _ in range(2):
                    with pytest.raises(ValueError, match=FUTURE):
                        parallel(model, ids, attention_mask=mask)
    causal = everything.tril()
    with use(model, window=3):
        assert largest(parallel(model, ids, attention_mask=causal) - parallel(model, ids)) < TINY
        causal[0, 0, 2, 3] = True  # the tensor that was right before
        with pytest.raises(ValueError, match=FUTURE):
            parallel(model, ids, attention_mask=causal)


@pytest.mark.parametrize("static", [False, True])
def test_a_later_chunk_that_sees_the_future_of_itself(static):
    model, ids = make("llama"), tokens(1, 8)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    mask[..., 4:, 4:] = True
    want = parallel(model, ids, attention_mask=mask)
    later = nn.functional.pad(mask[:, :, 4:], (0, 2)) if static else mask[:, :, 4:]
    for settings in ({"layers": ()}, {}, {"window": 3}, {"gate": 0, "window": 3}):
        with use(model, **settings):
            cache = KAStaticCache(model.config, 10) if static else KACache(model.config)
            run(model, [ids[:, :4]], cache)
            if settings.get("layers") == ():
                assert largest(run(model, [ids[:, 4:]], cache, attention_mask=later) - want[:, 4:]) < TINY
            else:
                with pytest.raises(ValueError, match=FUTURE):
                    run(model, [ids[:, 4:]], cache, attention_mask=later)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gemma2"])
def test_softmax_in_a_window_by_the_operator_is_softmax_by_a_mask(family, monkeypatch):
    """Padding, packed sequences, chunks after a cache, capped scores, gradients: whichever way is taken."""
    model, ids = attach(make(family), KAConfig(gate_init=0.0, window=3)), tokens(2, 16)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ends = torch.tensor([0, 5, 16], dtype=torch.int32)
    positions = torch.cat([torch.arange(5), torch.arange(11)])[None]

    def everything():
        model.zero_grad()
        model(ids, use_cache=False, labels=ids).loss.backward()
        packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "position_ids": positions}
        return [
            parallel(model, ids),
            parallel(model, ids, attention_mask=mask)[mask.bool()],
            parallel(model, ids[:1], **packed),
            run(model, ids.split([2, 1, 9, 4], 1), KACache(model.config)),
            run(model, ids.split([2, 1, 9, 4], 1), KAStaticCache(model.config, 16)),
            *[p.grad.clone() for p in model.parameters()],
        ]

    want = everything()
    monkeypatch.setattr("ka_attention.hf.attention.SHORT", 0)
    called = []
    from ka_attention.hf import attention

    right = attention.ka_attention
    monkeypatch.setattr(attention, "ka_attention", lambda *a, **k: (called.append(k["gate"]), right(*a, **k))[1])
    for got, one in zip(everything(), want, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-9, atol=1e-10)
    assert set(called) == {0.0}


def test_masks_that_hide_tokens_of_packed_sequences():
    """Ends and a mask that says more: the operator takes ends alone, so KA layers refuse it; others honour both."""
    ids, ends = tokens(1, 12), torch.tensor([0, 7, 12], dtype=torch.int32)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    seen[5:7, :2] = False
    apart = seen.clone()
    apart[7:, :7] = False
    padding = (torch.arange(12) > 3).long()[None]
    packed = {"position_ids": positions, "cu_seq_lens_q": ends}
    for ka in (KAConfig(), KAConfig(window=6)):
        model = attach(make("llama"), ka)
        compiled = torch.compile(model, backend="eager")
        for mask in (seen[None, None], padding):
            with pytest.raises(ValueError, match=HIDES):
                parallel(model, ids, attention_mask=mask, **packed)
            with pytest.raises(RuntimeError, match=HIDES):
                parallel(compiled, ids, attention_mask=mask, **packed)
        want = parallel(model, ids, **packed)
        whole = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
        for _ in range(2):
            assert torch.equal(parallel(model, ids, attention_mask=whole, **packed), want)
        whole[..., 3, 2] = False  # it was looked at before
        with pytest.raises(ValueError, match=HIDES):
            parallel(model, ids, attention_mask=whole, **packed)
    model = attach(make("llama"), KAConfig(gate_init=0.0))
    want = parallel(model, ids, attention_mask=apart[None, None], position_ids=positions)
    assert largest(parallel(model, ids, attention_mask=seen[None, None], **packed) - want) < TINY
    with use(llama4()) as model, pytest.raises(ValueError, match=HIDES):
        parallel(model, ids, **packed)


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_packed_sequences_keep_the_narrower_of_two_windows(gate):
    model = attach(make("mistral", sliding_window=3), KAConfig(gate_init=gate, window=8))
    ids, ends = tokens(1, 300), torch.arange(0, 301, 100, dtype=torch.int32)
    want = torch.cat([parallel(model, part) for part in ids.split(100, 1)], 1)
    found = parallel(model, ids, position_ids=torch.arange(100).repeat(3)[None], cu_seq_lens_q=ends)
    assert largest(found - want) < TINY


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_compiled_code_refuses_biases_too(gate):
    compiled = torch.compile(attach(make("llama"), KAConfig(gate_init=gate)), backend="eager")
    for bias in (-0.5, -1e9):
        mask = torch.full((6, 6), bias, dtype=torch.float64).tril(-3) + torch.full((6, 6), -torch.inf).double().triu(1)
        with pytest.raises(RuntimeError, match="additive"):
            parallel(compiled, tokens(1, 6), attention_mask=mask[None, None])


def test_arguments_come_in_the_order_of_transformers():
    """As libraries call attention functions that wrap them all: dropout sixth, then the scale."""
    module = attention_modules(attach(make("llama")))[0]
    q, k, v = torch.randn(3, 1, 4, 6, 8, dtype=torch.float64)
    want = attention_forward(module, q, k, v, None, scaling=0.3)[0]

    def wrapped(*args, **kwargs):
        return attention_forward(*args, **kwargs)

    assert torch.equal(wrapped(module, q, k, v, None, 0.0, 0.3)[0], want)
    assert torch.equal(wrapped(module, q, k, v, None, 0.0, scaling=0.3)[0], want)
    assert not torch.equal(wrapped(module, q, k, v, None, 0.0)[0], want)
    with pytest.raises(ValueError, match="attention_dropout"):
        wrapped(module, q, k, v, None, 0.3)


@pytest.mark.parametrize("split", ["cp_size", "sp_size"])
def test_sequences_split_over_processes_are_refused(split, monkeypatch):
    """As the state of accelerate tells, which no field of the model does. Softmax layers are its own affair."""
    config = ParallelismConfig()
    setattr(config, split, 2)
    model, ids = make("llama"), tokens()
    want = parallel(model, ids)
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", config)
    for settings in ({}, {"window": 3, "gate": 0}):
        with use(model, **settings), pytest.raises(ValueError, match=r"^parallelism_config: .*split sequences"):
            parallel(model, ids)
    with use(model, layers=()):
        assert torch.equal(parallel(model, ids), want)


def llama4():
    register()
    size = dict(SMALL, num_key_value_heads=2, head_dim=8, intermediate_size_mlp=48, num_local_experts=2)
    size |= {
        "num_hidden_layers": 4,
        "attention_chunk_size": 6,
        "initializer_range": 0.3,
        "attn_temperature_tuning": False,
    }
    config = Llama4TextConfig(**size)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double().eval()


def test_chunked_attention():
    """Llama 4: its layers with chunks decode as they compute whole; a window of KA in them is refused."""
    model, ids = llama4(), tokens(2, 16)
    chunked = {i for i, kind in enumerate(model.config.layer_types) if kind == "chunked_attention"}
    assert chunked == {0, 1, 2}
    for settings in ({}, {"gate": 0}, {"layers": (3,), "window": 4}):
        with use(model, **settings):
            want = parallel(model, ids)
            for sizes in ([1] * 16, [5, 1, 4, 6]):
                assert (
                    largest(run(model, ids.split(sizes, 1), KACache(model.config)) - want) < 1e-5
                )  # rotates in float32
    for ka in (KAConfig(window=4), KAConfig(layers=(1,), window=2, gate_init=0.0)):
        with pytest.raises(ValueError, match=r"^window: layer \d of .* attends in chunks"):
            attach(model, ka)
