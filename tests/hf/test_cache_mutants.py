"""Tests of the tests: each mutant of the KA cache must be seen at the logits, since equal tokens prove little."""

import pytest
import torch
from test_cache import TINY, attached, check_batch, check_crop, check_decode, check_reorder, check_turns

from ka_attention.hf import KAConfig
from ka_attention.hf.cache.layers import KADynamicLayer, KAWindowLayer
from ka_attention.hf.cache.static import KAStaticLayer


def new_values(layer, u):
    """V of the new tokens, in the shape of their U."""
    return layer._values[:, :, -u.shape[2] :].repeat_interleave(u.shape[1] // layer._values.shape[1], dim=1)


def no_commit(monkeypatch):
    right = KADynamicLayer.commit
    monkeypatch.setattr(KADynamicLayer, "commit", lambda self, u: right(self, new_values(self, u)))


def commit_a_step_late(monkeypatch):
    right = KADynamicLayer.commit

    def commit(self, u):
        n = self.pending
        right(self, u)
        if self.values.shape[2] > n:
            self.values[:, :, -n - 1] = u[:, :, 0]

    monkeypatch.setattr(KADynamicLayer, "commit", commit)


def no_reorder(monkeypatch):
    monkeypatch.setattr(KADynamicLayer, "reorder_cache", lambda self, order: None)


def reorder_keys_only(monkeypatch):
    def reorder(self, order):
        self.keys = self.keys.index_select(0, order)

    monkeypatch.setattr(KADynamicLayer, "reorder_cache", reorder)


def crop_from_the_wrong_end(monkeypatch):
    for layer in (KADynamicLayer, KAWindowLayer):
        right = layer.crop

        def crop(self, tokens_to_remove, right=right):
            before = self.values
            right(self, tokens_to_remove)
            if tokens_to_remove:
                self.values = before[:, :, : self.values.shape[2]].roll(1, dims=2)

        monkeypatch.setattr(layer, "crop", crop)


def repeat_keys_only(monkeypatch):
    def repeat(self, repeats):
        self.keys, self.values = self.keys.repeat_interleave(repeats, 0), self.values.repeat(repeats, 1, 1, 1)

    monkeypatch.setattr(KADynamicLayer, "batch_repeat_interleave", repeat)


def select_the_first(monkeypatch):
    def select(self, indices):
        self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]

    monkeypatch.setattr(KADynamicLayer, "batch_select_indices", select)


def commit_the_last_token_only(monkeypatch):
    for layer in (KADynamicLayer, KAStaticLayer):
        right = layer.commit

        def commit(self, u, right=right):
            if u is None:  # a step in a ring stored U itself
                return right(self, u)
            n = u.shape[2]
            value = new_values(self, u) if isinstance(self.pending, int) else self.pending[1]
            if n > 1 and value.shape[2] == n:
                u = torch.cat([value[:, :, :-1], u[:, :, -1:]], dim=2)
            right(self, u)

        monkeypatch.setattr(layer, "commit", commit)


def forget_nothing_on_reset(monkeypatch):
    monkeypatch.setattr(KADynamicLayer, "reset", lambda self: None)


MUTANTS = [
    (check_decode, no_commit),
    (check_decode, commit_a_step_late),
    (check_reorder, no_reorder),
    (check_reorder, reorder_keys_only),
    (check_crop, crop_from_the_wrong_end),
    (check_crop, no_commit),
    (check_batch, repeat_keys_only),
    (check_batch, select_the_first),
    (check_turns, commit_the_last_token_only),
    (check_turns, forget_nothing_on_reset),
]


@pytest.mark.parametrize(("check", "mutate"), MUTANTS, ids=lambda f: f.__name__)
def test_mutants_are_seen(monkeypatch, check, mutate):
    for ka in (KAConfig(), KAConfig(window=4)):
        model = attached("llama", ka)
        assert check(model) < TINY
        with monkeypatch.context() as patch:
            mutate(patch)
            assert check(model) > 1e-3
