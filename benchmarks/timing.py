"""Times and peak memory on one GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.goals import Record

Attention = Callable[..., Any]
NARROW = [(1, 16, 8192, 128), (8, 16, 2048, 64), (1, 32, 32768, 64)]  # shapes of narrow windows


def inputs(B: int, H: int, T: int, D: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> list[Tensor]:
    """q, k, v that need gradients, and the gradient of the output, each ``[B, H, T, D]``."""
    x = [torch.randn(B, H, T, D, device=device, dtype=dtype) for _ in range(4)]
    return [*(x.requires_grad_() for x in x[:3]), x[3]]


def sdpa(backend: SDPBackend, enable_gqa: bool = False) -> Attention:
    """PyTorch's causal attention by one of its backends."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)

    return attend


def passes(
    section: str,
    case: str,
    shape: Sequence[int],
    flops: float,
    peers: Mapping[str, Attention],
    operands: Sequence[Tensor],
    grad: Tensor,
) -> Iterator[Record]:
    """Records of forward, backward and both. ``flops`` are the forward's; the backward's count as 2.5 times that."""
    with torch.no_grad():
        forward = {name: replayed(partial(peer, *operands)) for name, peer in peers.items()}
    both = {name: replayed(both_passes(peer, operands, grad)) for name, peer in peers.items()}
    peaks = {name: peak_mib(peer, operands, grad) for name, peer in peers.items()}
    backward = {name: both[name] - forward[name] for name in peers}
    for label, took, factor in (("forward", forward, 1.0), ("backward", backward, 2.5), ("both", both, 3.5)):
        rate = factor * flops / took["KA"] / 1e9
        record = {"section": section, "case": case, "shape": list(shape), "pass": label, "ms": took, "tflops": rate}
        yield record | ({"peak_mib": peaks} if label == "both" else {})


def both_passes(attention: Attention, operands: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
    """A call of forward and backward; of several outputs the first counts."""

    def call() -> object:
        out = attention(*operands)
        return torch.autograd.grad(out[0] if isinstance(out, tuple) else out, operands, grad)

    return call


def replayed(function: Callable[[], object]) -> float:
    """Median milliseconds of the replays of a CUDA graph: the GPU's time alone."""
    function()
    warm_up()
    return triton.testing.do_bench_cudagraph(function, rep=20, return_mode="median")


def called(function: Callable[[], object]) -> float:
    """Median milliseconds of calls as Python makes them, launches included."""
    function()
    warm_up()
    return triton.testing.do_bench(function, rep=50, return_mode="median")


def warm_up(seconds: float = 0.3) -> None:
    """An idle GPU runs at a fraction of its clock: keep it busy until its pace is steady."""
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(20):
            x @ x
        torch.cuda.synchronize()


def peak_mib(attention: Attention, operands: Sequence[Tensor], grad: Tensor) -> float:
    """MiB that are allocated at the peak of a forward and a backward pass, inputs included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() - sum(x.nbytes for x in (*operands, grad))
    torch.cuda.reset_peak_memory_stats()
    both_passes(attention, operands, grad)()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
