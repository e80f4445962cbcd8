"""The blocked backend beside `scaled_dot_product_attention` (float32, two threads), into docs/results/cpu.md.

Training, windows, training beside another busy process, decoding; times and peak memory. Then whole models: a prefill
and a token more after it.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from benchmarks import models
from benchmarks.harness import machine, medians, peak_memory, table
from ka_attention import ka_attention
from ka_attention.hf import KACache, cache_bytes

THREADS = 2
TRAINING = [(32, 8, 128, 64), (4, 8, 512, 64), (1, 8, 2048, 64), (1, 8, 8192, 64)]
DECODING = [(8, 8, 128, 64), (1, 8, 2048, 64), (8, 8, 2048, 64)]
WINDOWS = (4, 16, 64)
CONTEXTS = (128, 2048, 8192)
WAITING: dict[str, dict[str, str]] = {
    "PyTorch's": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}  # of threads for one another
PEERS: dict[str, Callable] = {
    "SDPA": partial(F.scaled_dot_product_attention, is_causal=True),
    "KA": partial(ka_attention, backend="blocked"),
    **{f"KA, window {w}": partial(ka_attention, backend="blocked", window=w) for w in WINDOWS},
    **{f"softmax, window {w}": partial(ka_attention, backend="blocked", window=w, gate=0.0) for w in WINDOWS},
}
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "cpu.md"
MARK = "<!-- python -m benchmarks cpu -->\n"  # before and after the tables in RESULTS


def run() -> Iterator[str]:
    """The tables, each as soon as it is there; at the end all of them are written to RESULTS."""
    torch.set_num_threads(THREADS)
    q, k, v = (torch.randn(2, 2, 300, 16) for _ in range(3))
    for window in (None, *WINDOWS):  # wrong is not timed
        exact = ka_attention(q, k, v, window=window, backend="reference")
        torch.testing.assert_close(ka_attention(q, k, v, window=window, backend="blocked"), exact)
    parts = [machine()]
    for part in _tables():
        yield part
        parts.append(part)
    before, _, after = RESULTS.read_text().split(MARK)
    RESULTS.write_text(MARK.join([before, "\n" + "\n\n".join(parts) + "\n\n", after]))


def _tables() -> Iterator[str]:
    compared = ["pass", "SDPA ms", "KA ms", "KA / SDPA"]
    rows = [_row(shape, backward) for shape in TRAINING for backward in (False, True)]
    yield table(["B, H, T, D", *compared, "SDPA MiB", "KA MiB"], rows)
    header = ["B, H, T, D", "window", "SDPA, none, ms", "KA ms", "KA / SDPA", "softmax ms", "softmax / SDPA"]
    yield (
        "Windows, forward + backward, over SDPA without one; softmax is the same operator with a gate of 0:\n\n"
        + table(header, [row for shape in TRAINING[1:] for row in _windows(shape)])
    )
    rows = [_beside_work(waiting, shape) for shape in TRAINING[:3] for waiting in WAITING]
    yield "Beside a process that keeps one of the two cores busy:\n\n" + table(
        ["B, H, T, D", "threads wait", *compared], rows
    )
    yield table(["B, H, past, D", *compared], [_decode(shape) for shape in DECODING])
    yield (
        "A Llama of 4 layers of 512 (8 heads), one text: its prefill, a token more through a growing cache, and that "
        "cache. The windows are of 8 tokens, a gate is learned for each head:\n\n"
        + table(["tokens", "model", "prefill ms", "token ms", "cache KiB"], _models())
    )


def training_step(peer: str, shape: tuple[int, ...], backward: bool) -> Callable[[], object]:
    """A call of the forward pass, or of both, on inputs that are there already."""
    torch.set_num_threads(THREADS)

    def step(shape: tuple[int, ...]) -> Callable[[], object]:
        inputs = [torch.randn(shape, requires_grad=backward) for _ in range(3)]
        grad = torch.randn(shape)
        return lambda: torch.autograd.grad(PEERS[peer](*inputs), inputs, grad) if backward else PEERS[peer](*inputs)

    step((1, 1, 64, 16))()  # the first call with a gradient imports 30 MiB of modules
    return step(shape)


def training_times(shape: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds of a forward and a backward pass of SDPA and KA."""
    return medians({peer: training_step(peer, shape, True) for peer in ("SDPA", "KA")})


