"""Cutting the walk: its two ends are softmax attention and the exact operator, and the walks are what theory says."""

import dataclasses
import random

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ka_attention.errors import UserError
from ka_attention.harness.models.saved import attention
from ka_attention.harness.run.study import open_store
from ka_attention.harness.training import perplexity
from ka_attention.hf import KAConfig, attach
from ka_attention.report.render import render
from ka_attention.studies.hops import study as hops
from ka_attention.studies.hops.recipes import RECIPES
from ka_attention.studies.hops.report import Cut, Cuts, Model, Results
from ka_attention.studies.hops.study import HOPS

T = 12
SIZE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}


def model(ka=None):
    config = GPTNeoXConfig(**SIZE, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
    return attach(GPTNeoXForCausalLM(config).eval(), ka)


@pytest.fixture
def sequences():
    return torch.randint(300, (4, T))


def test_ends_of_the_cut(sequences):
    m = model()
    found = hops.evaluate(m, sequences, (1, 3, T - 1, T), 4)
    one, three, most, all_ = found.cut
    assert found.ppl == perplexity.evaluate(m, sequences, batch_size=4).ppl
    with attention(m, "kv"):
        assert one.ppl == pytest.approx(perplexity.evaluate(m, sequences, batch_size=4).ppl, rel=1e-5)
    assert abs(one.ppl - found.ppl) > 1e-2
    for cut in (most, all_):  # T tokens allow T - 1 hops
        assert cut.ppl == pytest.approx(found.ppl, rel=1e-5)
        assert max(cut.error) < 1e-5
    assert all(0.01 < b < a for a, b in zip(one.error, three.error, strict=True))
    assert all(cut.seconds > 0 for cut in found.cut)


def test_walks_of_uniform_weights(sequences):
    m = model()
    for layer in m.gpt_neox.layers:
        torch.nn.init.zeros_(layer.attention.query_key_value.weight)
        torch.nn.init.zeros_(layer.attention.query_key_value.bias)
    found = hops.evaluate(m, sequences, (1,), 4)
    # W_ij = 1 / (i + 1): the hops from token i are 1/2 + … + 1/(i+1), and token 0 takes one half from everywhere.
    harmonic = torch.cumsum(1 / torch.arange(1.0, T + 1), 0)[1:] - 1
    torch.testing.assert_close(torch.tensor(found.expected_hops), harmonic.mean().expand(2, 4))
    torch.testing.assert_close(torch.tensor(found.absorbed), torch.full((2, 4), 0.5))


def test_a_window_of_one_goes_nowhere(sequences):
    found = hops.evaluate(model(KAConfig(window=1)), sequences, (1,), 2)
    assert found.expected_hops == found.absorbed == ((0.0,) * 4,) * 2
    assert found.cut[0].error == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.fixture
def recipe(tmp_path):
    rng = random.Random(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(24):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(["one", "two", "three", "four", "five"], k=200)))
    small = {"sequence_length": 16, "train_samples": 32, "validation_samples": 8, "walk_samples": 4, "epochs": 1}
    return dataclasses.replace(RECIPES["quick"], data=str(folder), layers=2, hops=(1, 2, 16), **SIZE, **small)


def test_study(recipe, tmp_path):
    out = tmp_path / "run"
    results = HOPS.run(recipe, open_store(HOPS, recipe, out), 1)
    assert len(results.models) == 1
    assert HOPS.run(recipe, open_store(HOPS, recipe, out), 1) == results  # from the store: seconds are the same
    render(HOPS.question, HOPS.sections(recipe, results), {}, out)
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "**Expected:**" in report
    assert "1 (softmax attention)" in report
    for name in ("ppl_by_hops", "error_by_hops", "expected_hops", "absorbed_at_0"):
        assert (out / "figures" / f"{name}.svg").exists()

    # What it saved is a checkpoint that it can look at.
    again = dataclasses.replace(recipe, checkpoint=str(out / "model" / "seed0"))
    store = open_store(HOPS, again, tmp_path / "again")
    (looked_at,) = HOPS.run(again, store, 1).models
    assert looked_at.training is None
    assert looked_at.hops.ppl == pytest.approx(results.models[0].hops.ppl, rel=1e-5)
    with pytest.raises(UserError, match="--seeds: a checkpoint is one model, got 2"):
        HOPS.run(again, store, 2)


def test_words_follow_the_numbers():
    def section(ppls, times):
        cut = tuple(Cut(n, ppl, s, (0.5, 0.1)) for n, ppl, s in zip((1, 2, 4), ppls, times, strict=True))
        model = Model(Cuts(100.0, 1.0, cut, ((2.0, 4.0),), ((0.9, 0.1),)))
        return HOPS.sections(dataclasses.replace(RECIPES["quick"], hops=(1, 2, 4)), Results(None, (model,)))

    cut, walked = section((150.0, 100.5, 100.0), (0.5, 0.8, 1.4))
    assert "with 1 hop the PPL is +50.0 %" in cut.paragraphs[1]
    assert "From 2 hops on" in cut.paragraphs[1]
    assert "0.80 × the time of the exact one: cutting pays" in cut.paragraphs[1]
    assert "3.0 hops on average over all heads, 4.0 in the head with the longest" in cut.paragraphs[1]
    assert (
        "1 of 2 heads end more than half of their walks there; layer 0, head 0 the most, 90 %" in walked.paragraphs[0]
    )
    assert "cutting does not pay here" in section((150.0, 100.5, 100.0), (0.5, 1.2, 1.4))[0].paragraphs[1]
    assert "No cut comes within 1 %" in section((150.0, 120.0, 110.0), (0.5, 0.8, 1.4))[0].paragraphs[1]
    # A cut that is close by luck at one number of hops and not at the next is not enough.
    assert "From 4 hops on" in section((100.0, 120.0, 100.0), (0.5, 0.8, 1.4))[0].paragraphs[1]


@pytest.mark.parametrize("hops", [(), (0, 1), (2, 1), (1, 1)])
def test_wrong_hops(hops):
    with pytest.raises(UserError, match="--set hops: expected ascending numbers from 1 on"):
        dataclasses.replace(RECIPES["quick"], hops=hops)


def test_softmax_checkpoint(recipe, tmp_path):
    from ka_attention.harness.text import tokenizer

    GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE, num_hidden_layers=1, num_attention_heads=4)).save_pretrained(tmp_path)
    tokenizer.train(["a b c"], 300).save_pretrained(tmp_path)
    recipe = dataclasses.replace(recipe, checkpoint=str(tmp_path))
    with pytest.raises(UserError, match="expected a KA model"):
        HOPS.run(recipe, open_store(HOPS, recipe, tmp_path / "run"), 1)
