"""What a KA cache knows of itself: the settings it was made for, a pass that did not finish, its end or endlessness."""

import itertools

import pytest
import torch
from test_cache import TINY, attached, largest, parallel, run
from zoo import make, tokens

from ka_attention.hf import KACache, KAConfig, KAStaticCache, attention_modules, reconfigure, use
from ka_attention.hf.cache.state import KALayer

CACHES = {"growing": KACache, "static": lambda config: KAStaticCache(config, 16)}
SETTINGS = [
    {},
    {"gate": 0.0},
    {"gate": 0.5},
    {"window": 4},
    {"window": 4, "gate": 0.0},
    {"window": 1},
    {"layers": (1,)},
    {"layers": (1,), "window": 4},
    {"pattern": "1:1", "window": 4},
    {"layers": ()},
    {"gate": "head"},
    {"window": (2, 4, 8)},
]


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_is_refused_by_a_model_with_other_settings(kind):
    """All ordered pairs of settings: the past that one left means nothing to the other."""
    model, ids = make("gpt_neox"), tokens(1, 6)
    for first, then in itertools.permutations(SETTINGS, 2):
        with use(model, **first):
            cache = CACHES[kind](model.config)
            run(model, [ids[:, :4]], cache)
        with use(model, **then), pytest.raises(RuntimeError, match="made for another ka_config"):
            run(model, [ids[:, 4:]], cache)
    with use(model, **then):
        cache = CACHES[kind](model.config)
        run(model, [ids[:, :4]], cache)
    with use(model, **then):  # the same again
        assert largest(run(model, [ids[:, 4:]], cache) - parallel(model, ids)[:, 4:]) < TINY


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("ka", [KAConfig(), KAConfig(window=3), KAConfig(layers=(1,), window=3)], ids=range(3))
def test_a_step_of_a_wrong_batch_size_changes_nothing(ka, kind):
    model, ids = attached("llama", ka), tokens(2, 9)
    cache = CACHES[kind](model.config)
    run(model, ids[:, :6].split([4, 1, 1], 1), cache)
    for wrong in (tokens(1, 1), tokens(3, 2)):
        with pytest.raises((RuntimeError, IndexError)):
            run(model, [wrong], cache)
    assert largest(run(model, ids[:, 6:].split([2, 1], 1), cache) - parallel(model, ids)[:, 6:]) < TINY


class StoppedError(Exception):
    pass


def stopped(model, chunk, cache, layer):
    """A pass that ends before layer ``layer`` has attended, by an error between two layers."""

    def stop(*_):
        raise StoppedError

    hook = attention_modules(model)[layer].register_forward_pre_hook(stop)
    with pytest.raises(StoppedError):
        run(model, [chunk], cache)
    hook.remove()


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_pass_that_stops_between_layers_is_noticed(kind, layer):
    """Where some layers hold its tokens and others do not, the cache says so until it is reset."""
    model, ids = attached("llama", KAConfig(window=5)), tokens(2, 8)
    cache = CACHES[kind](model.config)
    run(model, [ids[:, :4]], cache)
    stopped(model, ids[:, 4:5], cache, layer)
    if layer == 0:
        assert largest(run(model, [ids[:, 4:]], cache) - parallel(model, ids)[:, 4:]) < TINY
        return
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"did not finish.*reset\(\) it"):
            run(model, [ids[:, 4:5]], cache)
    cache.reset()
    assert largest(run(model, ids.split([3, 1, 4], 1), cache) - parallel(model, ids)) < TINY


def test_a_reset_that_keeps_what_is_pending_is_seen(monkeypatch):
    """A test of the test above."""
    right = KALayer.reset

    def reset(self):
        kept = self.progress.unfinished, self.pending
        right(self)
        self.progress.unfinished, self.pending = kept

    monkeypatch.setattr(KALayer, "reset", reset)
    with pytest.raises(RuntimeError, match="did not finish"):
        test_a_pass_that_stops_between_layers_is_noticed("growing", 1)


def test_an_attention_function_that_fails_is_noticed():
    model, ids = attached("llama", KAConfig()), tokens(1, 4)
    cache = KACache(model.config)
    run(model, [ids], cache)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        run(model, [ids[:, :1]], cache, cu_seq_lens_q=torch.tensor([0, 1], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="never committed"):
        run(model, [ids[:, :1]], cache)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "mistral"])
