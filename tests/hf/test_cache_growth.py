"""How a KA cache grows: in spare slots, where every step of decoding writes, and otherwise by concatenation."""

import copy
import itertools

import pytest
import torch
from test_cache import CONFIGS, TINY, attached, largest, parallel, run
from zoo import make, tokens

from ka_attention.hf import KACache, KAConfig, KAStaticCache, reconfigure, use
from ka_attention.hf.adapters import LinearAdapter
from ka_attention.hf.cache.layers import KADynamicLayer
from ka_attention.hf.cache.state import KAState


@pytest.fixture
def few_slots(monkeypatch):
    """Buffers of growing caches fill up soon."""
    monkeypatch.setattr("ka_attention.hf.cache.room.SPARE", 4)


@pytest.mark.parametrize("ka", CONFIGS[:5], ids=range(5))
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "mistral", "gemma3_text"])
def test_a_cache_grows_through_several_buffers(family, ka, few_slots):
    model, ids = attached(family, ka), tokens(2, 24)
    want = parallel(model, ids)
    for sizes in ([1] * 24, [3] + [1] * 6 + [4] + [1] * 11):
        assert largest(run(model, ids.split(sizes, 1), KACache(model.config)) - want) < TINY


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_most_steps_copy_nothing(family, few_slots):
    """They write where the step before did, so that a buffer serves several steps."""
    model, ids = attached(family, KAConfig()), tokens(1, 24)
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


def ways(monkeypatch):
    """A model as it takes short ways through plain steps, and as it does not."""
    yield
    with monkeypatch.context() as patch:
        patch.setattr(KAState, "is_step_in", lambda *_: False)
        yield


@pytest.mark.parametrize(
    "ka",
    [
        KAConfig(),
        KAConfig(window=3),
        KAConfig(layers=()),
        KAConfig(gate_init=0.5),
        KAConfig(gate="head", gate_init=0.5),
        KAConfig(gate="token", window=3),
    ],
    ids=["full", "window", "softmax", "number", "heads", "tokens"],
)
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_the_short_way_of_a_step_is_the_long_way(family, ka, monkeypatch):
    """To the bit: a plain step skips questions, not arithmetic. Under autocast too."""
    for autocast in (False, True):
        model, logits = attached(family, ka).float(), []
        for _ in ways(monkeypatch):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits.append(run(model, tokens(2, 12).split([1, 1, 5, 1, 1, 1, 1, 1], 1), KACache(model.config)))
        assert torch.equal(*logits)


def test_the_short_way_of_a_step_leaves_no_question_out():
    """Dropout, packed sequences and a cache for other layers are refused; windows and adapters are heeded."""
    model, ids, sizes = attached("gpt_neox", KAConfig()), tokens(2, 4), [2, 1, 1]
    cache, ends = KACache(model.config), torch.tensor([0, 1], dtype=torch.int32)
    run(model.double(), [ids[:, :2]], cache)
    with pytest.raises(ValueError, match=r"^cu_seq_lens_q: packed sequences cannot continue a cache"):
        run(model, [ids[:, 2:3]], cache, cu_seq_lens_q=ends)
    cache = KACache(model.config)
    run(model, [ids[:, :2]], cache)
    model.gpt_neox.layers[0].attention.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        run(model.train(), [ids[:, 2:3]], cache)

    for ka in (KAConfig(window=3), KAConfig(window=3, gate_init=0.0), KAConfig(window=3, gate="head")):  # in a ring
        model = attached("gpt_neox", ka)
        run(model, [ids[:, :2]], cache := KAStaticCache(model.config, 4))
        with pytest.raises(ValueError, match=r"^cu_seq_lens_q: packed sequences cannot continue a cache"):
            run(model, [ids[:, 2:3]], cache, cu_seq_lens_q=ends)
        run(model, [ids[:, :2]], cache := KAStaticCache(model.config, 4))
        model.gpt_neox.layers[0].attention.attention_dropout = 0.1
        with pytest.raises(ValueError, match="attention_dropout"):
            run(model.train(), [ids[:, 2:3]], cache)

    adapters = {0: LinearAdapter(4, 8).double()}
    adapters[0].weight.data.mul_(0.5)
    with use(make("gpt_neox"), adapter=adapters) as model:
        assert largest(run(model, ids.split(sizes, 1), KACache(model.config)) - parallel(model, ids)) < TINY

    model, ids = attached("llama", KAConfig()), tokens(2, 8)
    got = run(model, ids.split([4, 1, 1, 1, 1], 1), KACache(model.config), sliding_window=3)
    assert largest(got - parallel(model, ids, sliding_window=3)) < TINY
    reconfigure(model, KAConfig(layers=(1,)))
    cache = KACache(model.config)
    run(model, [ids[:, :4]], cache)
    reconfigure(model, KAConfig())
    with pytest.raises(RuntimeError, match="made for another ka_config"):
        run(model, [ids[:, 4:5]], cache)


def test_a_cache_takes_the_wider_of_two_dtypes():
    """As transformers' own caches do: what a wider type tells apart is not rounded to what was there before."""
    layer, x = KADynamicLayer(1), torch.full((1, 1, 1, 4), 1 / 3)
    with torch.no_grad():
        for given in (x.bfloat16(), x.bfloat16(), x):
            layer.update(given, given)
            layer.commit(given)
    assert torch.equal(layer.keys, torch.cat((x.bfloat16(), x.bfloat16(), x), 2))
    assert torch.equal(layer.values, layer.keys)


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


@pytest.mark.parametrize(("family", "window"), [("gpt_neox", None), ("llama", None), ("llama", 64), ("gpt_neox", 8)])
def test_spare_slots_are_few(family, window):
    """As many as said in `cache_bytes`: 32 or an eighth, and in a window one."""
    model = attached(family, KAConfig(window=window), max_position_embeddings=1024)
    cache = KACache(model.config)
    for start in range(0, 600, 100):
        run(model, tokens(1, 100, seed=start).split([98, 1, 1], 1), cache)
        for layer in cache.layers:
            held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (layer.keys, layer.values)}
            a_slot = (layer.keys[:, :, 0].numel() + layer.values[:, :, 0].numel()) * layer.keys.element_size()
            used = layer.keys.shape[2]
            spare = sum(held.values()) // a_slot - used
            assert spare <= (max(32, used // 8) if window is None else 1)
