"""Many requests at once give what each gives alone."""

import random
from types import SimpleNamespace

import pytest
import torch
from schedules import alone, check, greedy, schedule, settings
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import CompileConfig
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingAsyncIOs
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from zoo import make, tokens

from ka_attention.hf import KAConfig, attach, detach, reconfigure
from ka_attention.hf.batching import KABatchingManager, windows_of
from ka_attention.hf.paged import Group, KAPagedCache, Place, page_name
from ka_attention.hf.preparing import carried_over
from ka_attention.ops import paged

PROMPTS = [tokens(1, n, seed=n)[0].tolist() for n in (3, 1, 9)]


def serve(model, prompts=PROMPTS, count=4, **changes):
    results = model.generate_batch(prompts, greedy(max_new_tokens=count), settings(**changes))
    for prompt, result in zip(prompts, results.values(), strict=True):
        check(model, prompt, count, result)


@pytest.mark.parametrize("seed", range(10))
def test_random_schedules_give_what_generate_gives(seed):
    assert schedule(seed) > 0


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "olmo2", "phi3"])
def test_families(family):
    serve(attach(make(family), KAConfig(window=6, gate_init=0.5)))


def test_a_saved_model_serves(tmp_path):
    attach(make("llama"), KAConfig(gate="head", gate_init=0.4, window=5)).save_pretrained(tmp_path)
    serve(AutoModelForCausalLM.from_pretrained(tmp_path).eval())


def test_adapters():
    serve(attach(make("llama"), KAConfig(), adapter=lambda layer: nn.Linear(8, 8).double()))


@pytest.mark.parametrize("broken", ["first half of V", "no U"])
def test_the_comparison_sees_a_wrong_cache(broken, monkeypatch):
    store = paged.store
    if broken == "no U":
        monkeypatch.setattr(paged, "store", lambda k, v, a, *others: store(k, v, v.repeat_interleave(2, 1), *others))
    else:
        monkeypatch.setattr(paged, "store", lambda k, v, a, *others: store(k, v, a * (torch.arange(8) < 4), *others))
    with pytest.raises(AssertionError):
        serve(attach(make("llama"), KAConfig()))


def held(model, **changes):
    """Bytes that a paged cache of 64 pages of 4 tokens takes."""
    manager = model.init_continuous_batching(greedy(), settings(**changes))
    cache = manager._create_batch_processor().cache
    if hasattr(cache, "cache_tensor"):
        trash = 2 * cache.bytes_per_sector
        return cache.cache_tensor.numel() - trash
    tensors = [*cache.key_cache, *cache.value_cache]
    return sum(x[:-2].nbytes for x in tensors)


def test_a_token_takes_key_heads_and_query_heads_in_every_layer():
    model = attach(make("llama"), KAConfig(layers=(0,)))
    assert held(model) == 64 * 4 * 3 * (2 + 4) * 8 * 8  # pages, tokens, layers, heads, numbers, bytes


def test_softmax_layers_beside_rings_take_what_k_and_v_take():
    model, wider = (
        attach(make("llama"), KAConfig(pattern="2:1", window=w, gate="head", gate_init=0.5)) for w in (3, 4)
    )
    assert held(model) * (2 + 4) == held(wider) * (2 + 2)  # three tokens of U do not fit
    cache = model.init_continuous_batching(greedy(), settings())._create_batch_processor().cache
    assert [cache.group_of[i].page for i in range(3)] == [2, 2, 4]  # tokens of U fill two of V
    assert [x.shape[1] for i in range(3) for x in cache.pool_of[i]] == [2, 4, 2, 4, 2, 2]
    serve(model, [*PROMPTS, tokens(1, 36, seed=1)[0].tolist()])


def test_layers_with_a_window_keep_a_ring_of_the_widest():
    model = attach(make("gemma3_text"), KAConfig(layers=(0, 2), window=(3, 7)))
    assert windows_of(model) == [3, 5, 7]
    manager = model.init_continuous_batching(greedy(), settings())
    assert manager.sized.layer_types == ["sliding_attention"] * 3
    assert manager.sized.sliding_window == 6
    assert windows_of(attach(make("llama"), KAConfig(pattern="2:1", window=4))) == [4, 4, None]
    serve(model, [tokens(1, 36, seed=1)[0].tolist()], num_blocks=4)  # 40 tokens in blocks for 16


