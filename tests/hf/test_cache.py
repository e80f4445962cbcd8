"""The KA cache against the parallel operator, at the logits: all ways to fill it and all operations."""

import copy

import pytest
import torch
from transformers import DynamicCache
from zoo import FAMILIES, make, tokens

from ka_attention.hf import KACache, KAConfig, KAStaticCache, attach, bytes_per_token, cache_bytes

TINY = 1e-11  # float64: rounding only
CONFIGS = [
    KAConfig(),
    KAConfig(window=3),
    KAConfig(window=1),
    KAConfig(layers=(0,), window=3),  # softmax layers see more than the KA layer
    KAConfig(layers=(1,)),
    KAConfig(layers=(0, 2), gate_init=0.0, window=4),
    KAConfig(gate="token", gate_init=0.5),
]


def run(model, chunks, cache, **inputs):
    with torch.no_grad():
        return torch.cat([model(chunk, past_key_values=cache, **inputs).logits for chunk in chunks], dim=1)


def parallel(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, use_cache=False, **inputs).logits


def largest(difference):
    return difference.abs().max().item()


def attached(family, ka, **settings):
    model = attach(make(family, **settings), ka).double()
    for name, parameter in model.named_parameters():
        if name.endswith("ka_gate.weight"):
            parameter.data.normal_()
    return model


@pytest.mark.parametrize("ka", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_fill_the_cache_gives_the_parallel_logits(family, ka):
    model, ids = attached(family, ka), tokens()
    want = parallel(model, ids)
    for sizes in ([1] * 12, [5, 1, 1, 3, 2], [1, 11]):
        for cache in (KACache(model.config), KAStaticCache(model.config, 15)):
            assert largest(run(model, ids.split(sizes, 1), cache) - want) < TINY


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("family", "ka"), [("gemma3_text", KAConfig(layers=(0, 2), window=4)), ("llama", KAConfig())])
def test_a_left_padded_row_is_the_row_alone(family, ka, static):
    model = attached(family, ka)
    ids = tokens(2, 9)
    want = parallel(model, ids)
    padded = torch.nn.functional.pad(ids, (3, 0))
    padded[1, :2], padded[1, 2:11], padded[1, 11] = 0, ids[1], 7  # rows with different amounts of padding
    mask = torch.ones_like(padded)
    mask[0, :3], mask[1, :2] = 0, 0
    cache = KAStaticCache(model.config, 12) if static else KACache(model.config)
    outputs = []
    for start, end in ((0, 6), (6, 7), (7, 10), (10, 11), (11, 12)):
        positions = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:end]
        with torch.no_grad():
            step = model(
                padded[:, start:end], attention_mask=mask[:, :end], position_ids=positions, past_key_values=cache
            )
        outputs.append(step.logits)
    got = torch.cat(outputs, 1)
    assert largest(got[0, 3:] - want[0]) < TINY
    assert largest(got[1, 2:11] - want[1]) < TINY


def fixed(config):
    return KAStaticCache(config, 12)


def check_crop(model, make_cache=KACache):
    """Go too far, take back, go on otherwise."""
    ids, wrong = tokens(2, 12), tokens(2, 4, seed=5)
    cache = make_cache(model.config)
    if make_cache is KACache:
        cache.activate_past_recording()
    run(model, [ids[:, :7]], cache)
    cache.crop(0)
    run(model, [wrong[:, :3], wrong[:, 3:]], cache)
    cache.crop(-4)
    return largest(run(model, ids[:, 7:].split([2, 1, 2], 1), cache) - parallel(model, ids)[:, 7:])


def check_reorder(model):
    """Beams swap places: the cache of each row is that of the row it came from."""
    ids, order = tokens(3, 10), torch.tensor([2, 0, 0])
    cache = KACache(model.config)
    run(model, [ids[:, :6]], cache)
    cache.reorder_cache(order)
    swapped = torch.cat([ids[order, :6], ids[:, 6:]], 1)
    return largest(run(model, ids[:, 6:].split([1, 3], 1), cache) - parallel(model, swapped)[:, 6:])


