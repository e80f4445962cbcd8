"""Decoding through a cache: the loop scores what the parallel operator scores, and bytes are the computed ones."""

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ka_attention.evaluations import caches
from ka_attention.harness.models.saved import decoding
from ka_attention.harness.training import perplexity
from ka_attention.hf import KAConfig, attach, use

ARMS = {
    "softmax": None,
    "ka": KAConfig(),
    "softmax-w8": KAConfig(window=8, gate_init=0.0),
    "ka-w8": KAConfig(window=8),
    "token gate": KAConfig(gate="token", gate_init=0.5),
    "one layer": KAConfig(layers=(1,), window=4),
}
LENGTH = 20


def build(ka):
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.3,  # far from uniform attention, so that the two caches differ
    )
    model = GPTNeoXForCausalLM(config)
    return model if ka is None else attach(model, ka)


@pytest.fixture(scope="module")
def sequences():
    return torch.randint(0, 97, (5, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ARMS)
def test_the_token_loop_scores_what_the_parallel_operator_scores(name, sequences):
    ka = ARMS[name]
    model = build(ka)
    found = caches.evaluate(model, sequences, batch_size=3)
    for kind, row in found.kinds.items():
        assert row.own == (kind == ("kv" if name.startswith("softmax") else "ka"))
        with caches.attention(model, kind):
            parallel = perplexity.evaluate(model, sequences, batch_size=5)
        # Two float32 routes to the same logits: their difference in the mean of nearly a hundred losses.
        assert row.loss == pytest.approx(parallel.loss, abs=2e-6)
    assert abs(found.kinds["kv"].loss - found.kinds["ka"].loss) > 1e-2
    own = perplexity.evaluate(model, sequences, batch_size=5)
    assert found.kinds[found.own].loss == pytest.approx(own.loss, abs=2e-6)


@pytest.mark.parametrize("name", ARMS)
def test_measured_bytes_are_the_computed_ones(name, sequences):
    for row in caches.evaluate(build(ARMS[name]), sequences, batch_size=3).kinds.values():
        assert row.bytes_per_token_measured == row.bytes_per_token_computed == 2 * 2 * 32 * 4
        assert row.bytes_per_sequence_measured == row.bytes_per_sequence_computed
    kept = {"softmax-w8": 7 + 7, "ka-w8": 7 + 7, "one layer": LENGTH + 3}.get(name, 2 * LENGTH)
    assert row.bytes_per_sequence_measured == kept * 2 * 32 * 4


def test_the_swap_is_softmax_on_a_ka_model_and_ka_on_a_softmax_model(sequences):
    softmax, ka = (caches.evaluate(build(config), sequences, batch_size=5) for config in (None, KAConfig()))
    for kind in ("kv", "ka"):  # the same weights, so the same models
        assert softmax.kinds[kind].loss == pytest.approx(ka.kinds[kind].loss, abs=2e-6)


@pytest.mark.parametrize("name", ARMS)
def test_the_model_is_left_as_it_was(name, sequences):
    model = build(ARMS[name]).train()
    before = model.config.to_dict()
    caches.evaluate(model, sequences[:2], batch_size=2)
    assert model.training
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == ("ka" if ARMS[name] else "sdpa")


def test_one_kind_alone_and_its_speed(sequences):
    (row,) = caches.evaluate(build(None), sequences, batch_size=5, caches=("ka",)).kinds.values()
    assert row.tokens == sequences.numel()
    assert row.tokens_per_s == pytest.approx(row.tokens / row.seconds)


def test_decoding_keeps_layers_and_window():
    swapped = decoding(KAConfig(layers=(1,), window=4, gate="head", gate_init=0.5, gate_range=(0.25, 1.0)), "kv")
    assert swapped == KAConfig(layers=(1,), window=4, gate_init=0.0)
    assert decoding(KAConfig(window=4, gate_init=0.0), "ka") == KAConfig(window=4)
    assert decoding(None, "kv") == KAConfig(gate_init=0.0)


def test_attention_is_restored_after_an_error():
    model = build(KAConfig())
    with pytest.raises(RuntimeError, match="stop"), caches.attention(model, "kv"):
        raise RuntimeError("stop")
    assert KAConfig.of(model.config) == KAConfig()
    with use(build(None), KAConfig()) as fresh:  # a swap on top of a swap is the stock model again
        assert caches.own_cache(fresh) == "ka"