@pytest.mark.parametrize(
    ("family", "ka", "page"),
    [
        ("llama", KAConfig(layers=(0, 1, 3, 4, 5), window=3, gate="head", gate_init=0.5), 16),
        ("llama", KAConfig(layers=(2, 5), window=5, gate_init=0.5), 8),
        ("llama", KAConfig(layers=(0, 1, 2, 3, 4, 6), window=2, gate="token", gate_init=0.5), 16),
        ("gemma3_text", KAConfig(layers=(0, 3), window=3), 32),  # beside rings of softmax layers, which hold less
        ("gemma3_text", KAConfig(window=(3, 3, 9, 3, 3, 9, 3)), 16),
    ],
)
def test_groups_of_layers_are_few(family, ka, page):
    """Each has lists of places in every batch; transformers 5.17 would make up to seven of seven layers."""
    model = attach(make(family, num_hidden_layers=7), ka)
    manager = model.init_continuous_batching(greedy(), settings(page=page))
    kinds = {window is None for window in windows_of(model)}
    assert len(manager._create_batch_processor().cache.groups) == len(kinds)
    prompts = [*PROMPTS, tokens(1, 36, seed=1)[0].tolist()]
    serve(model, prompts, count=9, max_batch_tokens=20, page=page)


@pytest.mark.parametrize("window", [1, 3])
def test_rings_that_do_not_fit_one_page_together(window):
    """Six layers with rings beside one that keeps all tokens, in pages of four tokens."""
    serve(attach(make("llama", num_hidden_layers=7), KAConfig(layers=range(6), window=window, gate_init=0.5)))


def test_prefixes_are_shared_where_all_layers_keep_all_tokens(monkeypatch):
    found = []
    search = KAPagedCache.search_prefix_match
    monkeypatch.setattr(KAPagedCache, "search_prefix_match", lambda *args: found.append(search(*args)) or found[-1])
    prompts = [[*PROMPTS[2], i] for i in range(10, 15)]
    serve(attach(make("llama"), KAConfig(gate_init=0.5)), prompts, max_batch_tokens=10, max_requests_per_batch=2)
    assert max(found) == 8  # of 10 tokens, two pages


@pytest.mark.parametrize("window", [None, 6])
def test_padding_as_for_cuda_graphs(window, monkeypatch):
    make_processor = KABatchingManager._create_batch_processor

    def padded(manager):
        processor = make_processor(manager)
        processor.model_runner.pad_inputs = True
        return processor

    monkeypatch.setattr(KABatchingManager, "_create_batch_processor", padded)
    sizes = {"q_padding_interval_size": 8, "kv_padding_interval_size": 64, "use_cuda_graph": False}
    serve(attach(make("llama"), KAConfig(window=window, gate="token", gate_init=0.5)), **sizes)


def test_places_of_fewer_requests_than_sequences():
    group = Group(0, {"a": [7, 3], "b": [], "c": [5]}, 4, 4, None)
    read = torch.tensor([*group.row("a", 6), *group.row("b", 0), *group.row("c", 3), 0, 0])  # and padding
    place = Place.read(group, read, torch.tensor([4 * 3 + 2, 4 * 9, 4 * 5 + 3]), 5, 8)
    assert place.cache_seqlens.tolist() == [6, 0, 3, 0, 0]
    assert [place.block_table[i].tolist()[:n] for i, n in ((0, 2), (2, 1))] == [[7, 3], [5]]
    assert (place.slots.place.tolist(), place.slots.stride) == ([4 * 3 + 2, 4 * 9, 4 * 5 + 3], 4)
    ring = Group(0, {"a": [7, 3], "b": [], "c": [5]}, 4, 4, 2)
    read = torch.tensor([*ring.row("a", 600), *ring.row("b", 0), *ring.row("c", 3), *[9] * 20])
    place = Place.read(ring, read, read, 5, 8)
    assert place.cache_seqlens.tolist() == [600, 0, 3, 0, 0]
    assert place.block_table[0].tolist() == [7, 3]
    assert place.block_table[2, 0] == 5
    assert Place.read(ring, read[:9], read, 5, 8).cache_seqlens.tolist() == [600, 0, 3, 0, 0]


