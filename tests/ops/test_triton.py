"""The Triton kernels against float64, within an error budget, on the GPU or, small, in Triton's interpreter.

The interpreter must be chosen before triton is imported, so without a GPU a process of its own runs this file.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from problems import Problem

from ka_attention.ops import reference
from ka_attention.ops.api import normalise

CUDA = torch.cuda.is_available()
KERNELS = CUDA or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter multiplies bfloat16 wrongly.
HALVES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]

pytest.importorskip("triton")


def in_the_interpreter(file: str) -> None:
    """Run the tests of a file that need the kernels."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


if not KERNELS:

    def test_kernels_in_the_interpreter():
        in_the_interpreter(__file__)

    def test_cpu_tensors_are_refused():
        from ka_attention import ka_attention

        with pytest.raises(RuntimeError, match="'triton' needs a CUDA device, got q on cpu"):
            ka_attention(*torch.randn(3, 1, 1, 4, 16), backend="triton")


kernels = pytest.mark.skipif(not KERNELS, reason="needs a CUDA device or Triton's interpreter")

SMALL = {"B": 1, "Hq": 2, "Hkv": 1, "T": 70, "D": 16}
CASES = {
    "one block": {"T": 20},
    "one token": {"T": 1},
    "three blocks": {},
    "whole blocks": {"T": 64},
    "head dimension 24": {"D": 24, "T": 40},
    "multi-head": {"Hkv": 2, "B": 2, "T": 40},
    "gate per token": {"gate": "token"},
    "gate per head": {"gate": "head", "T": 40},
    "past": {"P": 37, "T": 40},
    "window over blocks": {"window": 40, "gate": "token", "T": 100},
    "window over blocks, past": {"window": 40, "gate": "token", "P": 40, "T": 100},
    "short window": {"window": 9},
    "short window, gate, past": {"window": 33, "gate": "token", "P": 20},
    "softcap": {"softcap": 1.5, "T": 40},
    "padding": {"mask": "left", "B": 2, "T": 40, "P": 10},
    "rows that attend nothing": {"mask": "any", "B": 2, "T": 40},
    "everything": {"mask": "full", "P": 20, "gate": "token", "window": 45, "softcap": 2.0},
    "everything, short window": {"mask": "full", "P": 20, "gate": "token", "window": 12, "softcap": 2.0},
    "packed": {"lengths": (33, 0, 1, 40), "gate": "token"},
    "packed, short window": {"lengths": (33, 0, 1, 40), "window": 7},
    "decode": {"T": 1, "P": 150, "gate": "token"},
    "decode, window, mask": {"T": 1, "P": 150, "window": 70, "mask": "full", "softcap": 2.0, "B": 2},
}


NAMES = ["a", "dq", "dk", "dv", "then dgate", "dk_past", "du_past"]


def on_device(problem: Problem):
    """The tensors and options a backend takes."""
    o = {"scale": None, "past": None, "attn_mask": None, "cu_seqlens": None} | problem.options
    order = ("gate", "scale", "window", "past", "attn_mask", "cu_seqlens", "softcap")
    call = normalise(problem.q, problem.k, problem.v, *(o[name] for name in order))
    return [None if x is None else x.detach().to(DEVICE) for x in call.tensors], call.options


def triton_pass(tensors, options, da):
    from ka_attention.ops.triton import backward, forward, outputs

    results = forward(*tensors, **options, save=True)
    for x, like in zip(results, outputs(tensors[0], True, options["window"]), strict=True):
        assert (x.shape, x.stride(), x.dtype) == (like.shape, like.stride(), like.dtype)
    grads = backward(da, *tensors, *results, **options)
    assert all(grad is None or grad.is_contiguous() for grad in grads)  # or the operator would copy them
    return [results[0], *(grad for grad in grads if grad is not None)]


def differentiate(function, tensors, options, da, dtype):
    """Output and gradients of a differentiable function of the arguments of a backend."""
    *floats, mask, cu = tensors
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in floats]
    out = function(*leaves, mask, cu, **options)
    grads = torch.autograd.grad(out, [x for x in leaves if x is not None], da.to(out.dtype), materialize_grads=True)
    return [out.detach(), *grads]


def plain(q, k, v, gate, k_past, u_past, mask, cu, **options):
    """The obvious implementation in q's own dtype: scores and softmax, then one token after the other."""
    dtype = q.dtype
    parts = reference._parts(
        q, k, v, gate, k_past, u_past, mask, cu, *(options[x] for x in ("scale", "window", "softcap"))
    )
    past, L, d, u_past, v, g = (x.to(dtype) for x in parts)
    x = past @ u_past + d * v
    a = []
    for i in range(q.shape[2]):
        row = x[:, :, i]
        if i:
            u = torch.stack(a, 2)
            u = v[:, :, :i] + g[:, :, :i, None] * (u - v[:, :, :i])
            row = row + (L[:, :, i, None, :i] @ u)[:, :, 0]
        a.append(row)
    return torch.stack(a, 2)