def check_decode(model):
    ids = tokens()
    return largest(run(model, ids.split(1, 1), KACache(model.config)) - parallel(model, ids))


@pytest.mark.parametrize("ka", [KAConfig(), KAConfig(window=4), KAConfig(layers=(1,), window=4)], ids=range(3))
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "mistral", "gemma3_text"])
def test_crop_and_reorder(family, ka):
    model = attached(family, ka)
    assert check_crop(model) < TINY
    assert check_reorder(model) < TINY
    if any(layer.is_ring for layer in fixed(model.config).layers):
        with pytest.raises(ValueError, match=r"^crop: expected .* no window, .*, got -4"):
            check_crop(model, fixed)
    else:
        assert check_crop(model, fixed) < TINY


def check_batch(model, make_cache=KACache):
    """Rows are repeated and chosen: each goes on from its own past."""
    ids, cache = tokens(2, 12), make_cache(model.config)
    run(model, [ids[:, :4]], cache)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([1, 4]))
    return largest(run(model, [ids[:, 4:]], cache) - parallel(model, ids)[:, 4:])


def check_training(model, ids):
    """Gradients of all parameters; the same from checkpoints of layers, and the same logits compiled as one graph."""

    def gradients():
        model.zero_grad()
        model(ids, use_cache=False, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    want = gradients()
    model.train()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert all(torch.equal(a, b) for a, b in zip(gradients(), want, strict=True))
    model.gradient_checkpointing_disable()
    model.eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert largest(parallel(compiled, ids) - parallel(model, ids)) < TINY


def check_turns(model):
    """A second and a third turn, of several tokens each, on what the first left in the cache; then the same again."""
    ids, error = tokens(), 0.0
    for cache in (KACache(model.config), KAStaticCache(model.config, 12)):
        for _ in range(2):
            cache.reset()
            error = max(error, largest(run(model, ids.split([5, 1, 6], 1), cache) - parallel(model, ids)))
    return error


@pytest.mark.parametrize("ka", [KAConfig(), KAConfig(window=5)], ids=["full", "window"])
def test_repeat_select_reset_copy_and_several_turns(ka):
    model, ids = attached("llama", ka), tokens()
    assert check_batch(model) < TINY
    assert check_batch(model, fixed) < TINY
    assert check_turns(model) < TINY
    cache = KACache(model.config)
    run(model, [ids[:, :4]], cache)
    kept = copy.deepcopy(cache)
    run(model, [ids[:, :3]], cache)
    assert largest(run(model, [ids[:, 4:]], kept) - parallel(model, ids)[:, 4:]) < TINY


@pytest.mark.parametrize("looks", [False, True])  # who reads values makes U take V's place at once
@pytest.mark.parametrize("ka", [KAConfig(), KAConfig(window=3, gate="token", gate_init=0.5)], ids=["full", "window"])
def test_gradients_through_a_cache_of_two_chunks(ka, looks):
    model, ids = attached("llama", ka), tokens()

    def gradients(chunks, cache):
        model.zero_grad()
        parts = []
        for chunk in chunks:
            parts.append(model(chunk, past_key_values=cache, use_cache=cache is not None).logits)
            if looks and cache is not None:
                assert all(layer.values.requires_grad for layer in cache.layers)
        logits = torch.cat(parts, 1)
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    want = gradients([ids], None)
    for sizes in ([5, 7], [1, 2, 1, 8]):
        got = gradients(ids.split(sizes, 1), KACache(model.config))
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(got, want, strict=True))


