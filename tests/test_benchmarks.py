"""The benchmarks' own logic, without a GPU: what is compared, how it is judged, and that what is timed is right."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ka_attention import ka_attention

sys.path.append(str(Path(__file__).parents[1]))  # the benchmarks are no part of the package
from benchmarks import decode, goals

KERNELS = pytest.importorskip("triton", reason="the GPU's benchmarks need Triton")
from benchmarks import gpu, models, peers, timing, traffic  # noqa: E402


def record(section, shape, label, peer, ratio, **more):
    row = {"section": section, "case": section, "shape": list(shape), "pass": label, "ms": {peer: 2.0, "KA": 2 * ratio}}
    return row | more


def lines(table):
    """Rows of a Markdown table as lists of cells, by the first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


def test_a_goal_holds_where_every_figure_is_within_its_bound():
    long, short = (1, 32, 8192, 128), (8, 8, 2048, 64)
    records = [
        record("causal", long, "forward", "FA2", 1.25),
        record("causal", short, "forward", "FA2", 0.75),
        record("causal", (2, 16, 4096, 64), "forward", "FA2", 1.15),
        record("causal", (32, 8, 128, 64), "forward", "FA2", 0.5),
        record("causal", short, "both", "FA2", 0.9, peak_mib={"FA2": 8.0, "KA": 8.4}),
        record("DeltaFormer", long, "both", "peer", 0.25),
        record("DeltaFormer", short, "both", "peer", 0.01),
        {"section": "delta rule", "case": "x", "shape": [1], "pass": "both", "ms": {}, "skipped": "no"},
    ]
    table = lines(goals.judged(records))
    assert table["forward / FlashAttention-2, T ≥ 2048"] == [
        *("≤ 1.1", "≤ 0.8", "0.75 to 1.25", "at 1 of 3 (worst: causal 1, 32, 8192, 128: 1.25)", "at 1 of 3"),
    ]
    assert table["forward / FlashAttention-2, T < 2048"] == ["≤ 1.3", "≤ 0.8", "0.5", "yes", "yes"]
    assert table["peak memory / SDPA"] == ["≤ 1.1", "≤ 1", "1.05", "yes", "no"]
    worst = "no (DeltaFormer 1, 32, 8192, 128: 4)"
    assert table["fla DeltaFormer (its recursion) / KA, forward + backward at 1, 32, 8192, 128"][2:] == [
        "4",
        worst,
        "no",
    ]
    assert table["the same at T ≤ 2048"] == ["≥ 50", "≥ 100", "100", "yes", "yes"]
    assert table["backward / FlashAttention-2"][2:] == ["not measured", "", ""]


def test_tables_show_times_ratios_and_what_was_not_measured(tmp_path, capsys):
    rows = [
        record("causal", (2, 1, 64, 8), "both", "FA2", 1.5, tflops=12.0, peak_mib={"FA2": 2.0, "KA": 3.0}),
        {"section": "causal", "case": "other", "shape": [4], "pass": "both", "ms": {}, "skipped": "ImportError: fla"},
    ]
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps({"machine": "a GPU", "records": rows}))
    goals.main([str(file)])
    printed = capsys.readouterr().out
    assert printed.startswith("a GPU\n\n## Against the goals\n")
    table = lines(printed.partition("## Causal\n\n")[2])
    assert table["case"] == "shape pass FA2 ms|KA ms|KA TFLOP/s|KA / FA2|memory / FA2".replace(
        " pass ", "|pass|"
    ).split("|")
    assert table["causal"] == ["2, 1, 64, 8", "both", "2", "3", "12", "1.5", "1.50"]
    assert "other at 4: not measured, ImportError: fla" in printed


@pytest.fixture
def without_gpu(monkeypatch):
    """Inputs that take no room and times that are made up, so that every section can run."""
    counter = iter(range(1, 10_000))
    for module in (gpu, peers):
        monkeypatch.setattr(module, "inputs", partial(timing.inputs, device="meta"))
    for module in (gpu, timing, peers):
        monkeypatch.setattr(module, "replayed", lambda function: float(next(counter)))
    monkeypatch.setattr(peers, "called", lambda function: 5.0)
    monkeypatch.setattr(timing, "peak_mib", lambda *_: 1.0)
    monkeypatch.setattr(gpu, "step", lambda *_: None)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="900.0 0\n"))
    monkeypatch.setattr(torch.nn.attention.flex_attention, "create_block_mask", lambda *_, **__: None)
    monkeypatch.setattr(peers, "_deltaformer", lambda: None)
    monkeypatch.setattr(peers, "_delta_rule", lambda: None)


@pytest.mark.usefixtures("without_gpu")
def test_every_goal_has_its_figures():
    records = [record for section in gpu.SECTIONS.values() for record in section()]
    table = lines(goals.judged(records))
    of_others = ("training step", "decoding, 47 M")
    assert all(name.startswith(of_others) for name, row in table.items() if "not measured" in row)
    for section in gpu.SECTIONS.values():
        assert goals.section_table(list(section()))
    json.dumps(records)


