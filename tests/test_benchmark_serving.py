"""The benchmark of serving on a CPU, tiny: what is timed is right, and its rows are saved."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # the benchmarks are no part of the package
from benchmarks import served, serving

TINY = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("arm", serving.ARMS)
@torch.no_grad()
def test_a_step_reads_all_that_a_request_holds(arm):
    model = serving.build(arm, **TINY)
    call, filled = serving.step(model, 2, 300)
    assert filled.bytes == serving.bytes_of(model, 301)
    assert call().shape == (1, 2)
    tokens, pool = torch.tensor([[1, 1]]), filled.cache.pool_of
    held = {i: [x.clone() for x in pages] for i, pages in pool.items()}
    logits = model(tokens, **filled.arguments).logits
    for i, pages in pool.items():
        for x, before in zip(pages, held[i], strict=True):
            x.copy_(before)
            x[0] = 0  # one page, which one of the two has
    changed = (model(tokens, **filled.arguments).logits != logits).any(-1)[0]
    assert changed.sum() == 1


def test_the_cache_takes_as_many_requests_as_their_bytes_say():
    rows = {row["arm"]: row for row in serving.fit(1000, 600, **TINY)}
    for row in rows.values():
        assert row["allocated"] * 0.93 <= row["requests"] * row["bytes"] <= row["allocated"]
    assert rows["KA window"]["requests"] > 30 * rows["softmax"]["requests"] / 8
    assert rows["KA window"]["bytes"] * 32 < rows["softmax"]["bytes"]


def test_a_chunk_is_what_transformers_gives_the_model():
    """As many tokens at once as one by one."""
    model = serving.build("KA 3:1", **TINY)
    call, filled = serving.step(model, 2, 300, 7)
    tokens, pool = torch.randint(100, (2, 7)), filled.cache.pool_of
    before = {i: [x.clone() for x in pages] for i, pages in pool.items()}
    at_once = torch.no_grad()(model)(tokens.view(1, -1), **filled.arguments).logits.view(2, 7, -1)
    assert len(filled.arguments["cu_seq_lens_q"]) == 1 + serving.MOST
    for i, pages in pool.items():
        for x, old in zip(pages, before[i], strict=True):
            x.copy_(old)
    for n in range(7):
        one = filled._arguments(2, 300 + n, 1, model.device)
        logits = torch.no_grad()(model)(tokens[None, :, n], **one).logits[0]
        assert torch.allclose(logits, at_once[:, n], atol=1e-4)
    assert call().shape == (1, 2)


def test_the_interval_of_a_median():
    found = [served.interval(torch.randn(15, generator=torch.Generator().manual_seed(i)).tolist()) for i in range(400)]
    assert 0.94 < sum(low < 0 < high for low, high in found) / 400 < 0.99  # of ranks 4 and 12: 0.965
    assert served.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_rows_are_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "SECONDS", 0.05)
    monkeypatch.setattr(serving, "CHUNK", 32)
    monkeypatch.setattr(served, "MOST", 3)
    plan = {"fit": [300], "step": [(2, 20)], "chunk": [(2, 20)], "served": [(2, 20)], "hybrid": [(2, 20)]}
    text = "\n".join(serving.run(tmp_path, plan, new=3, **TINY))
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    kinds = [row["kind"] for row in rows]
    assert kinds == ["fit"] * 4 + ["step"] * 4 + ["chunk"] * 4 + ["served", "served", "pair"] * 2
    for one, other, pair in (rows[12:15], rows[15:]):
        ratios = [b / a for a, b in zip(one["times"], other["times"], strict=True)]
        assert pair["ratios"] == ratios
        assert len(ratios) == 3
        assert pair["low"] <= pair["median"] <= pair["high"]
        assert pair["arms"] == [one["arm"], other["arm"]]
    assert text in (tmp_path / "cpu.md").read_text().replace("\n\n**", "\n**")
