"""Bytes that narrow windows move between a GPU and its memory, by the counters that Nsight Compute reads.

The least is q, k, v and A forward, and q, k, v, A, dA, dq, dk and dv backward, each moved once. Caches are left as the
kernel before leaves them. Needs `ncu` on the path and a GPU whose counters may be read.
"""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

import torch

from benchmarks.harness import table
from benchmarks.timing import NARROW, inputs
from ka_attention import ka_attention

WINDOWS = (2, 16)
PROFILER = (
    "ncu --profile-from-start off --clock-control none --cache-control none --print-units base --csv "
    "--metrics dram__bytes_read.sum,dram__bytes_write.sum"
)


def calls() -> None:
    """A forward and a backward pass of each shape and window under the profiler, after some that compile."""
    for shape, window in product(NARROW, WINDOWS):
        *operands, grad = inputs(*shape)
        for profiled in (False, True):
            if profiled:
                torch.cuda.profiler.start()
            out = ka_attention(*operands, window=window, backend="triton")
            torch.autograd.grad(out, operands, grad)
            torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def counted(lines: Iterable[str]) -> list[tuple[float, float]]:
    """Bytes of forward and backward of each call, from what `ncu --csv` prints: each pass has its first kernel."""
    found: list[list[float]] = []
    for row in csv.DictReader(line for line in lines if line.startswith('"')):
        if row["Kernel Name"].startswith("weights_kernel") and row["Metric Name"] == "dram__bytes_read.sum":
            found.append([0.0, 0.0])
            backward = False
        backward = backward or row["Kernel Name"].startswith(("adjoint_walk_kernel", "gradients_kernel"))
        found[-1][backward] += float(row["Metric Value"].replace(",", ""))
    return [(forward, backward) for forward, backward in found]


def run() -> Iterator[str]:
    """The table."""
    command = [*PROFILER.split(), sys.executable, "-m", "benchmarks.traffic"]
    ran = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE, text=True)
    lines = []
    for (shape, window), found in zip(product(NARROW, WINDOWS), counted(ran.stdout.splitlines()), strict=True):
        for label, moved, tensors in zip(("forward", "backward"), found, (4, 8), strict=True):
            least = tensors * 2 * math.prod(shape)  # bfloat16
            case = f"window {window}", ", ".join(map(str, shape)), label
            lines.append([*case, f"{least / 1e6:.0f}", f"{moved / 1e6:.0f}", f"{moved / least:.2f}"])
    yield table(["case", "shape", "pass", "least MB", "MB", "ratio"], lines)


if __name__ == "__main__":
    calls()
