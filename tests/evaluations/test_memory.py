"""Cache bytes, against arithmetic by hand."""

import pytest
from transformers import GPTNeoXConfig, LlamaConfig

from ka_attention.evaluations import memory
from ka_attention.harness.models.saved import cache_size
from ka_attention.hf import KAConfig, bytes_per_token

PYTHIA = GPTNeoXConfig(hidden_size=512, num_hidden_layers=6, num_attention_heads=8)
GROUPED = LlamaConfig(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, dtype="bfloat16"
)


def test_pythia_takes_the_same_bytes_with_either_cache():
    found = memory.evaluate(PYTHIA, None, length=128)
    assert found.kv.bytes_per_token == found.ka.bytes_per_token == 2 * 6 * 512 * 4
    assert found.kv.bytes_per_sequence == 128 * 2 * 6 * 512 * 4
    assert found.own == "kv"


def test_grouped_queries_make_the_ka_cache_larger():
    found = memory.evaluate(GROUPED, KAConfig(), length=10)
    assert found.own == "ka"
    assert found.kv.bytes_per_token == 3 * (2 + 2) * 8 * 2
    assert found.ka.bytes_per_token == 3 * (2 + 8) * 8 * 2
    example = memory.evaluate(PYTHIA, None, length=10).grouped
    assert (example.query_heads, example.key_value_heads) == (8, 2)
    assert example.ka / example.kv == (2 + 8) / (2 + 2)


def test_a_window_makes_the_cache_constant():
    found = memory.evaluate(PYTHIA, KAConfig(window=16), length=128)
    token = found.ka.bytes_per_token
    assert found.ka.bytes_per_sequence == 15 * token
    assert set(found.ka.by_length) == {15 * token}
    assert found.ka.by_length == found.kv.by_length


def test_layers_without_ka_keep_all_tokens_as_keys_and_values():
    ka = KAConfig(layers=(0,), window=5)
    assert cache_size(GROUPED, ka, "ka", 100) == (4 * (2 + 8) + 2 * 100 * (2 + 2)) * 8 * 2


@pytest.mark.parametrize("config", [PYTHIA, GROUPED])
def test_agrees_with_the_librarys_bytes_per_token(config):
    for kind in ("kv", "ka"):
        assert cache_size(config, KAConfig(), kind, 1) == bytes_per_token(config, kind)


def test_the_given_configuration_is_not_touched():
    before = PYTHIA.to_dict()
    memory.evaluate(PYTHIA, KAConfig(window=4), length=8)
    assert PYTHIA.to_dict() == before
