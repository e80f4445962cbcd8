"""Pasts in pages in the Triton kernels. Runs as tests/ops/test_triton.py does."""

import pytest
import torch
from paged_calls import PagedCall
from test_triton import CUDA, DEVICE, HALVES, KERNELS, in_the_interpreter, kernels

from ka_attention.ops import paged
from ka_attention.ops.inputs import Past

if not KERNELS:

    def test_pasts_in_pages_in_the_interpreter():
        in_the_interpreter(__file__)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("seed", range(150) if CUDA else (1, 3, 4, 5, 18, 19))  # chains, rings, pieces, all gates
def test_random_calls(seed, dtype):
    sizes = ((1, 4, 64, 256), 300, (8, 64, 128)) if CUDA else ((1, 4, 16), 24, (8,))
    call = PagedCall(seed, dtype, *sizes)
    expected = call.expected()
    error = (call(DEVICE, backend="triton").double() - expected).norm()
    assert error <= {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype] * expected.norm()


@kernels
@pytest.mark.parametrize("seed", range(20) if CUDA else (14, 26))  # windows of 2 and 16
def test_more_sequences_than_a_kernel_looks_at_in_one_step(seed):
    call = PagedCall(seed, torch.float32, *(((64,), 30, (64,), 300) if CUDA else ((4,), 30, (8,), 20)))
    expected = call.expected()
    assert (call(DEVICE, backend="triton").double() - expected).norm() <= 5e-5 * expected.norm()


@kernels
@pytest.mark.parametrize("seed", range(20) if CUDA else (6, 18, 24))
def test_rings_that_are_read_in_pieces(seed):
    """They begin anywhere in a step: pieces of all steps are more than those of as many tokens."""
    sizes = ((1, 4, 64), 900, (64,), None, (300, 1000)) if CUDA else ((1, 4), 40, (8,), None, (33,))
    call = PagedCall(seed, torch.float32, *sizes)
    expected = call.expected()
    assert (call(DEVICE, backend="triton").double() - expected).norm() <= 5e-5 * expected.norm()


@kernels
@pytest.mark.parametrize("seed", range(20) if CUDA else (8, 48))  # no window, one of 100
def test_memory_that_nobody_has_written_reaches_nobody(seed, monkeypatch):
    from ka_attention.ops.triton import pasts

    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **options):
        x = new_empty(*args, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(pasts, "INTERPRETED", torch.device("meta"))  # the tiles of a GPU
    call = PagedCall(seed, torch.float32, (1, 4, 16), 60, (8,))
    expected = call.expected()
    assert (call(DEVICE, backend="triton").double() - expected).norm() <= 5e-5 * expected.norm()


@kernels
@pytest.mark.parametrize("kind", ["gate", "one", "softmax"])
def test_new_tokens_are_stored(kind):
    torch.manual_seed(0)
    H, T = 4, 21
    k, v, a = (torch.randn(1, h, T, 8) for h in (2, 2, H))
    gate, is_softmax = torch.rand(1, H, T) if kind == "gate" else None, kind == "softmax"
    place = torch.randperm(8 * 4)[:T]
    found = []
    for device, backend in (("cpu", "blocked"), (DEVICE, "triton")):
        pool = (torch.zeros(8, 2, 4, 8), torch.zeros(8, 2 if is_softmax else H, 4, 8))
        past = Past(*(x.to(device) for x in pool), torch.zeros(0), torch.zeros(0))
        new = [None if x is None else x.to(device) for x in (k, v, a, gate)]
        paged.store(*new, past, place.to(device) // 4, place.to(device) % 4, is_softmax, backend, (0.2, 0.7))
        found.append([x.cpu() for x in past[:2]])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@kernels
@pytest.mark.parametrize("seed", [9] if not CUDA else range(20))
def test_gates_are_clamped(seed):
    call = PagedCall(seed, torch.float32, *(((1, 4, 64), 300, (64,)) if CUDA else ((1, 4, 16), 24, (8,))))
    gate = 3 * torch.rand(1, call.new[0].shape[1], call.new[0].shape[2]) - 1
    options = {name: call.options[name] for name in ("window", "softcap")} | {"scale": 0.5}
    found = []
    for device, backend in (("cpu", "reference"), (DEVICE, "triton")):
        names = "block_table", "cache_seqlens", "cu_seqlens"
        pool, table, lengths, ends = call.tables["past"], *(call.tables[name].to(device) for name in names)
        pool = [x.to(device) for x in pool]
        groups = call.new[0].shape[1] // pool[1].shape[1]  # more than one for the values of softmax layers
        pool[1] = pool[1].repeat_interleave(groups, dim=1)
        new = [x.to(device) for x in (*call.new, gate)]
        found.append(paged.run(*new, Past(*pool, table, lengths), ends, options, False, backend, (0.2, 0.7)).cpu())
    assert (found[0] - found[1]).norm() <= 5e-5 * found[0].norm()
