"""The cost model finds the constants that made its rows, and the report says what was measured and what was not."""

import json
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).parents[1]))  # the benchmarks are no part of the package
pytest.importorskip("triton", reason="the benchmarks of models need Triton")
from benchmarks import __main__ as every
from benchmarks import costs, ranks
from ka_attention import ka_attention

TRUE = costs.Costs(
    a=20.0, b=1e-3, c=2e-8, d=4e-4, extra=0.3, e=5e-6, host=15.0, host_share=0.4, alpha=0.02, beta=2e8,
    map_bytes=4000.0, token_bytes=1600.0,
)  # fmt: skip
MACHINE = {"machine": "two GPUs"}
LAYERS = {costs.WINDOWED: (12, 0), costs.HYBRID: (9, 3), costs.HEADS: (0, 12)}


def row(part, arm, count, tokens, model=TRUE):
    windowed, full = LAYERS[arm]
    return {
        "part": part,
        "model": "47M",
        "arm": arm,
        "ranks": count,
        "sent": True,
        "tokens": tokens,
        "ms": [model.step(tokens, count, windowed, full, 47_000_000)[0]],
        "peak_gib": 1.0,
        "ka_layers": windowed,
        "full_layers": full,
        "parameters": 47_000_000,
        **MACHINE,
    }


def rows(model=TRUE):
    found = [row("calibration", arm, 1, T, model) for T in (1 << 16, 1 << 17) for arm in (costs.WINDOWED, costs.HYBRID)]
    for number in (256, 1 << 28):
        found.append({"part": "messages", "ranks": 2, "bytes": number, "ms": model.alpha + number / model.beta})
    for tokens in (1 << 14, 1 << 16, 1 << 18):
        for count, ms in ((1, 1.0), (2, 1.0 + model.extra + model.e * tokens)):
            found.append({"part": "a windowed layer", "ranks": count, "tokens": tokens, "ms": ms})
    for count in (2, 8, 64):
        sent = {"windowed": model.map_bytes * (count - 1), "full": model.token_bytes * 100 * (count - 1) / count}
        names = sent if count < 64 else ["windowed"]
        found.append({"part": "bytes", "ranks": count, "tokens": 100 * count} | {name: sent[name] for name in names})
    for count in (1, 2):
        ms = model.host + (count - 1) * 12 * 3 * model.host_share
        found.append(row("launches", costs.WINDOWED, count, 1, model) | {"ms": [ms]})
    long = [row("long texts", arm, count, 1 << 18, model) for arm in LAYERS for count in (1, 2)]
    skipped = {
        "part": "long texts",
        "model": "47M",
        "arm": "softmax, ring",
        "ranks": 2,
        "tokens": 8,
        "sent": True,
        "skipped": "no",
    }
    return [each | MACHINE for each in (*found, *long, skipped)]


def test_the_constants_come_back():
    found = costs.fit(rows())
    assert asdict(found) == pytest.approx(asdict(TRUE), rel=1e-3)


def test_time_grows_with_the_share_alone_but_for_messages_and_full_layers():
    free = replace(TRUE, beta=1e30, alpha=0.0)
    times = [free.step(n << 17, n, 12, 0, 47_000_000)[0] for n in (2, 64, 1024)]
    assert times == pytest.approx([times[0]] * 3)
    full = [free.step(n << 17, n, 9, 3, 47_000_000)[0] for n in (2, 4)]
    assert full[1] - full[0] == pytest.approx(3 * TRUE.c * (1 << 17) * (2 << 17))
    sent = [TRUE.step(n << 17, n, 12, 0, 0)[1] for n in (2, 1024)]
    assert sent[1] - sent[0] == pytest.approx(12 * 4000 * 1022 / TRUE.beta + 3 * 0.02 * 12 * 9)


def test_a_step_takes_as_long_as_its_launches_at_least():
    slow = replace(TRUE, host=100.0, alpha=0.0, beta=1e30)
    steps = [slow.step(tokens, n, 12, 0, 1)[0] for n, tokens in ((1, 64), (8, 64), (1, 1 << 20))]
    assert steps == pytest.approx([100.0, 100.0 + 12 * 5 * 0.4, 20.0 + 1e-3 * (1 << 20)])


def test_a_row_takes_the_place_of_its_like_alone(tmp_path):
    """Rows of one GPU are measured again where rows of two are kept."""
    file = tmp_path / "rows.json"
    old = [row("launches", costs.WINDOWED, count, 64 * count) | {"sent": count == 1, "ms": [1e9]} for count in (1, 3)]
    file.write_text(json.dumps([each | MACHINE for each in old]))
    ranks.measure(1, ["launches"], 60.0, True, tmp_path)
    kept, *measured = json.loads(file.read_text())
    assert kept == old[1] | MACHINE
    assert [each["ranks"] for each in measured] == [1, 8]
    assert all(max(each["ms"]) < 1e9 for each in measured)


