"""The KA cache against the parallel operator, at the logits: all ways to fill it and all operations."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache
from zoo import FAMILIES, make, tokens

from ka_attention.hf import KACache, KAConfig, KAStaticCache, attach, bytes_per_token, cache_bytes
from ka_attention.hf.adapters import LinearAdapter
from ka_attention.hf.cache import KADynamicLayer

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


@pytest.mark.parametrize("ka", [KAConfig(), KAConfig(window=3, gate="token", gate_init=0.5)], ids=["full", "window"])
def test_gradients_through_a_cache_of_two_chunks(ka):
    model, ids = attached("llama", ka), tokens()

    def gradients(chunks, cache):
        model.zero_grad()
        logits = torch.cat([model(c, past_key_values=cache, use_cache=cache is not None).logits for c in chunks], 1)
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    want = gradients([ids], None)
    for sizes in ([5, 7], [1, 2, 1, 8]):
        got = gradients(ids.split(sizes, 1), KACache(model.config))
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(got, want, strict=True))


def test_a_forward_pass_that_fails_half_way_is_noticed():
    model, cache = attached("llama", KAConfig()), None
    cache = KACache(model.config)
    cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    with pytest.raises(RuntimeError, match="never committed"):
        run(model, [tokens(1, 1)], cache)


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
    cache = KAStaticCache(config, 4)
    with pytest.raises(IndexError):
        run(attached("llama", KAConfig()), [tokens(1, 5), tokens(1, 1)], cache)


KA_LAYER = [KAConfig(), KAConfig(window=4), KAConfig(layers=(1,), window=4), KAConfig(gate_init=0.5)]


@pytest.mark.parametrize("ka", KA_LAYER, ids=range(len(KA_LAYER)))
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_who_reads_the_values_between_steps_finds_what_later_tokens_read(family, ka):
    """After each step: of the heads and tokens that one parallel pass leaves; looking changes nothing."""
    model, ids = attached(family, ka), tokens()
    looked, alone = KACache(model.config), KACache(model.config)
    for start, end in ((0, 1), (1, 5), (5, 6), (6, 7), (7, 10), (10, 12)):
        logits = [run(model, [ids[:, start:end]], cache) for cache in (looked, alone)]
        assert torch.equal(*logits)
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


@pytest.fixture
def few_slots(monkeypatch):
    """Buffers of growing caches fill up soon."""
    monkeypatch.setattr("ka_attention.hf.cache.SPARE", 4)
    monkeypatch.setattr("ka_attention.hf.cache.KAWindowLayer.spare", 4)


@pytest.mark.parametrize("ka", CONFIGS[:5], ids=range(5))
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "mistral", "gemma3_text"])
def test_a_cache_grows_through_several_buffers(family, ka, few_slots):
    model, ids = attached(family, ka), tokens(2, 24)
    want = parallel(model, ids)
    for sizes in ([1] * 24, [3] + [1] * 6 + [4] + [1] * 11):
        assert largest(run(model, ids.split(sizes, 1), KACache(model.config)) - want) < TINY


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("window", [None, 4, 5])
def test_most_steps_copy_nothing(family, window, few_slots):
    """They write where the step before did, so that a buffer serves several steps, in windows too."""
    model, ids = attached(family, KAConfig(window=window)), tokens(1, 24)
    cache, buffers = KACache(model.config), []
    for token in ids.split(1, 1):
        run(model, [token], cache)
        buffers.append(cache.layers[0].keys.untyped_storage().data_ptr())
    moves = sum(a != b for a, b in itertools.pairwise(buffers))
    assert 1 <= moves <= 24 / 3


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_strides_depend_on_the_length_alone(family):
    """Whatever length the prompt had: some kernels are planned for each length and stride."""
    model, strides = attached(family, KAConfig()), set()
    for prompt in (60, 63, 64, 65, 69):
        cache = KACache(model.config)
        run(model, tokens(1, 70).split([prompt] + [1] * (70 - prompt), 1), cache)
        strides.add((cache.layers[0].keys.stride(), cache.layers[0].values.stride()))
    assert len(strides) == 1


@pytest.mark.parametrize("ka", [KAConfig(), KAConfig(window=4)], ids=["full", "window"])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_what_was_read_from_a_cache_stays_as_it_was(family, ka, few_slots):
    """Through steps, a crop after which other tokens come, new places of rows, and a copy that goes its own way."""
    model, ids = attached(family, ka), tokens(2, 30)
    cache, kept = KACache(model.config), []
    cache.activate_past_recording()

    def go(start, end, cache=cache):
        run(model, ids[:, start:end].split(1, 1), cache)
        kept.extend((x, x.clone()) for layer in cache.layers for x in (layer.keys, layer.values))

    go(0, 7)
    go(7, 9)
    cache.crop(-3)
    go(9, 14)
    cache.reorder_cache(torch.tensor([1, 0]))
    go(14, 16)
    other, twin = copy.deepcopy(cache), copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    for each, start in ((cache, 16), (other, 18), (twin, 20), (cache, 22), (twin, 24)):
        go(start, start + 2, each)
    assert all(torch.equal(x, before) for x, before in kept)
    order = torch.tensor([1, 0])
    past = torch.cat([ids[order][:, :6], ids[order][:, 9:14], ids[:, 14:16]], 1)
    for each, mine in ((cache, [16, 17, 22, 23]), (other, [18, 19]), (twin, [20, 21, 24, 25])):
        each.crop(0)
        whole = torch.cat([past, ids[:, mine], ids[:, 26:]], 1)
        assert largest(run(model, ids[:, 26:].split(1, 1), each) - parallel(model, whole)[:, -4:]) < TINY


@pytest.mark.parametrize("looks", [True, False])
def test_a_cache_goes_from_one_gradient_mode_to_another(looks):
    model, ids = attached("gpt_neox", KAConfig()), tokens(2, 14)
    want, cache, logits, start = parallel(model, ids), KACache(model.config), [], 0
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad, torch.no_grad, torch.inference_mode, torch.no_grad]
    for mode, sizes in zip(modes, ([3, 1, 1], [1, 1], [1, 1], [1, 1], [1, 1], [1]), strict=True):
        for size in sizes:
            with mode():
                logits.append(model(ids[:, start : start + size], past_key_values=cache).logits.detach())
            start += size
        with torch.no_grad():
            assert not looks or all(layer.values.shape[2] == start for layer in cache.layers)
    assert largest(torch.cat(logits, 1) - want) < TINY


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_the_short_way_of_a_step_is_the_long_way(family, monkeypatch):
    """To the bit: a plain step skips questions, not arithmetic."""
    model, logits = attached(family, KAConfig()).float(), []
    of = KAConfig.of(model.config)
    for is_plain in (True, False):
        monkeypatch.setitem(vars(of), "is_plain", is_plain)
        logits.append(run(model, tokens(2, 12).split([1, 1, 5, 1, 1, 1, 1, 1], 1), KACache(model.config)))
    assert of is KAConfig.of(model.config)
    assert torch.equal(*logits)


def test_the_short_way_of_a_step_leaves_no_question_out(monkeypatch):
    """Dropout and packed sequences are refused, an adapter is heeded, autocast is as on the long way."""
    model, ids = attached("gpt_neox", KAConfig()), tokens(2, 4)
    of, sizes = KAConfig.of(model.config), [2, 1, 1]
    logits = []
    for is_plain in (True, False):
        monkeypatch.setitem(vars(of), "is_plain", is_plain)
        with torch.autocast("cpu", torch.bfloat16):
            logits.append(run(model.float(), ids.split(sizes, 1), KACache(model.config)))
    assert torch.equal(*logits)
    monkeypatch.setitem(vars(of), "is_plain", True)

    cache, ends = KACache(model.config), torch.tensor([0, 1], dtype=torch.int32)
    run(model.double(), [ids[:, :2]], cache)
    with pytest.raises(ValueError, match=r"^cu_seq_lens_q: packed sequences cannot continue a cache"):
        run(model, [ids[:, 2:3]], cache, cu_seq_lens_q=ends)
    attention = model.gpt_neox.layers[0].attention
    attention.ka_adapter = LinearAdapter(4, 8).double()
    attention.ka_adapter.weight.data.mul_(0.5)
    assert largest(run(model, ids.split(sizes, 1), KACache(model.config)) - parallel(model, ids)) < TINY
    del attention.ka_adapter
    cache = KACache(model.config)
    run(model, [ids[:, :2]], cache)
    attention.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        run(model.train(), [ids[:, 2:3]], cache)


def test_a_value_is_read_as_it_is_until_its_output_is_known():
    layer, x = KADynamicLayer(1), torch.arange(4.0).view(4, 1, 1, 1, 1)
    with torch.no_grad():
        for key in x:
            layer.update(key, key)
            assert layer.values[0, 0, -1] == key
            layer.commit(-key)
    assert layer.values.flatten().tolist() == [0, -1, -2, -3]


@pytest.mark.parametrize("groups", [1, 2])
@torch.inference_mode()
def test_values_may_be_wider_than_keys(groups):
    """V of fused projections, whose batches lie apart, takes its place for every query head, and U after it."""
    layer, u = KADynamicLayer(groups), torch.randn(2, 3 * groups, 5, 6)
    for t in range(5):
        fused = torch.randn(2, 1, 6, 10).transpose(1, 2)[:, :3]
        layer.update(fused[..., :4], fused[..., 4:])
        newest = fused[..., 4:].repeat_interleave(groups, 1)
        assert torch.equal(layer._values[:, :, -1:], newest if t else fused[..., 4:])
        layer.commit(u[:, :, t : t + 1])
    assert torch.equal(layer.values, u)


@pytest.mark.parametrize("which", ["keys", "values"])
def test_keys_or_values_alone_may_be_replaced(which):
    """The cache goes on from what it was given, as it does where both are new."""
    model, ids = attached("gpt_neox", KAConfig()), tokens(2, 8)
    caches = KACache(model.config), KACache(model.config)
    for cache, replaced in zip(caches, ([which], ["keys", "values"]), strict=True):
        run(model, ids[:, :5].split(1, 1), cache)
        for layer in cache.layers:
            for name in replaced:
                tensor = getattr(layer, name)
                setattr(layer, name, tensor.flip(2) if name == which else tensor.clone())
    assert torch.equal(*(run(model, ids[:, 5:].split(1, 1), cache) for cache in caches))


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("sizes", [[3], [1, 1, 1]])
def test_another_batch_does_not_fit(family, sizes):
    model = attached(family, KAConfig())
    cache = KACache(model.config)
    run(model, tokens(2, 3).split(sizes, 1), cache)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        run(model, [tokens(1, 1)], cache)


def test_the_cache_owns_its_memory():
    """A prefill leaves no view of larger tensors: of all projections, or of more tokens than a window keeps."""
    for ka in (KAConfig(window=4), KAConfig(layers=(1,))):
        model = attached("gpt_neox", ka)
        cache = KACache(model.config)
        run(model, [tokens()], cache)
        for layer, x in itertools.product(cache.layers, ("keys", "values")):
            assert getattr(layer, x).untyped_storage().nbytes() == getattr(layer, x).nbytes


@pytest.mark.parametrize(("family", "window"), [("gpt_neox", None), ("llama", None), ("llama", 64)])
def test_spare_slots_are_few(family, window):
    """As many as said in `cache_bytes`: 32 or an eighth, and 32 more in a window."""
    model = attached(family, KAConfig(window=window), max_position_embeddings=1024)
    cache = KACache(model.config)
    for start in range(0, 600, 100):
        run(model, tokens(1, 100, seed=start).split([98, 1, 1], 1), cache)
        for layer in cache.layers:
            held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (layer.keys, layer.values)}
            a_slot = (layer.keys[:, :, 0].numel() + layer.values[:, :, 0].numel()) * layer.keys.element_size()
            used = layer.keys.shape[2]
            spare = sum(held.values()) // a_slot - used
            assert spare <= max(32, used // 8) if window is None else 32 <= spare <= 64


def test_a_changed_configuration_is_heeded():
    """In whatever way it changes, between two steps too: nothing that was read before is kept."""
    model, ids = attached("gpt_neox", KAConfig()), tokens()
    before, settings = parallel(model, ids), model.config.ka_config
    settings["window"] = 3
    assert torch.equal(parallel(model, ids), parallel(attached("gpt_neox", KAConfig(window=3)), ids))
    model.config.ka_config = {"layers": [1]}
    assert torch.equal(parallel(model, ids), parallel(attached("gpt_neox", KAConfig(layers=(1,))), ids))
    settings["window"] = None
    model.config.ka_config = settings
    assert torch.equal(parallel(model, ids), before)
