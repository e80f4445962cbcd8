"""The Triton backend beside PyTorch's attention and its relatives on one GPU: bfloat16, causal.

`python -m benchmarks.gpu [--only SECTION,…] [--json FILE]`; `python -m benchmarks.goals FILE` judges the figures. Times
are medians of CUDA-graph replays, so they are the GPU's alone, except those of the token loop and of DeltaFormer, which
are of calls as Python makes them, on both sides. `backward` is forward + backward less forward. A ratio is KA / peer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import peers
from benchmarks.decode import step
from benchmarks.goals import Record, section_table
from benchmarks.harness import machine
from benchmarks.timing import NARROW, both_passes, inputs, passes, replayed, sdpa, warm_up
from ka_attention import ka_attention
from ka_attention.ops import reference
from ka_attention.ops.ring import ring_step

SHAPES = [
    (32, 8, 128, 64),
    (16, 8, 512, 64),
    (8, 8, 2048, 64),
    (2, 16, 4096, 64),
    (1, 16, 8192, 64),
    (4, 16, 2048, 128),
    (2, 16, 4096, 128),
    (1, 32, 8192, 128),
    (1, 32, 16384, 128),
    (1, 8, 16384, 128),
]
HEADS = [
    ("heads of 80", (2, 16, 4096, 80), torch.bfloat16),
    ("heads of 96", (2, 16, 4096, 96), torch.bfloat16),
    ("heads of 256", (2, 8, 4096, 256), torch.bfloat16),
    ("float16", (2, 16, 4096, 128), torch.float16),
]
GROUPED = (1, 32, 8, 8192, 128)
SEQUENCES = (4096, 512, 1900, 64, 777, 3000, 1, 5034)  # packed; 16 heads of 64
NARROW_WINDOWS = (2, 4, 8, 16, 64)
SHORT = [(32, 8, 128, 64), (16, 8, 512, 64)]
WINDOWED = (1, 16, 8192, 128)
WINDOWS = (256, 1024)
RINGS = [(1, 16, 64), (32, 16, 64), (32, 32, 128)]  # batch, heads, head dimension
SLOTS = (8, 512, 4096)
DECODES = [(8, 8, 2048, 64), (1, 32, 8192, 128), (16, 32, 2048, 128)]
VERSIONS = ("triton", "transformers", "flash-linear-attention")
FIRST = (8, 8, 2048, 64)
KA: Callable[..., Tensor] = partial(ka_attention, backend="triton")


def causal() -> Iterator[Record]:
    """The shapes that matter, beside both of PyTorch's fast backends."""
    backends = {"FA2": sdpa(SDPBackend.FLASH_ATTENTION), "cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION)}
    for B, H, T, D in SHAPES:
        *operands, grad = inputs(B, H, T, D)
        yield from passes(
            "causal", "causal", (B, H, T, D), 2 * B * H * T * T * D, backends | {"KA": KA}, operands, grad
        )


def heads() -> Iterator[Record]:
    """Other head sizes, and float16."""
    flash = sdpa(SDPBackend.FLASH_ATTENTION)
    for case, (B, H, T, D), dtype in HEADS:
        *operands, grad = inputs(B, H, T, D, dtype)
        flops = 2 * B * H * T * T * D
        yield from passes("head sizes", case, (B, H, T, D), flops, {"FA2": flash, "KA": KA}, operands, grad)


def grouped_and_packed() -> Iterator[Record]:
    """Grouped queries, and sequences of many lengths in one row."""
    B, H, Hkv, T, D = GROUPED
    q, _, _, grad = inputs(B, H, T, D)
    _, k, v, _ = inputs(B, Hkv, T, D)
    flash = sdpa(SDPBackend.FLASH_ATTENTION, enable_gqa=True)
    section, flops = "grouped and packed", 2 * B * H * T * T * D
    yield from passes(section, "grouped 32/8", (B, H, T, D), flops, {"FA2": flash, "KA": KA}, (q, k, v), grad)

    from torch.nn.attention.varlen import varlen_attn

    T, longest = sum(SEQUENCES), max(SEQUENCES)
    *operands, grad = inputs(1, 16, T, 64)
    cu = torch.tensor((0, *SEQUENCES), device=grad.device).cumsum(0).int()

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        out: Any = varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0))
        return out.transpose(0, 1)[None]

    flops = sum(2 * 16 * n * n * 64 for n in SEQUENCES)
    ours = partial(KA, cu_seqlens=cu)
    yield from passes(section, "packed ragged", (1, 16, T, 64), flops, {"FA2": packed, "KA": ours}, operands, grad)