def assert_within_budget(problem: Problem):
    """At most twice the error of the plain implementation, plus one rounding of the inputs, which are of order one."""
    tensors, options = on_device(problem)
    da = torch.randn_like(tensors[0])
    truth = differentiate(reference.dense, tensors, options, da, torch.float64)
    rough = differentiate(plain, tensors, options, da, problem.dtype)
    for name, x, y, z in zip(NAMES, triton_pass(tensors, options, da), rough, truth, strict=False):
        rounding = torch.finfo(problem.dtype).eps * max(z.norm(), z.numel() ** 0.5)
        error, allowed = (x - z).norm(), 2 * (y - z).norm() + rounding
        assert error <= allowed, f"{name}: {error:.1e} > {allowed:.1e}"


@kernels
@pytest.mark.parametrize("name", CASES)
def test_float32(name):
    assert_within_budget(Problem(**SMALL | CASES[name], dtype=torch.float32))


@kernels
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["three blocks", "short window", "everything", "decode"])
def test_half_precision(name, dtype):
    assert_within_budget(Problem(**SMALL | CASES[name], dtype=dtype))


@kernels
@pytest.mark.parametrize("kind", ["near one-hot", "copies its predecessor", "sink", "constant"])
def test_hard_rows(kind):
    problem = Problem(**SMALL, dtype=torch.float16)
    with torch.no_grad():
        match kind:
            case "near one-hot":
                problem.q *= 10
            case "copies its predecessor":
                position = torch.nn.functional.normalize(torch.randn(1, 1, 71, 16), dim=-1)
                problem.q.copy_(200 * position[:, :, :-1])
                problem.k.copy_(position[:, :, 1:])
            case "sink":
                problem.k[:, :, 0] = 3 * problem.q.mean(2)[:, :1]
            case "constant":
                problem.q.zero_()
    assert_within_budget(problem)


@kernels
@pytest.mark.parametrize(
    "name", ["window over blocks, past", "short window, gate, past", "everything", "packed, short window"]
)
def test_windows_of_one_block_and_more_as_a_band(name, monkeypatch):
    from ka_attention.ops.triton import backend

    monkeypatch.setattr(backend, "_plans", {})
    monkeypatch.setattr(backend, "narrow_reach", lambda *_: None)
    assert_within_budget(Problem(**SMALL | CASES[name], dtype=torch.float32))


@kernels
@pytest.mark.parametrize("links", [1, 2])
@pytest.mark.parametrize("name", ["window over blocks", "short window", "gate per token", "packed", "padding"])
def test_longer_reaches_wait_from_block_to_block(name, links, monkeypatch):
    from ka_attention.ops.triton import backend, wide

    monkeypatch.setattr(backend, "_plans", {})
    monkeypatch.setattr(backend, "narrow_reach", lambda *_: None)
    for module in (backend, wide):
        monkeypatch.setattr(module, "band", lambda *_: 0)
    monkeypatch.setattr(wide, "links", lambda *_: links)
    assert_within_budget(Problem(**SMALL | CASES[name], dtype=torch.float32))


@kernels
@pytest.mark.parametrize("given", [{"B": 2, "T": 64}, {"P": 20, "T": 40}, {"lengths": (33, 7)}])
def test_heads_that_take_turns(given, monkeypatch):
    """Waves of two heads, the last of what is left, give what all heads together give."""
    from ka_attention.ops.triton import backend, wide

    def run(heads):
        monkeypatch.setattr(backend, "_plans", {})
        monkeypatch.setattr(wide, "wave", lambda *_: heads)
        monkeypatch.setattr(wide, "links", lambda *_: 1)
        return triton_pass(tensors, options, da)

    tensors, options = on_device(Problem(**SMALL | {"Hq": 3} | given, dtype=torch.float32))
    da = torch.randn_like(tensors[0])
    for of_two, together in zip(run(2), run(6), strict=True):
        assert torch.equal(of_two, together)


@pytest.mark.parametrize(
    ("heads", "size", "expected"), [(256, 2 << 20, 16), (64, 1 << 20, 64), (20, 8 << 20, 7), (32, 16 << 20, 8)]
)
def test_a_wave_fits_the_cache_and_fills_the_device(heads, size, expected, monkeypatch):

    from ka_attention.ops.triton import tiles

    h100 = SimpleNamespace(L2_cache_size=50 << 20, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h100)
    assert tiles.wave(torch.device("cuda"), heads, size) == expected


