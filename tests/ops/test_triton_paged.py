"""Pasts in pages in the Triton kernels. Runs as tests/ops/test_triton.py does."""

import pytest
import torch
from paged_calls import PagedCall
from test_triton import CUDA, DEVICE, HALVES, KERNELS, in_the_interpreter, kernels

from ka_attention.ops import paged
from ka_attention.ops.inputs import Past, Slots

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
@pytest.mark.parametrize("window", [2, 8, 17, 20, 65])
@pytest.mark.parametrize("seed", range(12) if CUDA else (0, 4))
def test_many_tokens_after_pasts_in_narrow_windows(seed, window, monkeypatch):
    """The first tokens of each sequence, then the rest after them; padding is of no sequence."""
    from ka_attention.ops.triton import pasts

    taken, after_first = [], pasts._after_first
    monkeypatch.setattr(pasts, "_after_first", lambda *given: taken.append(1) or after_first(*given))
    # Registers of a GPU hold float32 of so many heads and rows in a few cases only.
    dtype, sizes = (torch.bfloat16, ((1, 4, 7, 64), 300, (64, 128))) if CUDA else (torch.float32, ((1, 4, 7), 40, (8,)))
    calls = (PagedCall(100 * seed + i, dtype, *sizes, None, (window,)) for i in range(99))
    call = next(c for c in calls if c.ends[-1] > 4 * len(c.ends) and not (isinstance(c.gate, int) and c.gate == 0))
    expected = call.expected()
    error = (call(DEVICE, backend="triton").double() - expected).norm()
    assert error <= {torch.float32: 5e-5, torch.bfloat16: 3e-2}[dtype] * expected.norm()
    assert taken


@kernels
def test_padding_is_0_whatever_it_holds():
    """After the first tokens of sequences, so that layers after this one meet nothing that is not finite."""
    torch.manual_seed(0)
    new = [torch.randn(1, h, 40, 8) for h in (4, 2, 2)]
    pool, ends = (torch.randn(5, 2, 4, 8), torch.randn(5, 4, 4, 8)), torch.tensor([0, 9, 33], dtype=torch.int32)
    table, lengths = torch.tensor([[2, 0], [4, 1]], dtype=torch.int32), torch.tensor([5, 0], dtype=torch.int32)
    options, found = {"scale": 0.5, "window": 5, "softcap": None}, []
    for padding in (0.0, torch.nan):
        for x in new:
            x[:, :, 33:] = padding
        there = [x.to(DEVICE) for x in (*new, torch.rand(1, 4, 40, generator=torch.Generator().manual_seed(0)))]
        past = Past(*(x.to(DEVICE) for x in (*pool, table, lengths)))
        found.append(paged.run(*there, past, ends.to(DEVICE), options, False, "triton", (0.0, 1.0)).cpu())
    assert torch.equal(*found)
    assert found[0][:, :, 33:].count_nonzero() == 0


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
    place[::5] = 99  # of these nobody will read
    found = []
    for device, backend in (("cpu", "blocked"), (DEVICE, "triton")):
        pool = (torch.zeros(8, 2, 4, 8), torch.zeros(8, 2 if is_softmax else H, 4, 8))
        past = Past(*(x.to(device) for x in pool), torch.zeros(0), torch.zeros(0))
        new = [None if x is None else x.to(device) for x in (k, v, a, gate)]
        paged.store(*new, past, Slots(place.to(device), 4, 99), is_softmax, backend, (0.2, 0.7))
        found.append([x.cpu() for x in past[:2]])
    assert all(int((x != 0).any(3).any(1).sum()) == int((place < 99).sum()) for pool in found for x in pool)
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