@pytest.mark.parametrize(
    "ka", [KAConfig(window=4), KAConfig(window=1), KAConfig(window=3, gate_init=0.0), KAConfig(window=(1, 4, 6))],
    ids=range(4),
)  # fmt: skip
def test_a_static_cache_of_windows_goes_on_without_end(family, ka):
    """Far beyond its length, with steps and chunks, and with a mask that hides tokens wherever they are."""
    model, ids = attached(family, ka), tokens(2, 40)
    steps = [5, 1, 1, 4, *[1] * 12, 6, *[1] * 11]
    for hidden, sizes in (((), steps), ((0, 1, 2), [17, 1, 1, 21]), ((3, 20, 21, 29), steps)):
        mask = torch.ones_like(ids)
        mask[0, list(hidden)] = 0
        real = mask.bool()
        want = parallel(model, ids, attention_mask=mask)
        cache, outs, start = KAStaticCache(model.config, 8), [], 0
        for size in sizes:
            seen = {"attention_mask": mask[:, : start + size]} if hidden else {}
            outs.append(run(model, [ids[:, start : start + size]], cache, **seen))
            start += size
        assert largest((torch.cat(outs, 1) - want)[real]) < TINY


@pytest.mark.parametrize("ka", [KAConfig(), KAConfig(layers=(1,), window=3), KAConfig(window=9)], ids=range(3))
def test_a_static_cache_that_is_full_says_so(ka):
    model, ids = attached("llama", ka), tokens(2, 10)
    for sizes in ([8, 1], [7, 2], [9], [1] * 9):
        with pytest.raises(ValueError, match=r"^max_cache_len: .* room for 8 tokens.*, got 9"):
            run(model, ids[:, :9].split(sizes, 1), KAStaticCache(model.config, 8))
    cache = KAStaticCache(model.config, 8)
    assert largest(run(model, [ids[:, :8]], cache) - parallel(model, ids[:, :8])) < TINY


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_steps_in_a_window_stay_in_one_buffer(family, window, gate):
    """A ring of ``window`` slots: no step takes memory, and what is in it is in order for whoever reads."""
    model, ids = attached(family, KAConfig(window=window, gate_init=gate)), tokens(2, 24)
    want, cache = parallel(model, ids), KACache(model.config)
    logits = [run(model, [ids[:, :3]], cache)]
    buffers = set()
    for token in ids[:, 3:20].split(1, 1):
        logits.append(run(model, [token], cache))
        buffers |= {layer._keys.untyped_storage().data_ptr() for layer in cache.layers}
        slots = [layer._keys.untyped_storage().nbytes() // layer._keys[:, :, :1].nbytes for layer in cache.layers]
        assert max(slots) <= 2 * window  # keys and values may share a buffer
    assert len(buffers) == len(cache.layers)
    whole = KACache(model.config)
    run(model, [ids[:, :20]], whole)
    for got, full in zip(cache.layers, whole.layers, strict=True):
        assert largest(torch.cat((got.keys - full.keys, got.values - full.values), 1)) < TINY if window > 1 else True
        assert got.keys.shape[2] == window - 1
    logits.append(run(model, ids[:, 20:].split([1, 2, 1], 1), cache))
    assert largest(torch.cat(logits, 1) - want) < TINY


def test_a_window_narrower_than_the_cache_was_made_for_is_heeded():
    """One that a caller gives besides, in a ring whose tokens are not in order."""
    model, ids = attached("llama", KAConfig(window=6)), tokens(2, 20)
    for softcap in (None, 2.0):
        inputs = {"sliding_window": 3, "softcap": softcap}
        got = run(model, ids.split([4, *[1] * 16], 1), KACache(model.config), **inputs)
        assert largest(got - parallel(model, ids, **inputs)) < TINY


def test_a_reconfigured_model_takes_a_new_cache():
    model, ids = attached("llama", KAConfig()), tokens()
    reconfigure(model, KAConfig(window=3))
    assert largest(run(model, ids.split([5, 1, 6], 1), KACache(model.config)) - parallel(model, ids)) < TINY


def test_an_unknown_transformers_says_so(monkeypatch):
    monkeypatch.setattr("ka_attention.hf.cache.layers._OF_TRANSFORMERS", ("record_past", "something_new"))
    with pytest.raises(RuntimeError, match=r"^transformers 5\..* have no something_new"):
        KACache(attached("llama", KAConfig(window=3)).config)
