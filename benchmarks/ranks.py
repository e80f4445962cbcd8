"""Training over the GPUs of one host: data parallel, and one long text in shares, in time, memory and bytes sent.

`python -m benchmarks.ranks [--processes N] [--seconds S] [--out FOLDER] [--only PART,…]`, one process a GPU (without
GPUs two, on gloo). Rows go to FOLDER/rows.json as they come, those of `--only` in the place of their like there;
`--report` writes FOLDER/report.md from them alone. Rows of one GPU are taken by all processes at once, each by itself.
A step is forward, backward and AdamW of a Llama; long texts under FSDP2 in bfloat16 with float32 weights, layers
recomputed in the backward pass and the loss in chunks.

Of more ranks than there are GPUs one is measured, the middle one, by itself: its time and memory without the messages,
which are counted and not sent (`OneOf`).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from benchmarks import costs, exact, models
from benchmarks.harness import device_type, machine
from benchmarks.messages import OneOf, bytes_sent, constants, counted
from ka_attention.hf import KAConfig, attach, sequence_parallel, share

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs/results/ranks" if torch.cuda.is_available() else ROOT / "runs/ranks"
CHUNK = 8192  # tokens whose logits are in memory at once
SMALL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16}
MODELS = {
    "47M": SMALL | {"num_key_value_heads": 8},
    "410M": LARGE | {"num_key_value_heads": 16, "vocab_size": 50304, "tie_word_embeddings": False},
}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8}
WINDOWED, HYBRID, HEADS, RING = "KA window 8", "KA 3:1", "softmax, all-to-all", "softmax, ring"
Row = dict[str, Any]


class Processes:
    """What one of the processes knows: its rank, its device, groups of one and of all, and when to stop."""

    def __init__(self, rank: int, size: int, until: float, tiny: bool) -> None:
        self.rank, self.size, self.until, self.tiny = rank, size, until, tiny
        self.device = torch.device(device_type(), rank) if device_type() == "cuda" else torch.device("cpu")
        alone = [dist.new_group([other]) for other in range(size)][rank]
        self.groups: dict[int, Any] = {1: alone, size: dist.group.WORLD}
        self.meshes = {
            1: DeviceMesh.from_group(alone, device_type()),
            size: init_device_mesh(device_type(), (size,)),
        }

    def group(self, ranks: int) -> Any:
        return self.groups.get(ranks) or OneOf(ranks)

    def mesh(self, ranks: int) -> DeviceMesh:
        """Over which parameters are sharded."""
        return self.meshes.get(ranks) or self.meshes[1]

    def largest(self, x: float) -> float:
        """Over all processes."""
        found = torch.tensor(x, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def is_late(self, seconds: float) -> bool:
        return self.largest(time.time() + seconds) > self.until

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, call: Callable[[], object], repeat: int) -> list[float]:
        """Milliseconds of the slowest process in each of ``repeat`` calls, which begin together, after one more; of the
        first alone where that takes ten seconds.
        """
        took: list[float] = []
        while len(took) <= repeat and not (took and took[0] > 1e4):
            dist.barrier()
            start = self.now()
            call()
            took.append(self.largest(1e3 * (self.now() - start)))
        return took[-repeat:]

    def queued(self, call: Callable[[], object], repeat: int, calls: int = 4) -> list[float]:
        """Milliseconds of a call on the GPU where it has work before, as within a model: no launch is waited for."""
        if self.device.type == "cpu":
            return self.timed(call, repeat)
        x, took = torch.randn(8192, 8192, device=self.device, dtype=torch.bfloat16), []
        for _ in range(repeat + 1):
            dist.barrier()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(30):
                x @ x  # 40 ms
            first.record()
            for _ in range(calls):
                call()
            last.record()
            last.synchronize()
            took.append(self.largest(first.elapsed_time(last) / calls))
        return took[-repeat:]


class Loss(nn.Module):
    """Mean cross-entropy of the next tokens, whose logits are made CHUNK tokens at a time and made again backward."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "use_cache": False}
        hidden = self.model.model(**inputs).last_hidden_state
        chunks = zip(hidden.flatten(0, 1).split(CHUNK), targets.flatten().split(CHUNK), strict=True)
        losses = [checkpoint(self.summed, h, t, use_reentrant=False) for h, t in chunks]
        return torch.stack(losses).sum() / targets.numel()

    def summed(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model.lm_head(hidden).float(), targets, reduction="sum")


def build(name: str, arm: str, ranks: int, own: Processes) -> Any:
    sizes = MODELS[name] | ({**TINY, "num_key_value_heads": 8, "vocab_size": 64} if own.tiny else {})
    with own.device:
        model = models.build(arm if arm in models.ARMS else "softmax", **sizes)
        if arm == HEADS:
            attach(model, KAConfig(layers=()))
    if arm == RING:
        AttentionInterface.register("ring", _causal)  # without a mask function: zigzag positions would look packed
        model.config._attn_implementation = "ring"
    elif ranks > 1:
        sequence_parallel(model, own.group(ranks))
    return model.to(own.device).train()


def _causal(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: object, **options: Any) -> tuple[Tensor, None]:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous(), None