@pytest.mark.parametrize("ring", [None, 1, 2])
def test_lists_of_blocks_have_room_for_all_pasts(ring):
    blocks = list(range(40))
    group = Group(0, {str(i): blocks[:ring] for i in range(6)}, 4, 4, ring)
    for seed in range(20):
        pasts = torch.randint(0, 30, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = sum(len(group.row(str(i), past)) for i, past in enumerate(pasts))
        assert rows <= group.longest(6, sum(pasts))


def test_lists_that_go_to_the_gpu_are_of_blocks():
    """Transformers has a place for each of the 256 tokens of the cache, and 16 more."""
    for window, most in ((None, 2 * 3 + (256 + 16) // 4), (5, 3 * 2)):
        model = attach(make("llama"), KAConfig(window=window, gate_init=0.5))
        limits = settings(max_requests_per_batch=3)
        processor = model.init_continuous_batching(greedy(), limits)._create_batch_processor()
        assert processor.inputs_and_outputs.read_index_storage.shape == (1, most)
        assert (
            model.init_continuous_batching(greedy(), limits).continuous_batching_config.kv_padding_interval_size > 1e9
        )
        serve(model, [*PROMPTS, tokens(1, 36, seed=1)[0].tolist()], max_requests_per_batch=3)


def test_a_processor_that_is_used_again_keeps_its_lists():
    """Graphs that were captured before, as `warmup` does, read them."""
    manager = attach(make("llama"), KAConfig(window=5)).init_continuous_batching(greedy(), settings())
    manager.warmup()
    inputs = manager.batch_processor.inputs_and_outputs
    held, arguments = inputs.read_index_storage, inputs.get_model_kwargs
    assert manager._create_batch_processor() is manager.batch_processor
    assert inputs.read_index_storage is held
    assert inputs.get_model_kwargs is arguments


def test_tokens_that_are_on_their_way_are_carried_over():
    """As transformers does it, for sets of inputs that take turns, which are made on a GPU alone."""
    for seed in range(10):
        rng = random.Random(seed)
        names = [str(i) for i in range(12)]
        sets = [
            SimpleNamespace(
                req_id_to_new_token_position=dict(zip(rng.sample(names, n), rng.sample(range(40), n), strict=True))
            )
            for n in (rng.randrange(8), rng.randrange(8))
        ]
        pairs = [SimpleNamespace(host_io=io) for io in sets]
        inputs = SimpleNamespace(io_pairs=pairs, current_pair=seed % 2, max_batch_tokens=40)
        expected = ContinuousBatchingAsyncIOs.infer_carry_over_ids(inputs)
        assert torch.equal(carried_over(inputs), expected)
        assert carried_over(inputs).dtype == expected.dtype


def test_no_masks_are_made(monkeypatch):
    model = attach(make("mistral"), KAConfig(window=6))
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "ka", None)
    results = model.generate_batch(PROMPTS, greedy(max_new_tokens=3), settings())
    assert [len(result.generated_tokens) for result in results.values()] == [3, 3, 3]


def held_slots(model, length, monkeypatch):
    """Of one request that grows to ``length`` tokens: by its length, the slots that each group of layers holds."""
    found, extend = {}, KAPagedCache.extend_read_and_write_indices

    def record(cache, request, past, *args):
        found[past] = {g.ring is not None: len(g.tables[request]) * g.page for g in cache.groups.values()}
        return extend(cache, request, past, *args)

    with monkeypatch.context() as patch:
        patch.setattr(KAPagedCache, "extend_read_and_write_indices", record)
        serve(model, [PROMPTS[0]], count=length)
    return found


def test_a_window_keeps_all_but_one_of_its_tokens_however_long_the_text(monkeypatch):
    found = held_slots(attach(make("llama"), KAConfig(window=5)), 50, monkeypatch)
    assert found[2 * 5] == found[10 * 5] == {True: 4}
    found = held_slots(attach(make("llama"), KAConfig(window=5, pattern="2:1")), 50, monkeypatch)
    assert found[2 * 5] == {True: 4, False: 12}
    assert found[10 * 5] == {True: 4, False: 52}


class Letters:
    def decode(self, tokens, skip_special_tokens):
        return "".join(chr(token + 40) for token in tokens)


def test_stop_strings():
    model = attach(make("llama"), KAConfig(gate_init=0.5))
    whole = {prompt: alone(model, PROMPTS[prompt], 12)[0] for prompt in (0, 2)}
    string = Letters().decode(whole[2][3:5], True)
    manager = model.init_continuous_batching(greedy(max_new_tokens=12), settings(num_blocks=8))  # few: one waits
    manager.start()
    manager.stop_at("stopped", Letters(), [string, "no such string"])
    for name, prompt in (("free", 2), ("stopped", 2), ("other", 0)):
        manager.add_request(PROMPTS[prompt], request_id=name)
    found = {}
    while len(found) < 3:
        result = manager.get_result(timeout=30)
        found[result.request_id] = result.generated_tokens
    manager.stop(block=True)
    manager.destroy()
    assert Letters().decode(found["stopped"], True) == Letters().decode(whole[2], True).split(string)[0] + string
    assert found["free"] == whole[2]
    assert found["other"] == whole[0]
    with pytest.raises(ValueError, match=r"^stop_strings: a batch has no tokenizer"):
        model.generate_batch(PROMPTS, greedy(stop_strings=["a"]), settings())


def test_several_answers_to_one_prompt():
    model = attach(make("llama"), KAConfig())
    several = GenerationConfig(do_sample=True, top_k=1, num_return_sequences=2, eos_token_id=-1, max_new_tokens=4)
    results = model.generate_batch(PROMPTS, several, settings())
    assert all(r.generated_tokens in [alone(model, p, 4)[0] for p in PROMPTS] for r in results.values())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"varlen_compile_config": CompileConfig()}, "varlen_compile_config"),
        ({"default_compile_level": 1}, "default_compile_level"),
    ],
)
def test_compilation_is_refused(changes, name):
    model = attach(make("llama"), KAConfig())
    with pytest.raises(ValueError, match=rf"^{name}: a KA model runs continuous batching without compilation"):
        model.generate_batch(PROMPTS, greedy(), settings(**changes))


