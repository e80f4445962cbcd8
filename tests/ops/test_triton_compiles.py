"""The kernels compile for a GPU, without one: what Triton's interpreter runs, its compiler may still refuse.

In a process of its own, as the interpreter's tests are: there Triton's driver is one that knows a target and no device,
and tensors have shapes and no contents.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

SHAPE = {"B": 1, "Hq": 2, "Hkv": 1, "T": 600, "D": 64, "dtype": torch.bfloat16}
CASES = {
    "a block of state": {"window": 8, "gate": "token", "P": 40, "mask": "full"},
    "two blocks of state": {"window": 20, "gate": "head"},
    "four blocks of state, float32": {"window": 64, "dtype": torch.float32, "softcap": 2.0},
    "a wide window": {"window": 100, "gate": "token", "P": 40},
    "no window": {"gate": "head"},
}


def without_a_gpu() -> None:
    """Let launches compile for compute capability 9.0 and end there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from ka_attention.ops.triton import backend, launcher

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=0: 0)

    driver.set_active(Driver())
    run = triton.JITFunction.run
    triton.JITFunction.run = lambda *given, warmup, **options: run(*given, warmup=True, **options)
    properties = SimpleNamespace(
        multi_processor_count=132, shared_memory_per_block_optin=232448, L2_cache_size=60 << 20
    )
    torch.cuda.get_device_properties = lambda *_: properties
    backend._check = launcher.private_names = lambda *_: None


def compile_attention(given) -> None:
    from problems import Problem

    from ka_attention.ops.api import normalise
    from ka_attention.ops.triton import backward, forward

    p = Problem(**SHAPE | given)
    options = {"scale": None, "past": None, "attn_mask": None, "cu_seqlens": None} | p.options
    names = "gate", "scale", "window", "past", "attn_mask", "cu_seqlens", "softcap"
    tensors, options = normalise(p.q, p.k, p.v, *(options[name] for name in names))
    tensors = [None if x is None else x.detach().to("meta") for x in tensors]
    results = forward(*tensors, **options, save=True)
    backward(torch.empty_like(tensors[0]), *tensors, *results, **options)


def compile_ring(slots: int = 8) -> None:
    from ka_attention.ops.triton.ring import step

    heads = (4, 1), (2, 1), (2, 1), (2, slots), (4, slots)
    q, k, v, *ring = (torch.empty(2, h, n, 64, device="meta") for h, n in heads)
    count, gate = torch.empty((), dtype=torch.int64, device="meta"), torch.empty(4, device="meta")
    mask = torch.empty(2, 1, 1, slots + 22, dtype=torch.bool, device="meta")
    step(q, k, v, tuple(ring), count, gate, (0.0, 1.0), slots, mask, 0.125, None)


def compile_pages(new: int, window: int | None, gated: bool = True) -> None:
    from ka_attention.ops.inputs import Past, Slots
    from ka_attention.ops.triton import paged, store

    def there(*size, dtype=torch.bfloat16):
        return torch.empty(size, dtype=dtype, device="meta")

    q, k, v = (there(1, heads, 3 * new, 64) for heads in (4, 2, 2))
    past = Past(there(9, 2, 16, 64), there(9, 4, 16, 64), there(3, 3, dtype=torch.int32), there(3, dtype=torch.int32))
    gate, ends = there(1, 4, 3 * new) if gated else None, there(4, dtype=torch.int32)
    a = paged(q, k, v, gate, past, ends, 0.125, window, None, False, (0.0, 1.0))
    slots = Slots(there(3 * new, dtype=torch.int64), 16, 0)
    store(k, v, a, gate, past, slots, False, (0.0, 1.0))


ALL: dict[str, Callable[[], None]] = {
    **{name: lambda given=given: compile_attention(given) for name, given in CASES.items()},
    "a ring": compile_ring,
    "a ring of many slots": lambda: compile_ring(512),
    "steps after pages": lambda: compile_pages(1, None),
    "chunks after pages": lambda: compile_pages(50, None),
    "chunks after rings": lambda: compile_pages(1500, 8),
    "chunks after rings, gate 1": lambda: compile_pages(1500, 40, gated=False),
}


def test_kernels_compile_without_a_gpu():
    run = subprocess.run(
        [sys.executable, __file__],
        env={name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split("\n")[:-1] == list(ALL)


if __name__ == "__main__":
    without_a_gpu()
    for name, compile_one in ALL.items():
        compile_one()
        print(name, flush=True)
