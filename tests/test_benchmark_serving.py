"""The benchmark of serving on a CPU, tiny: what is timed is right, and its rows are saved."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # the benchmarks are no part of the package
from benchmarks import serving

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


def test_rows_are_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "SECONDS", 0.05)
    monkeypatch.setattr(serving, "ARMS", {name: serving.ARMS[name] for name in ("softmax window", "KA window")})
    plan = {"step": [(2, 20)], "served": [(2, 20)], "fit": 300}
    text = "\n".join(serving.run(tmp_path, plan, new=3, **TINY))
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["fit"] * 2 + ["step"] * 2 + ["served"] * 2
    assert all(row["requests_per_s"] > 0 for row in rows[4:])
    assert text in (tmp_path / "cpu.md").read_text().replace("\n\n**", "\n**")