def _row(shape: tuple[int, ...], backward: bool) -> list[str]:
    took = medians({peer: training_step(peer, shape, backward) for peer in ("SDPA", "KA")})
    memory = [peak_memory(training_step, peer, shape, backward) for peer in ("SDPA", "KA")]
    return [
        *_compared(shape, "forward + backward" if backward else "forward", took),
        *("n/a" if used is None else f"{used:.0f}" for used in memory),
    ]


def _windows(shape: tuple[int, ...]) -> Iterator[list[str]]:
    peers = ["SDPA", *(f"{kind}, window {w}" for w in WINDOWS for kind in ("KA", "softmax"))]
    took = medians({peer: training_step(peer, shape, True) for peer in peers}, seconds=4.0)
    for w in WINDOWS:
        both = [took[f"{kind}, window {w}"] for kind in ("KA", "softmax")]
        figures = [text for ms in both for text in (f"{ms:.1f}", f"{ms / took['SDPA']:.3f}")]
        yield [", ".join(map(str, shape)), str(w), f"{took['SDPA']:.1f}", *figures]


def _beside_work(waiting: str, shape: tuple[int, ...]) -> list[str]:
    """In a process of its own, since the way to wait is read as PyTorch loads."""
    with _environment(WAITING[waiting]), _busy_core(), multiprocessing.get_context("spawn").Pool(1) as pool:
        took = pool.apply(training_times, (shape,))
    return [", ".join(map(str, shape)), waiting, *_compared(shape, "forward + backward", took)[1:]]


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.pop(name, None) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _busy_core() -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _spin() -> None:
    while True:
        pass


def _decode(shape: tuple[int, ...]) -> list[str]:
    """One new token after a cached past. A KV cache costs SDPA no more than a KA cache costs here: neither is grown."""
    k, u = torch.randn(2, *shape)
    q, k_new, v_new = torch.randn(3, *shape[:2], 1, shape[3])
    keys, values = torch.cat([k, k_new], 2), torch.cat([u, v_new], 2)
    took = medians(
        {
            "SDPA": lambda: F.scaled_dot_product_attention(q, keys, values),
            "KA": lambda: ka_attention(q, k_new, v_new, past=(k, u), backend="blocked"),
        }
    )
    return _compared(shape, "decode", took)


@torch.inference_mode()
def _models() -> Iterator[list[str]]:
    arms = {name: models.build(name, num_hidden_layers=4).eval() for name in models.ARMS}
    for length in CONTEXTS:
        tokens = torch.randint(models.LLAMA["vocab_size"], (1, length))
        caches = {name: _cache(model) for name, model in arms.items()}
        prefills = medians({name: partial(_read, model, tokens) for name, model in arms.items()}, seconds=6.0)
        for name, model in arms.items():
            _read(model, tokens, caches[name])
        held = {name: cache_bytes(cache) / 1024 for name, cache in caches.items()}
        steps = medians({name: partial(_read, model, tokens[:, :1], caches[name]) for name, model in arms.items()})
        for name in arms:
            yield [f"{length:,}", name, f"{prefills[name]:.0f}", f"{steps[name]:.2f}", f"{held[name]:,.0f}"]


def _cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config) if model.config._attn_implementation == "sdpa" else KACache(model.config)


def _read(model: Any, tokens: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """The logits of the last token, after all that the cache holds and `tokens`."""
    cache = _cache(model) if cache is None else cache
    return model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits


def _compared(shape: tuple[int, ...], what: str, took: dict[str, float]) -> list[str]:
    sdpa, ka = took["SDPA"], took["KA"]
    return [", ".join(map(str, shape)), what, f"{sdpa:.2f}", f"{ka:.2f}", f"{ka / sdpa:.2f}"]
