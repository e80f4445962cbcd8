"""The Triton backend beside PyTorch's attention and its relatives on one GPU: bfloat16, causal.

`python -m benchmarks.gpu --json PATH` also keeps the figures. Times are medians of CUDA-graph replays, so they are the
GPU's alone; `backward` is forward + backward less forward. A ratio is KA / peer.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import machine, table
from ka_attention import ka_attention
from ka_attention.ops import reference

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
WINDOWS = [(1, 16, 8192, 128, 64), (1, 16, 8192, 128, 256), (1, 16, 8192, 128, 1024)]
SCANS = [(1, 32, 8192, 64, 16), (1, 32, 8192, 64, 64)]
DECODES = [(8, 8, 2048, 64), (1, 32, 8192, 128), (16, 32, 2048, 128)]
RELATIVES = [(16, 8, 512, 64), (8, 8, 2048, 64), (1, 32, 8192, 128)]
GROUPED = (1, 32, 8, 8192, 128)
SEQUENCES = (4096, 512, 1900, 64, 777, 3000, 1, 5034)  # packed; 16 heads of 64

records: list[dict[str, Any]] = []


def run() -> Iterator[str]:
    """The tables, each as soon as it is there."""
    if not torch.cuda.is_available():
        yield "needs a CUDA device"
        return
    _check()
    yield _training()
    yield _others()
    yield _windows()
    yield _decoding()
    yield _relatives()


def _check() -> None:
    """What is wrong is not timed."""
    q, k, v, grad = _inputs(1, 2, 300, 64)
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = reference.dense(*inputs, *[None] * 5, scale=64**-0.5, window=None, softcap=None)
    wanted = torch.autograd.grad(truth, inputs, grad.double())
    out = ka_attention(q, k, v, backend="triton")
    for x, y in zip((out, *torch.autograd.grad(out, (q, k, v), grad)), (truth, *wanted), strict=True):
        assert (x - y).norm() < 0.02 * y.norm(), "the kernels are wrong"


def _training() -> str:
    rows = []
    for B, H, T, D in SHAPES:
        q, k, v, grad = _inputs(B, H, T, D)
        peers: dict[str, Callable] = {
            "FA2": _sdpa(SDPBackend.FLASH_ATTENTION),
            "cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
            "KA": partial(ka_attention, backend="triton"),
        }
        rows += _rows("causal", (B, H, T, D), 2 * B * H * T * T * D, peers, (q, k, v), grad)
    return table(
        ["case", "shape", "pass", "FA2 ms", "cuDNN ms", "KA ms", "KA TFLOP/s", "/ FA2", "/ cuDNN", "memory / FA2"], rows
    )


def _others() -> str:
    B, H, Hkv, T, D = GROUPED
    q, _, _, grad = _inputs(B, H, T, D)
    _, k, v, _ = _inputs(B, Hkv, T, D)
    peers: dict[str, Callable] = {
        "FA2": _sdpa(SDPBackend.FLASH_ATTENTION, enable_gqa=True),
        "KA": partial(ka_attention, backend="triton"),
    }
    rows = _rows("grouped 32/8", (B, H, T, D), 2 * B * H * T * T * D, peers, (q, k, v), grad)
    T = sum(SEQUENCES)
    q, k, v, grad = _inputs(1, 16, T, 64)
    cu = torch.tensor((0, *SEQUENCES)).cumsum(0).int().cuda()
    from torch.nn.attention.varlen import varlen_attn

    def packed_peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        longest = max(SEQUENCES)
        q, k, v = q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1)
        out: Any = varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0))
        return out.transpose(0, 1)[None]

    peers = {"FA2": packed_peer, "KA": partial(ka_attention, backend="triton", cu_seqlens=cu)}
    rows += _rows("packed ragged", (1, 16, T, 64), sum(2 * 16 * n * n * 64 for n in SEQUENCES), peers, (q, k, v), grad)
    return table(["case", "shape", "pass", "FA2 ms", "KA ms", "KA TFLOP/s", "/ FA2", "memory / FA2"], rows)


def _windows() -> str:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = torch.compile(flex_attention)
    rows = []
    for B, H, T, D, w in WINDOWS:

        def in_window(b: Tensor, h: Tensor, i: Tensor, j: Tensor, w: int = w) -> Tensor:
            return (j <= i) & (i - j < w)

        mask = create_block_mask(in_window, None, None, T, T, device="cuda")
        peers: dict[str, Callable] = {
            "Flex": partial(flex, block_mask=mask),
            "KA": partial(ka_attention, backend="triton", window=w),
        }
        q, k, v, grad = _inputs(B, H, T, D)
        rows += _rows(f"window {w}", (B, H, T, D), 4 * B * H * T * w * D, peers, (q, k, v), grad)
    return table(["case", "shape", "pass", "FlexAttention ms", "KA ms", "KA TFLOP/s", "/ Flex", "memory / Flex"], rows)


def _decoding() -> str:
    rows = []
    for B, H, P, D in DECODES:
        k, u = torch.randn(2, B, H, P, D, device="cuda", dtype=torch.bfloat16)
        q, k_new, v_new = torch.randn(3, B, H, 1, D, device="cuda", dtype=torch.bfloat16)
        keys, values = torch.cat([k, k_new], 2), torch.cat([u, v_new], 2)
        sdpa = _time(partial(F.scaled_dot_product_attention, q, keys, values))
        ka = _time(partial(ka_attention, q, k_new, v_new, past=(k, u), backend="triton"))
        _keep("decode", (B, H, P, D), "decode", {"SDPA": sdpa, "KA": ka})
        rows.append(["decode", f"{B}, {H}, {P}, {D}", f"{sdpa:.4f}", f"{ka:.4f}", f"{ka / sdpa:.2f}"])
    return table(["case", "B, H, past, D", "SDPA ms", "KA ms", "/ SDPA"], rows)


def _relatives() -> str:
    """The token loop, and flash-linear-attention's DeltaFormer and delta rule if that library is installed."""
    rows = []
    B, H, T, D = RELATIVES[0]
    q, k, v, _ = _inputs(B, H, T, D)
    with torch.no_grad():
        _token_loop(q, k, v)
        torch.cuda.synchronize()
        start = time.perf_counter()
        _token_loop(q, k, v)
        torch.cuda.synchronize()
        loop = 1e3 * (time.perf_counter() - start)
        ka = _time(partial(ka_attention, q, k, v, backend="triton"))
    _keep("token loop", (B, H, T, D), "forward", {"loop": loop, "KA": ka})
    rows.append(["token loop", f"{B}, {H}, {T}, {D}", "forward", f"{loop:.2f}", f"{ka:.3f}", f"{loop / ka:.0f}"])
    if importlib.util.find_spec("fla"):
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.deltaformer.parallel import BLOCK_SIZE_C, ParallelDeltaformerFunction

        def recursion(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
            return ParallelDeltaformerFunction.apply(q, k, v, beta, min(BLOCK_SIZE_C, q.shape[1]), None)

        cases: list[tuple] = [("fla DeltaFormer, recursion", recursion, *shape, None) for shape in RELATIVES]
        cases += [("fla chunk_delta_rule", chunk_delta_rule, *shape) for shape in SCANS]
        for name, function, B, H, T, D, w in cases:
            q, k, v, grad = _inputs(B, H, T, D)
            fla = [F.normalize(x.detach().transpose(1, 2).float(), dim=-1).to(x.dtype).requires_grad_() for x in (q, k)]
            fla.append(v.detach().transpose(1, 2).contiguous().requires_grad_())
            beta = torch.rand(B, T, H, device="cuda", dtype=q.dtype).requires_grad_()

            def theirs(*x: Tensor, function: Callable = function) -> Tensor:
                out = function(*x)
                return out[0] if isinstance(out, tuple) else out

            _warm_up()
            took = triton.testing.do_bench(_both(theirs, (*fla, beta), grad.transpose(1, 2)), return_mode="median")
            ours = _time_both(partial(ka_attention, backend="triton", window=w), (q, k, v), grad)
            label = name if w is None else f"{name}, KA window {w}"
            _keep(label, (B, H, T, D), "forward + backward", {"fla": took, "KA": ours})
            rows.append([label, f"{B}, {H}, {T}, {D}", "both", f"{took:.2f}", f"{ours:.3f}", f"{took / ours:.1f}"])
    return table(["peer", "shape", "pass", "peer ms", "KA ms", "peer / KA"], rows)


def _token_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The report's implementation: one token after the other."""
    weights = (q @ k.mT * q.shape[-1] ** -0.5).float()
    weights = (
        weights.masked_fill(torch.ones_like(weights, dtype=torch.bool).triu(1), -torch.inf).softmax(-1).to(q.dtype)
    )
    a = torch.empty_like(v)
    for i in range(q.shape[2]):
        a[:, :, i] = (weights[:, :, i, None, :i] @ a[:, :, :i])[:, :, 0] + weights[:, :, i, i, None] * v[:, :, i]
    return a


def _inputs(B: int, H: int, T: int, D: int) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    x = [torch.randn(B, H, T, D, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    return [*(x.requires_grad_() for x in x[:3]), x[3]]


def _sdpa(backend: SDPBackend, enable_gqa: bool = False) -> Callable:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)

    return attend


def _rows(case: str, shape: tuple, flops: float, peers: dict[str, Callable], inputs: tuple, grad: Tensor) -> list[list]:
    """Rows forward, backward and both. `flops` are the forward's; the backward's count as 2.5 times that."""
    with torch.no_grad():
        forward = {name: _time(partial(peer, *inputs)) for name, peer in peers.items()}
    both = {name: _time_both(peer, inputs, grad) for name, peer in peers.items()}
    memory = {name: _memory(peer, inputs, grad) for name, peer in peers.items()}
    passes = {
        "forward": (forward, 1.0),
        "backward": ({name: both[name] - forward[name] for name in peers}, 2.5),
        "both": (both, 3.5),
    }
    rows = []
    for label, (took, factor) in passes.items():
        _keep(case, shape, label, took, memory)
        others = [name for name in peers if name != "KA"]
        rows.append(
            [
                case,
                ", ".join(map(str, shape)),
                label,
                *(f"{took[name]:.3f}" for name in peers),
                f"{factor * flops / took['KA'] / 1e9:.0f}",
                *(f"{took['KA'] / took[name]:.2f}" for name in others),
                f"{memory['KA'] / memory[others[0]]:.2f}" if label == "both" else "",
            ]
        )
    return rows


def _keep(case: str, shape: tuple, label: str, took: dict[str, float], memory: dict[str, float] | None = None) -> None:
    records.append({"case": case, "shape": shape, "pass": label, "ms": took, "peak_mib": memory})


def _both(function: Callable, inputs: tuple, grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad)


def _time_both(function: Callable, inputs: tuple, grad: Tensor) -> float:
    return _time(_both(function, inputs, grad))


def _time(function: Callable[[], object]) -> float:
    """Milliseconds. An idle GPU runs at a fraction of its clock, so it is kept busy until its pace is steady."""
    function()
    _warm_up()
    return triton.testing.do_bench_cudagraph(function, rep=20, return_mode="median")


def _warm_up() -> None:
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        for _ in range(20):
            x @ x
        torch.cuda.synchronize()


def _memory(function: Callable, inputs: tuple, grad: Tensor) -> float:
    """MiB that are allocated at the peak of a forward and a backward pass, inputs included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() - sum(x.nbytes for x in (*inputs, grad))
    torch.cuda.reset_peak_memory_stats()
    _both(function, inputs, grad)()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="also write the figures there")
    path = parser.parse_args().json
    print(machine(), end="\n\n")
    for text in run():
        print(text, end="\n\n", flush=True)
    if path:
        with open(path, "w") as file:
            json.dump({"machine": machine(), "triton": triton.__version__, "records": records}, file, indent=1)