@kernels
@pytest.mark.parametrize("lengths", [(1, 33, 100), (30,)])
def test_a_band_as_long_as_the_sequence(lengths, monkeypatch):
    from ka_attention.ops.triton import backend, tiles, wide

    monkeypatch.setattr(backend, "_plans", {})
    for module in (backend, wide):
        monkeypatch.setattr(module, "band", tiles.reach)
    assert_within_budget(Problem(**SMALL | {"lengths": lengths, "gate": "token"}, dtype=torch.float32))


@pytest.mark.skipif(not CUDA, reason="in the interpreter one program runs after another")
@pytest.mark.parametrize("window", [None, 9, 40])
def test_same_bits_every_time(window):
    tensors, options = on_device(Problem(**SMALL | {"T": 100, "window": window, "dtype": torch.float16}))
    da = torch.randn_like(tensors[0])
    first, second = triton_pass(tensors, options, da), triton_pass(tensors, options, da)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@kernels
def test_autocast_leaves_it_alone():
    tensors, options = on_device(Problem(**SMALL | {"T": 40, "P": 20}, dtype=torch.float16))
    da = torch.randn_like(tensors[0])
    truth = triton_pass(tensors, options, da)
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.testing.assert_close(triton_pass(tensors, options, da), truth, rtol=0, atol=0)


@kernels
def test_layouts_of_models_give_the_same_bits():
    tensors, options = on_device(Problem(**SMALL | {"T": 40, "P": 20, "B": 2}, dtype=torch.float32))
    da = torch.randn_like(tensors[0])
    swapped = [x if i in (1, 3, 5) or x is None else x.transpose(1, 2).contiguous().transpose(1, 2)
               for i, x in enumerate(tensors)]  # fmt: skip
    for calls in (
        (triton_pass(tensors, options, da), triton_pass(swapped, options, da.transpose(1, 2).clone().transpose(1, 2))),
        (triton_pass(tensors, options, da[..., :1].expand_as(da)), triton_pass(tensors, options, da[..., :1] + 0 * da)),
    ):
        assert all(torch.equal(x, y) for x, y in zip(*calls, strict=True))


@kernels
@pytest.mark.parametrize("lengths", [(1, 2, 3), (0, 64, 0, 1, 33), (97,), (1,) * 40])
def test_packed_schedule_covers_every_block_in_order(lengths):
    from ka_attention.ops.triton.wide import Wide

    cu = torch.tensor((0, *lengths)).cumsum(0).int().to(DEVICE)
    q = torch.zeros(1, 1, sum(lengths), 16, device=DEVICE)
    plan = Wide(None, q, q, q, None, None, None, None, cu, 1.0, None, None, True)
    schedule = plan.schedule(cu, plan.BM).tolist()
    assert (len(schedule), 1, 1) == plan.rows.grid
    real = [(n, rank) for n, rank in schedule if rank * plan.BM < lengths[n]]
    assert sorted(real) == [(n, rank) for n, length in enumerate(lengths) for rank in range(-(-length // plan.BM))]
    assert [rank for _, rank in schedule] == sorted(rank for _, rank in schedule)


@kernels
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 1, 4, 16), torch.float64, "float16 or float32, got torch.float64"),
        ((1, 1, 4, 264), torch.float32, "up to 256"),
    ],
)
def test_what_it_cannot_do_is_refused(shape, dtype, message):
    from ka_attention import ka_attention

    x = torch.randn(shape, dtype=dtype, device=DEVICE)
    with pytest.raises(RuntimeError, match=message):
        ka_attention(x, x, x, backend="triton")


@kernels
def test_plans_are_shared_by_calls_of_one_layout_alone_and_keep_no_tensors():
    from ka_attention.ops.triton.backend import _plan

    def plan(T=8, scale=1.0, copy=lambda x: x, mask=None):
        q = torch.zeros(2, 2, T, 16, device=DEVICE)
        return _plan(None, q, copy(q), q, None, None, None, mask, None, scale, None, None, True)

    first = plan()
    assert plan() is first
    others = [
        plan(T=9),
        plan(scale=0.5),
        plan(copy=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        plan(copy=lambda x: x[:, :1]),
        plan(mask=torch.ones(1, 1, 1, 8, dtype=torch.bool, device=DEVICE)),
    ]
    assert all(other is not first for other in others)
    assert len({id(other) for other in others}) == 5
    assert not any(isinstance(x, torch.Tensor) for x in vars(first).values())
