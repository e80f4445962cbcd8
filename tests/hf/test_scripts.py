"""A few random scripts of decoding; ``python tests/hf/scripts.py 500`` runs many."""

import pytest
from scripts import run_script

from ka_attention.hf.cache.room import Room


@pytest.mark.parametrize("seed", range(12))
def test_a_random_script_gives_the_logits_of_a_pass_without_a_cache(seed):
    error, done = run_script(seed)
    assert error < 1e-10, done


def test_scripts_see_a_ring_that_is_out_of_order(monkeypatch):
    """A test of the tests."""
    monkeypatch.setattr(Room, "oldest", lambda self: 0)
    assert any(run_script(seed)[0] > 1e-3 for seed in range(8))