def narrow() -> Iterator[Record]:
    """Narrow windows, beside FlexAttention and FlashAttention-2 with the same."""
    for shape in NARROW:
        yield from beside_windows("narrow window", shape, NARROW_WINDOWS)


def windows() -> Iterator[Record]:
    """Wide windows, likewise."""
    yield from beside_windows("window", WINDOWED, WINDOWS)


def beside_windows(section: str, shape: tuple[int, int, int, int], windows: Sequence[int]) -> Iterator[Record]:
    """Records of one shape. FlexAttention reads the window from a tensor, so that it is compiled once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, H, T, D = shape
    *operands, grad = inputs(*shape)
    window = torch.tensor(0, device=grad.device)

    def in_window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < window)

    flex = torch.compile(flex_attention, dynamic=False)
    for w in windows:
        window.fill_(w)
        mask = create_block_mask(in_window, None, None, T, T, device=grad.device)
        attentions: dict[str, Callable[..., Any]] = {
            "Flex": partial(flex, block_mask=mask),
            "KA": partial(KA, window=w),
        }
        found = list(passes(section, f"window {w}", shape, 4 * B * H * T * w * D, attentions, operands, grad))
        for record, took in zip(found, flash_window(shape, w), strict=True):
            record["ms"] = {"Flex": record["ms"]["Flex"], "FA2": took, "KA": record["ms"]["KA"]}
            yield record


def flash_window(shape: tuple[int, int, int, int], window: int) -> list[float]:
    """Milliseconds of forward, backward and both of FlashAttention-2's own window, in its own layout."""
    from torch.nn.attention.varlen import varlen_attn

    B, H, T, D = shape
    *operands, grad = (x.detach() for x in inputs(1, B * T, H, D))
    q, k, v = (x[0].requires_grad_() for x in operands)
    cu = torch.arange(B + 1, dtype=torch.int32, device=grad.device) * T

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return varlen_attn(q, k, v, cu, cu, T, T, window_size=(window - 1, 0))

    with torch.no_grad():
        forward = replayed(partial(attend, q, k, v))
    both = replayed(both_passes(attend, (q, k, v), grad[0]))
    return [forward, both - forward, both]


def short_windows() -> Iterator[Record]:
    """A narrow window where sequences are short, beside FlashAttention-2 without one."""
    flash = sdpa(SDPBackend.FLASH_ATTENTION)
    for B, H, T, D in SHORT:
        *operands, grad = inputs(B, H, T, D)
        both: dict[str, Callable[..., Any]] = {"FA2": flash, "KA": partial(KA, window=8)}
        yield from passes("short window", "window 8", (B, H, T, D), 4 * B * H * T * 8 * D, both, operands, grad)


@torch.no_grad()
def decoding() -> Iterator[Record]:
    """One new token through the cache of a layer, buffers of fixed size and growing ones, beside a KV cache."""
    for B, H, P, D in DECODES:
        past, new = inputs(B, H, P, D)[:2], inputs(B, H, 1, D)[:3]
        for case, static in (("static cache", True), ("growing cache", False)):
            took = {kind: replayed(step(kind, static, past, new)) for kind in ("KV", "KA")}
            yield {"section": "decode", "case": case, "shape": [B, H, P, D], "pass": "decode", "ms": took}


@torch.no_grad()
def rings() -> Iterator[Record]:
    """One new token through a ring, beside PyTorch's attention to as many keys and values, which stores nothing."""
    for (B, H, D), S in product(RINGS, SLOTS):
        q, k, v = (x.detach() for x in inputs(B, H, 1, D)[:3])
        keys, values = (x.detach() for x in inputs(B, H, S, D)[:2])
        count = torch.tensor(S + 100, device=q.device)
        options: dict[str, Any] = {"gate": 1.0, "window": S, "mask": None, "scale": D**-0.5, "softcap": None}
        calls = {
            "SDPA": partial(F.scaled_dot_product_attention, q, keys, values),
            "KA": partial(ring_step, q, k, v, (keys, values), count, **options),
        }
        took = {name: replayed(call) for name, call in calls.items()}
        yield {"section": "ring", "case": f"{S:,} slots", "shape": [B, H, S, D], "pass": "step", "ms": took}