def test_the_report_judges_predictions_and_names_what_is_missing():
    changed = [r | {"ms": [2 * r["ms"][0]]} if r["part"] == "long texts" and "ms" in r else r for r in rows()]
    speed = {"part": "data parallel", "model": "410M", "arm": "KA 3:1", "way": "DDP", "batch": 8}
    changed += [speed | {"ranks": n, "tokens_per_s": x} for n, x in ((1, 100.0), (2, 190.0))]
    kind = {"part": "exact", "dtype": "float32", "window": None, "packed": True, "ranks": 2, "tokens": 64}
    changed.append(kind | {"one": 0.0, "shares": 2e-7})
    text = costs.report([each | MACHINE for each in changed])
    assert "Measured on 1 and 2 GPUs" in text
    assert "2.0e-07" in text
    assert text.count("-50.0 %") == 6
    assert "Within 15 % are 0 of 6 rows" in text
    assert "of the 3 that several GPUs took together, 0." in text
    assert "95.0 %" in text
    assert "Not measured, no: softmax, ring 47M, 8 tokens, 2." in text
    assert "more ranks than heads" in text


def test_gpus_are_compared_with_one_gpu_of_their_own_run():
    """Two runs have a row of one GPU each: neither takes the place of the other's, nor is it the other's measure."""
    speed = {"part": "data parallel", "model": "410M", "arm": "KA 3:1", "way": "DDP", "batch": 8}
    runs = [("2 × GPU, one day", 1, 100.0), ("2 × GPU, one day", 2, 190.0)]
    runs += [("4 × GPU, another", 1, 50.0), ("4 × GPU, another", 4, 150.0)]
    found = [speed | {"machine": host, "ranks": n, "tokens_per_s": x} for host, n, x in runs]
    assert len({costs.kind(each) for each in found}) == 4
    assert costs.kind(found[0]) == costs.kind(found[0] | {"machine": "2 × GPU, a third"})
    lines = costs.report([*rows(), *found]).splitlines()
    shares = [line.split("|")[-2].strip() for line in lines if "DDP" in line]
    assert shares == ["100.0 %", "95.0 %", "100.0 %", "75.0 %"]


def test_predictions_for_more_gpus_than_gave_constants_are_counted_apart():
    slow = row("long texts", costs.WINDOWED, 4, 1 << 18)
    found = [*rows(), slow | {"ms": [slow["ms"][0] * 1.25]}, slow | {"ranks": 8, "sent": False}]
    text = costs.report(found)
    assert "Measured on 1, 2 and 4 GPUs" in text
    assert "No constant was measured on more GPUs than 2; rows of more, 1, are within 20.0 %." in text
    assert "No constant" not in costs.report(rows())


def test_bytes_are_counted_of_what_goes_to_others(monkeypatch):
    monkeypatch.setattr(dist, "all_to_all_single", lambda *_: None)
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    x = torch.ones(6, 5, dtype=torch.bfloat16)
    with ranks.counted() as sent:
        dist.all_to_all_single(x, x, [1, 2, 3], [1, 2, 3], None)
        dist.all_to_all_single(x[:0], x[:0], [0, 0, 0], [0, 0, 0], None)
    assert sent == [4 * 5 * 2]


def test_one_of_many_ranks_computes_by_itself():
    """The first ranks' shares do not reach the last one, yet every tensor is of the size that it has among others."""
    q = torch.randn(1, 4, 12, 8, requires_grad=True)
    for window, size in ((3, 64), (None, 4)):
        with ranks.counted() as sent:
            out = ka_attention(q, q, q, gate=0.5, window=window, group=ranks.OneOf(size))
            out.sum().backward()
        assert out.shape == q.shape
        assert out.isfinite().all()
        keys, others = 4 * 2 * 8 * 4, size - 1  # and the maps, then what goes back of their constants alone
        assert sent == [2 * keys + others * 4 * 2 * (2 + 8 + 8) * 4 if window else 8 * others * q.nbytes // size]


class Operations(TorchDispatchMode):
    """Counts them."""

    number = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.number += 1
        return function(*arguments, **(options or {}))


def test_launches_grow_with_the_logarithm_of_the_ranks():
    q = torch.randn(1, 4, 12, 8, requires_grad=True)
    numbers = []
    for size in (8, 16, 32, 64):
        first = ranks.OneOf(size)
        first.rank = 0  # composes the maps of all others, backward
        with ranks.counted(), Operations() as seen:
            ka_attention(q, q, q, window=3, group=first).sum().backward()
        numbers.append(seen.number)
    more = [after - before for before, after in pairwise(numbers)]
    assert more[0] > 0
    assert more == [more[0]] * 3


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (ranks.main, ["--processes", "1", "--only", "bytes,nothing"], "--only: expected of exact, 131k, data, "),
        (every.main, ["cpu", "nothing"], "expected of cpu, gpu, "),
    ],
)
def test_what_there_is_not_is_an_error_of_one_line(main, arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert said in line
    assert line.endswith("got nothing")
    assert not [line for line in usage if "Traceback" in line]


def test_every_benchmark_has_a_name():
    files = Path(every.__file__).parent.glob("*.py")
    assert tuple(sorted(file.stem for file in files if "\ndef run(" in file.read_text())) == every.NAMES