def sharded(loss: Loss, mesh: DeviceMesh) -> Any:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in loss.model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(loss, mesh=mesh, mp_policy=policy)


def data_parallel(own: Processes) -> Iterator[Row]:
    """Tokens a second of the 410 M hybrid, 16 texts of 2,048 tokens a GPU."""
    batch, length = (1, 64) if own.tiny else (16, 2048)
    for ranks in sorted(own.groups):
        for way in ("DDP", "FSDP2"):
            model = build("410M", HYBRID, 1, own)
            loss: Any = Loss(model)
            if way == "FSDP2":
                sharded(loss, own.meshes[ranks])
            elif ranks > 1:
                loss = DistributedDataParallel(loss, process_group=own.groups[ranks], gradient_as_bucket_view=True)
            ids = torch.randint(model.config.vocab_size, (batch, length + 1), device=own.device)
            positions = torch.arange(length, device=own.device)[None].expand(batch, -1)
            autocast = torch.autocast(own.device.type, torch.bfloat16) if way == "DDP" else nullcontext()
            call = step(loss, (ids[:, :-1], positions, ids[:, 1:]), autocast)
            took = own.timed(call, 8)
            speed = ranks * batch * length / (statistics.median(took) / 1e3)
            yield {"part": "data parallel", "model": "410M", "arm": HYBRID, "way": way, "ranks": ranks,
                   "tokens": length, "batch": batch, "ms": took, "tokens_per_s": speed}  # fmt: skip
            del model, loss, call


def step(loss: nn.Module, inputs: tuple[Tensor, ...], around: Any) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-4, fused=True)

    def call() -> None:
        with around:
            value = loss(*inputs)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def long_text(own: Processes, part: str, name: str, arm: str, ranks: int, length: int, repeat: int = 2) -> Row:
    """Steps on one text of ``length`` tokens in ``ranks`` shares."""
    row: Row = {"part": part, "model": name, "arm": arm, "ranks": ranks, "tokens": length}
    row["sent"] = ranks in own.groups
    gc.collect()  # the model before, which is part of cycles
    if own.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        with counted() as sent:
            model = build(name, arm, ranks, own)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            loss = sharded(Loss(model), own.mesh(ranks))
            text = torch.randint(model.config.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0))
            whole = text[:, :-1], torch.arange(length)[None], text[:, 1:]
            call = _ring_step(loss, whole, own, ranks) if arm == RING else _share_step(loss, whole, own, ranks)

            def once() -> None:
                sent[0] = 0
                call()

            took = own.timed(once, repeat)
    except (RuntimeError, TypeError, ValueError, AttributeError, ImportError, NotImplementedError) as error:
        return row | {"skipped": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]}
    peak = torch.cuda.max_memory_allocated() / 2**30 if own.device.type == "cuda" else 0.0
    kinds = [layer.self_attn.ka_layer.is_ka for layer in model.model.layers] if arm != RING and arm != "softmax" else []
    return row | {"ms": took, "peak_gib": own.largest(peak), "bytes_sent": sent[0],
                  "ka_layers": sum(kinds), "full_layers": model.config.num_hidden_layers - sum(kinds),
                  "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip


def _share_step(loss: Loss, whole: tuple[Tensor, ...], own: Processes, ranks: int) -> Callable[[], None]:
    names = ("input_ids", "position_ids", "shift_labels", "attention_mask")
    batch = dict(zip(names, whole, strict=False))
    found = share(batch, own.group(ranks)) if ranks > 1 else batch
    return step(loss, tuple(found[name].to(own.device) for name in names if name in found), nullcontext())


def _ring_step(loss: Loss, whole: tuple[Tensor, ...], own: Processes, ranks: int) -> Callable[[], None]:
    """PyTorch's context_parallel as accelerate calls it: it cuts the buffers, and reaches into attention."""
    from torch.distributed.tensor.experimental import context_parallel

    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-4, fused=True)

    def call() -> None:
        buffers = [x.to(own.device).clone() for x in whole]
        with context_parallel(
            own.meshes[ranks], buffers=buffers, buffer_seq_dims=[1] * 3, no_restore_buffers=set(buffers)
        ):
            loss(*buffers).backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def exactness(own: Processes, *, windows: list[tuple[int | None, bool]]) -> Iterator[Row]:
    """``windows``: and whether sequences are packed."""
    if (8, False) in windows:
        yield exact.losses(own.device, 64 if own.tiny else 2048)
    for window, is_packed in windows:
        yield from exact.errors(own.device, 64 if own.tiny else 4096, window, is_packed)


def calibration(own: Processes) -> Iterator[Row]:
    """Steps of one GPU from which the cost model is fitted; the rows it has to predict are others."""
    for length in (64, 128) if own.tiny else (65536, 196608):
        for arm in (WINDOWED, HYBRID):
            yield long_text(own, "calibration", "47M", arm, 1, length)


def launches(own: Processes) -> Iterator[Row]:
    """Steps that compute next to nothing: they take as long as a host needs to launch them."""
    for ranks in (1, max({4, 8} - own.groups.keys())):  # the others are not there, or messages would be counted twice
        yield long_text(own, "launches", "47M", WINDOWED, ranks, ranks * (64 if own.tiny else 2048), 5)