def first_call() -> Iterator[Record]:
    """Milliseconds of the first forward and backward of a process: nothing compiled yet, then again from the cache; and
    how many kernels later calls compile that differ in T, B and the window's value alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        for case, window in (("first call", None), ("first call, window 8", 8)):
            for label in ("fresh", "cached"):
                command = [sys.executable, "-c", f"from benchmarks.gpu import first; print(first({FIRST}, {window}))"]
                environment = {**os.environ, "TRITON_CACHE_DIR": f"{folder}/{window}"}
                root = Path(__file__).parents[1]
                out = subprocess.run(
                    command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True
                ).stdout
                took, later = map(float, out.split()[-2:])
                record = {"section": "first call", "case": case, "shape": list(FIRST), "pass": label}
                yield record | {"ms": {"KA": took}, "compiled_later": int(later)}


def first(shape: tuple[int, int, int, int], window: int | None) -> str:
    """Milliseconds of one forward and backward on inputs that are there already, and the kernels compiled after it."""
    *operands, grad = inputs(*shape)
    torch.cuda.synchronize()
    start = time.perf_counter()
    torch.autograd.grad(KA(*operands, window=window), operands, grad)
    torch.cuda.synchronize()
    took = 1e3 * (time.perf_counter() - start)
    folder, (B, H, T, D) = Path(os.environ["TRITON_CACHE_DIR"]), shape
    before = len(list(folder.iterdir()))
    for changed, w in (((B, H, T + 64, D), window), ((B + 1, H, T, D), window), (shape, window and 5)):
        *operands, grad = inputs(*changed)
        torch.autograd.grad(KA(*operands, window=w), operands, grad)
    return f"{took} {len(list(folder.iterdir())) - before}"


SECTIONS: dict[str, Callable[[], Iterator[Record]]] = {
    "causal": causal,
    "heads": heads,
    "grouped": grouped_and_packed,
    "narrow": narrow,
    "short": short_windows,
    "windows": windows,
    "decode": decoding,
    "ring": rings,
    "loop": peers.token_loops,
    "deltaformer": peers.deltaformers,
    "deltarule": peers.delta_rules,
    "first": first_call,
}


def check() -> None:
    """What is wrong is not timed."""
    *operands, grad = inputs(1, 2, 300, 64)
    exact = [x.detach().double().requires_grad_() for x in operands]
    truth = reference.dense(*exact, *[None] * 5, scale=64**-0.5, window=None, softcap=None)
    wanted = torch.autograd.grad(truth, exact, grad.double())
    out = KA(*operands)
    for x, y in zip((out, *torch.autograd.grad(out, operands, grad)), (truth, *wanted), strict=True):
        assert (x - y).norm() < 0.02 * y.norm(), "the kernels are wrong"


def run(sections: list[str] | None = None, path: Path | None = None) -> Iterator[str]:
    """The tables, each as soon as it is there; ``path`` gets every figure at once."""
    if not torch.cuda.is_available():
        yield "needs a CUDA device"
        return
    check()
    warm_up(3.0)  # what is timed first in a process comes out slower, by up to 15 %
    records: list[Record] = []
    for name in sections or SECTIONS:
        began = time.perf_counter()
        found: list[Record] = []
        for record in SECTIONS[name]():
            found.append(record)
            if path:
                path.write_text(json.dumps({"machine": machine(*VERSIONS), "records": records + found}, indent=1))
        records += found
        yield f"{section_table(found)}\n\n({name}: {time.perf_counter() - began:.0f} s)"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"some of the sections: {','.join(SECTIONS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args(argv)
    chosen = arguments.only.split(",") if arguments.only else None
    if unknown := sorted(set(chosen or ()) - set(SECTIONS)):
        parser.error(f"--only: no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    print(machine(*VERSIONS), end="\n\n")
    for text in run(chosen, arguments.json):
        print(text, end="\n\n", flush=True)


if __name__ == "__main__":
    main()