def test_what_cannot_be_served_is_refused(monkeypatch):
    model = attach(make("llama"), KAConfig())
    if page_name(settings()) == "block_size":
        with pytest.raises(ValueError, match=r"^cpu_offload_space: a KA model needs transformers 5.18"):
            model.generate_batch(PROMPTS, greedy(), settings(cpu_offload_space=1.0))
    with monkeypatch.context() as patch:
        patch.setattr(model, "_device_mesh", "two", raising=False)
        with pytest.raises(ValueError, match="on one device"):
            model.generate_batch(PROMPTS, greedy(), settings())
    forward = type(model.model).forward
    with monkeypatch.context() as patch:  # a model that keeps arguments to itself
        patch.setattr(type(model.model), "forward", lambda self, input_ids, **kwargs: forward(self, input_ids))
        with pytest.raises(ValueError, match="does not hand a paged cache to its attention"):
            model.generate_batch(PROMPTS, greedy(), settings())
    with pytest.raises(ValueError, match=r"^head_dim: .* the odd 7"):
        attach(make("gpt2", n_embd=28), KAConfig()).generate_batch(PROMPTS, greedy(), settings())


def test_a_kept_manager_belongs_to_one_configuration():
    model = attach(make("llama"), KAConfig())
    model.generate_batch(PROMPTS, greedy(max_new_tokens=2), settings(), persistent_manager=True)
    serve(model)
    reconfigure(model, KAConfig(gate_init=0.5))
    with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
        model.generate_batch(PROMPTS, greedy(), settings())
    detach(model)
    with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
        model.generate_batch(PROMPTS, greedy(), settings())
    model.destroy_cached_continuous_batching_manager()


def test_a_cache_in_main_memory_leaves_most_of_it():
    model = attach(make("llama"), KAConfig(window=4))
    chosen = model.init_continuous_batching(greedy()).continuous_batching_config
    assert chosen.max_memory_percent == 0.05
    chosen = model.init_continuous_batching(greedy(), settings(num_blocks=None)).continuous_batching_config
    assert chosen.max_memory_percent == 0.5


def test_no_memory_is_set_aside_for_masks_that_nobody_makes():
    """As for flash attention: with masks the second cache would have a fourteenth of the blocks."""
    model = attach(make("llama"), KAConfig(gate_init=0.5))
    found = []
    for most in (16, 2048):
        limits = settings(num_blocks=None, max_batch_tokens=most, max_memory_percent=0.002)
        manager = model.init_continuous_batching(greedy(), limits)
        found.append(manager._create_batch_processor().cache.num_blocks)
    assert found[1] > found[0] / 2