def long_texts(own: Processes, *, cases: list[tuple[str, str, int, int, float]]) -> Iterator[Row]:
    """``cases``: model, arm, ranks, tokens, and the seconds that must be left."""
    for name, arm, ranks, length, seconds in cases:
        length = length >> 10 if own.tiny else length
        if own.is_late(seconds):
            yield {"part": "long texts", "model": name, "arm": arm, "ranks": ranks, "tokens": length,
                   "sent": ranks in own.groups,
                   "skipped": f"less than {seconds:.0f} s were left"}  # fmt: skip
        else:
            yield long_text(own, "long texts", name, arm, ranks, length, 1 if seconds > 5 else 2)


def parts(n: int) -> dict[str, Callable[[Processes], Iterator[Row]]]:
    """Of ``n`` processes, in the order of their importance where time is short; the seconds are those of two H200."""
    counts = sorted({1, n, 8}) if n > 1 else [1, 2, 8]
    ends = [1, most := n if n > 1 else 8]

    def cases(arm: str, ranks: list[int], length: int, seconds: float, name: str = "47M") -> list[tuple]:
        return [(name, arm, count, length, seconds) for count in ranks]

    rings = [case for T, s in ((1 << 17, 5.0), (1 << 18, 15.0)) for case in cases(RING, [n], T, s)] * (n > 1)
    long = {
        "131k": cases(WINDOWED, counts, 1 << 17, 4.0) + cases(HYBRID, counts, 1 << 17, 5.0),
        "softmax": rings[:1] + cases(HEADS, [n], 1 << 17, 5.0) + rings[1:],
        "262k": cases(WINDOWED, ends, 1 << 18, 4.0) + cases(HYBRID, ends, 1 << 18, 9.0),
        "1m": cases(WINDOWED, counts, 1 << 20, 6.0),
        "1m-410M": cases(WINDOWED, [most], 1 << 20, 30.0, "410M"),
        "524k": cases(WINDOWED, ends, 1 << 19, 5.0) + cases(HYBRID, ends, 1 << 19, 25.0),
        "1m-hybrid": cases(HYBRID, [most], 1 << 20, 25.0),
        "largest": cases(WINDOWED, [1], 1 << 21, 15.0) + cases(WINDOWED, [1], 3 << 20, 25.0),
        "softmax-1": cases(HEADS, [1], 1 << 17, 9.0),
    }
    of = {name: partial(long_texts, cases=found) for name, found in long.items()}
    last = {name: of.pop(name) for name in ("1m-hybrid", "largest", "softmax-1")}
    return {
        "exact": partial(exactness, windows=[(8, False)]),
        "131k": of.pop("131k"),
        "data": data_parallel,
        "softmax": of.pop("softmax"),
        "bytes": bytes_sent,
        "constants": constants,
        "calibration": calibration,
        "launches": launches,
        **of,
        "exact-packed": partial(exactness, windows=[(8, True)]),
        "exact-full": partial(exactness, windows=[(None, False)]),
        **last,
    }


def work(rank: int, size: int, store: str, only: list[str] | None, until: float, tiny: bool, out: str) -> None:
    if device_type() == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device_type() == "cuda" else "gloo"
    patience = timedelta(seconds=60)  # of a process that waits for another
    dist.init_process_group(backend, store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=patience)
    own = Processes(rank, size, until, tiny)
    file = Path(out, "rows.json")
    rows: list[Row] = json.loads(file.read_text()) if only and file.exists() else []
    where = f"{size} × " * (device_type() == "cuda") + machine("transformers")
    found = parts(size)
    for name in found if only is None else only:
        for measured in found[name](own):
            row = measured | {"machine": where}
            rows = [other for other in rows if costs.kind(other) != costs.kind(row)] + [row]
            if rank == 0:
                print(json.dumps(measured), flush=True)
                file.write_text(json.dumps(rows))
    dist.destroy_process_group()
    time.sleep(1)  # threads of gloo give back their last messages, which they cannot once Python has ended


def measure(processes: int, only: list[str] | None, seconds: float, tiny: bool, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        arguments = processes, f"{folder}/store", only, time.time() + seconds, tiny, str(out)
        mp.spawn(work, arguments, nprocs=processes)


def run(out: Path = OUT) -> Iterator[str]:
    """All parts on all GPUs, and the report."""
    measure(torch.cuda.device_count() or 2, None, 600.0, not torch.cuda.is_available(), out)
    yield costs.write(out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--only", type=lambda text: text.split(","), help="parts, in this order")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no part that would end later")
    parser.add_argument("--tiny", action="store_true", help="models and texts of a test")
    parser.add_argument("--out", type=Path, default=OUT, help="docs/results/ranks, without a GPU runs/ranks")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    given = parser.parse_args(arguments)
    if unknown := set(given.only or ()).difference(names := parts(given.processes)):
        parser.error(f"--only: expected of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    if not given.report:
        measure(given.processes, given.only, given.seconds, given.tiny, given.out)
    print(costs.write(given.out))


if __name__ == "__main__":
    main()