def test_sizes():
    """What a cache holds: Hkv + Hq heads a token, the last w − 1 tokens in layers with a window."""
    model, ids = attached("llama", KAConfig()), tokens(2, 9)
    cache, plain = KACache(model.config), DynamicCache(config=model.config)
    run(model, [ids], cache)
    run(model, [ids], plain)
    assert cache_bytes(cache) == 2 * 9 * bytes_per_token(model.config, "ka", torch.float64) == 2 * 9 * 3 * 6 * 8 * 8
    assert cache_bytes(plain) == 2 * 9 * bytes_per_token(model.config, "kv", torch.float64)
    assert bytes_per_token(model.config, "kv") == 3 * 4 * 8 * 4

    model = attached("gpt_neox", KAConfig(layers=(1,), window=4))
    cache = KACache(model.config)
    run(model, ids.split([6, 1, 2], 1), cache)
    assert [layer.values.shape[2] for layer in cache.layers] == [9, 3, 9]
    assert [layer.keys.shape[2] for layer in cache.layers] == [9, 3, 9]
    static = KAStaticCache(model.config, 20)
    run(model, ids.split([6, 1, 2], 1), static)
    assert [layer.values.shape[2] for layer in static.layers] == [20, 4, 20]

    model = attached("gpt_neox", KAConfig(gate_init=0.0, window=4))  # softmax in a window: V of key heads, w − 1 tokens
    cache = KACache(model.config)
    run(model, [ids], cache)
    assert cache_bytes(cache) == 2 * 3 * bytes_per_token(model.config, "kv", torch.float64)


def test_refusals():
    config = attached("llama", KAConfig()).config
    for cache in (KACache, lambda c, **k: KAStaticCache(c, 8, **k)):
        with pytest.raises(ValueError, match="offloaded"):
            cache(config, offloading=True)
    with pytest.raises(ValueError, match="'kv' or 'ka'"):
        bytes_per_token(config, "x")
    for length in (0, -1):
        with pytest.raises(ValueError, match=f"^max_cache_len: expected at least 1, got {length}"):
            KAStaticCache(config, length)


KA_LAYER = [KAConfig(), KAConfig(window=4), KAConfig(layers=(1,), window=4), KAConfig(gate_init=0.5)]


@pytest.mark.parametrize("ka", KA_LAYER, ids=range(len(KA_LAYER)))
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_who_reads_the_values_between_steps_finds_what_later_tokens_read(family, ka):
    """After each step: of the heads and tokens that one parallel pass leaves; looking changes nothing."""
    model, ids = attached(family, ka), tokens()
    looked, alone = KACache(model.config), KACache(model.config)
    for start, end in ((0, 1), (1, 5), (5, 6), (6, 7), (7, 10), (10, 12)):
        logits = [run(model, [ids[:, start:end]], cache) for cache in (looked, alone)]
        assert largest(logits[0] - logits[1]) < TINY  # not to the bit: what was in a ring is put in order
        whole = KACache(model.config)
        run(model, [ids[:, :end]], whole)
        assert cache_bytes(looked) == cache_bytes(whole)
        for got, want in zip(looked.layers, whole.layers, strict=True):
            assert largest(got.values - want.values) < TINY
            assert got.values is got.values


@pytest.mark.parametrize("ka", KA_LAYER[:2], ids=["full", "window"])
@pytest.mark.parametrize("change", ["crop", "reorder", "repeat", "select", "copy", "reset"])
def test_a_cache_may_be_changed_right_after_a_step(change, ka):
    model, ids = attached("llama", ka), tokens(2, 9)
    cache, rows, kept = KACache(model.config), torch.arange(2), 6
    cache.activate_past_recording()
    run(model, ids[:, :6].split([4, 1, 1], 1), cache)
    match change:
        case "crop":
            cache.crop(-1)
            kept = 5
        case "reorder":
            rows = torch.tensor([1, 0])
            cache.reorder_cache(rows)
        case "repeat":
            rows = torch.tensor([0, 0, 1, 1])
            cache.batch_repeat_interleave(2)
        case "select":
            rows = torch.tensor([1])
            cache.batch_select_indices(rows)
        case "copy":
            other = copy.deepcopy(cache)
            run(model, [tokens(2, 2, seed=7)], cache)  # the copy does not see what the cache goes on with
            cache = other
        case "reset":
            cache.reset()
            kept = 0
    got = run(model, ids[rows, kept:].split(1, 1), cache)
    assert largest(got - parallel(model, ids[rows])[:, kept:]) < TINY