@pytest.mark.usefixtures("without_gpu")
def test_the_backward_is_what_both_take_beyond_the_forward():
    forward, backward, both = list(gpu.causal())[:3]
    assert [row["pass"] for row in (forward, backward, both)] == ["forward", "backward", "both"]
    for name in ("FA2", "cuDNN", "KA"):
        assert forward["ms"][name] + backward["ms"][name] == both["ms"][name]
    B, H, T, D = both["shape"]
    assert both["tflops"] == pytest.approx(3.5 * 2 * B * H * T * T * D / (both["ms"]["KA"] * 1e9))


@pytest.mark.usefixtures("without_gpu")
def test_a_peer_that_is_absent_or_fails_is_skipped_with_the_reason(monkeypatch):
    def absent():
        raise ModuleNotFoundError("No module named 'fla'\nand more")

    monkeypatch.setattr(peers, "_delta_rule", absent)
    for row in peers.delta_rules():
        assert row["ms"] == {}
        assert row["skipped"] == "ModuleNotFoundError: No module named 'fla'"
    assert "skipped" not in next(peers.deltaformers())


def test_bytes_are_those_of_each_pass(monkeypatch):
    sizes = {"weights": 100, "walk": 20, "adjoint_walk": 30, "scan": 4, "gradients": 500}  # in millions
    counters = [
        f'"{kernel}_kernel","dram__bytes_{way}.sum","{size},000,000"'
        for kernel, size in sizes.items()
        for way in ("read", "write")
    ]
    head = ["==PROF== Connected", '"Kernel Name","Metric Name","Metric Value"']
    assert traffic.counted([*head, *counters, *counters]) == [(240e6, 1068e6)] * 2
    output = "\n".join(head + counters * len(gpu.NARROW) * len(traffic.WINDOWS))
    monkeypatch.setattr(traffic.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=output))
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in next(traffic.run()).splitlines()]
    assert found[2:4] == [
        ["window 2", "1, 16, 8192, 128", "forward", "134", "240", "1.79"],
        ["window 2", "1, 16, 8192, 128", "backward", "268", "1068", "3.98"],
    ]


def test_models_train_and_decode_with_every_attention(monkeypatch):
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }  # fmt: skip
    logits = []
    monkeypatch.setattr(timing, "replayed", lambda call: logits.append([call(), call()]) or 1.0)
    records = [*models.training([(2, 32)], 0.0, **sizes), *models.decoding([(2, 40)], **sizes)]
    assert all(torch.equal(*twice) for twice in logits)  # a call can be repeated
    assert all(row["ms"].keys() == models.ARMS.keys() for row in records)
    held = records[1]["bytes"]
    assert held["KA window 8"] == held["softmax window 8"] < held["KA 3:1"] < held["softmax"]
    assert "softmax window 8 MiB" in goals.section_table(records[1:])


def test_the_token_loop_is_ka_attention():
    q, k, v = torch.randn(3, 2, 3, 17, 8)
    torch.testing.assert_close(peers.token_loop(q, k, v), ka_attention(q, k, v, backend="reference"))


def test_peers_get_the_same_numbers_in_their_layout():
    q, k, v, grad = timing.inputs(2, 3, 5, 4, torch.float32, "cpu")
    (q_, k_, v_, beta), grad_ = peers.layer_inputs(q, k, v, grad)
    torch.testing.assert_close(k_, F.normalize(k, dim=-1).transpose(1, 2))
    torch.testing.assert_close(q_.norm(dim=-1), torch.ones(2, 5, 3))
    assert torch.equal(v_, v.transpose(1, 2))
    assert torch.equal(grad_, grad.transpose(1, 2))
    assert beta.shape == (2, 5, 3)
    assert 0 <= beta.min() <= beta.max() <= 1
    assert all(x.is_leaf and x.requires_grad and x.is_contiguous() for x in (q_, k_, v_, beta))


@pytest.mark.parametrize("kind", ["KV", "KA"])
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_a_decode_step_attends_to_the_past_and_the_new_token_each_time(kind, static):
    q, k, v = torch.randn(3, 2, 4, 10, 8)
    past_u = v[:, :, :-1] if kind == "KV" else ka_attention(q, k, v, backend="reference")[:, :, :-1]
    new = [x[:, :, -1:] for x in (q, k, v)]
    call = decode.step(kind, static, (k[:, :, :-1], past_u), new)
    wanted = ka_attention(q, k, v, gate=float(kind == "KA"), backend="reference")[:, :, -1:].transpose(1, 2)
    for _ in range(3):
        torch.testing.assert_close(call(), wanted)


def test_without_a_gpu_nothing_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(gpu.run()) == ["needs a CUDA device"]
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--only", "causal,speed"])
    assert "no section speed; there are causal" in capsys.readouterr().err
