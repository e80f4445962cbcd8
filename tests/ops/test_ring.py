"""Decoding through a ring: the step against the operator on the whole text, and its kernel against the step.

The kernel's tests run as tests/ops/test_triton.py does: on the GPU, or in a process of its own in Triton's interpreter.
"""

import pytest
import torch
from test_triton import CUDA, DEVICE, KERNELS, in_the_interpreter, kernels

from ka_attention import ka_attention
from ka_attention.ops import dispatch, ring
from ka_attention.ops.ring import ring_step

if not KERNELS:

    def test_rings_in_the_interpreter():
        in_the_interpreter(__file__)


CASES = {
    "KA": {},
    "softmax, heads of the keys": {"gate": 0.0, "own": False},
    "softmax, own heads": {"gate": 0.0},
    "a number": {"gate": 0.3},
    "gate per head": {"gate": "head"},
    "gate per token": {"gate": "token"},
    "a narrower window": {"window": 3, "gate": "head"},
    "softcap": {"softcap": 1.5, "gate": "head"},
    "mask": {"mask": True, "gate": "head"},
    "mask, softcap, narrower": {"mask": True, "softcap": 2.0, "window": 4},
    "one slot": {"slots": 1, "gate": "head"},
    "more slots than are read at once": {"slots": 7, "gate": "token"},
    "head dimension 24": {"D": 24, "gate": "head"},
    "multi-head": {"Hkv": 4},
}


def text(T=7, D=16, Hkv=2, slots=5, gate=1.0, own=True, window=None, softcap=None, mask=False):
    """A text, its gates before they are in bounds, and the options of its steps."""
    q, k, v = (torch.randn(2, H, T, D, dtype=torch.float64) for H in (4, Hkv, Hkv))
    if isinstance(gate, str):
        gate = 1.5 * torch.rand((4,) if gate == "head" else (2, 4, T), dtype=torch.float64)
    seen = None
    if mask:
        seen = torch.rand(2, T) > 0.3
        seen[0, :3] = False  # padding: rows that may attend nothing
    sizes = [(2, heads, slots, D) for heads in (Hkv, 4 if own else Hkv)]
    return q, k, v, gate, seen, sizes, {"window": window or slots, "softcap": softcap}


def decode(step, q, k, v, gate, seen, sizes, options, dtype=torch.float64, device="cpu"):
    """Outputs of all tokens, one after another, and the ring at the end."""
    ring = tuple(torch.zeros(size, dtype=dtype, device=device) for size in sizes)
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    out = []
    for t in range(q.shape[2]):
        g = gate
        if isinstance(gate, torch.Tensor):
            g = (gate if gate.ndim == 1 else gate[:, :, t : t + 1]).to(device)
        mask = None if seen is None else seen[:, None, None, : t + 1].to(device)
        one = (x[:, :, t : t + 1] for x in (q, k, v))
        count = torch.tensor(t + 1, device=device)
        out.append(step(*one, ring, count, gate=g, bounds=(0.0, 1.0), mask=mask, scale=0.25, **options))
    return torch.cat(out, 2).cpu(), *(x.cpu() for x in ring)


@pytest.mark.parametrize("name", CASES)
def test_steps_give_what_the_whole_text_gives(name):
    q, k, v, gate, seen, _, options = given = text(**CASES[name])
    if isinstance(gate, torch.Tensor):
        gate = gate.clamp(0, 1)
    whole = ka_attention(q, k, v, gate=gate, attn_mask=seen, scale=0.25, **options)
    assert torch.allclose(decode(ring_step, *given)[0], whole, atol=1e-13)


def test_what_the_kernel_does_not_give_is_left_to_pytorch():
    def fits(which=None, dtype=torch.float32):
        q, k, v, keys, values = torch.ones(5, 1, 2, 1, 8, dtype=dtype).unbind()
        tensors = {"q": q, "k": k, "v": v, "gate": torch.ones(2)}
        if which:
            tensors[which].requires_grad_()
        return ring._is_for_the_kernel(tensors["q"], tensors["k"], tensors["v"], (keys, values), tensors["gate"])

    assert [fits(dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)] == [True, True, False]
    for which in ("q", "k", "v", "gate"):  # the kernel would lose their gradients without a word
        assert not fits(which)
        with torch.no_grad():
            assert fits(which)


@kernels
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_does_the_step(name, monkeypatch):
    from ka_attention.ops.triton import ring as module

    monkeypatch.setattr(module, "_plans", {})
    if name.startswith("more slots"):
        monkeypatch.setattr(module, "TILE", 256)

    def kernel(q, k, v, ring, count, *, gate, bounds, window, mask, scale, softcap):
        return dispatch.load("triton").step(q, k, v, ring, count, gate, bounds, window, mask, scale, softcap)

    given = text(**CASES[name])
    truth = decode(ring_step, *given)
    for dtype in [torch.float32, torch.float16] if name == "KA" or CUDA else [torch.float32]:
        found = decode(kernel, *given, dtype=dtype, device=DEVICE)
        for x, y in zip(found, truth, strict=True):
            assert (x - y).abs().max() <= 16 * torch.finfo(dtype).eps, dtype


MANY = {
    "whole": {},
    "a narrower window": {"window": 170, "gate": "head"},
    "partly filled": {"count": 131, "gate": "head"},
    "the first token": {"count": 1},
    "200 slots, grouped": {"slots": 200, "count": 201, "Hkv": 1, "gate": "token"},
    "three heads a key head": {"Hq": 6, "gate": 0.3},
    "softmax, heads of the keys": {"gate": 0.0, "own": False},
    "softmax, heads of the keys, mask": {"gate": 0.0, "own": False, "mask": "holes"},
    "softcap": {"softcap": 1.5, "gate": "head"},
    "mask": {"mask": "holes", "gate": "head"},
    "mask, partly filled": {"mask": "holes", "count": 131, "window": 90, "softcap": 2.0, "Hkv": 1},
    "mask of heads, grouped": {"mask": "of heads", "Hkv": 1, "slots": 200},
    "nothing in sight": {"mask": "nothing", "gate": "head"},
    "head dimension 24": {"D": 24, "slots": 200},
}


@kernels
@pytest.mark.parametrize("name", MANY)
def test_many_slots_are_read_in_pieces(name, monkeypatch):
    check_pieces(monkeypatch, **MANY[name])


def check_pieces(monkeypatch, slots=300, window=None, count=1000, Hq=4, Hkv=2, D=16, gate=1.0, own=True, mask=None,
                 softcap=None):  # fmt: skip
    """A step of the kernels (on a GPU two) against one in float64. What nobody has written or sees is NaN."""
    from ka_attention.ops.triton import ring as module

    monkeypatch.setattr(module, "_plans", {})
    if not CUDA:
        monkeypatch.setattr(module, "TILE", 1024)  # several steps a piece
    *one, keys, values = (
        torch.randn(2, H, n, D, dtype=torch.float64)
        for H, n in ((Hq, 1), (Hkv, 1), (Hkv, 1), (Hkv, slots), (Hq if own else Hkv, slots))
    )
    if isinstance(gate, str):
        gate = 1.5 * torch.rand((Hq,) if gate == "head" else (2, Hq, 1), dtype=torch.float64)
    window = window or slots
    age = (count - 1 - torch.arange(slots)) % slots
    unread = (age >= count).expand(2, slots)
    if mask is not None:
        columns = min(count, window + 5)
        mask = torch.rand(2, Hq if mask == "of heads" else 1, 1, columns) > (1.0 if mask == "nothing" else 0.5)
        column = columns - 1 - age
        unread = unread | (~mask.any(1)[:, 0, column.clamp(min=0)] & (column >= 0))
    options = {"bounds": (0.0, 1.0), "window": window, "scale": 0.25, "softcap": softcap}

    def step(function, ring, dtype=torch.float64, device="cpu"):
        def to(x):
            return x.to(device, dtype) if isinstance(x, torch.Tensor) else x

        ring = tuple(x.to(device, dtype, copy=True) for x in ring)
        seen = None if mask is None else mask.to(device)
        rest = {**options, "gate": to(gate), "mask": seen}
        return [x.cpu() for x in (function(*map(to, one), ring, torch.tensor(count, device=device), **rest), *ring)]

    def kernel(q, k, v, ring, count, *, gate, bounds, window, mask, scale, softcap):
        return module.step(q, k, v, ring, count, gate, bounds, window, mask, scale, softcap)

    truth = step(ring_step, (keys, values))
    ring = [x.masked_fill(unread[:, None, :, None], float("nan")) for x in (keys, values)]
    for dtype in [torch.float32, torch.bfloat16] if CUDA else [torch.float32]:
        found = step(kernel, ring, dtype, DEVICE)
        again = step(kernel, ring, dtype, DEVICE) if CUDA else found  # in the interpreter programs run in order
        for x, y, z in zip(found, truth, again, strict=True):
            assert torch.equal(x.nan_to_num(9.0), z.nan_to_num(9.0))
            if x.shape[2] == slots:
                written = ~unread | (age == 0)
                x, y = (tensor.transpose(1, 2)[written] for tensor in (x, y))
            assert (x - y).abs().max() <= 16 * torch.finfo(dtype).eps, dtype
    assert all(pieces > 1 for _, _, pieces in module._plans.values())


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_graph_counts_for_itself():
    """A captured step serves all later tokens, as the count is on the device."""
    from ka_attention.ops.triton.ring import step

    def tokens(captured):
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 2, 4, 1, 64, device=DEVICE).unbind()
        ring, count = tuple(torch.randn(2, 2, 4, 300, 64, device=DEVICE)), torch.tensor(299, device=DEVICE)

        def call():
            count.add_(1)
            return step(q, k, v, ring, count, 1.0, (0.0, 1.0), 300, None, 0.125, None)

        call()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                a = call()
        for _ in range(4):
            q.add_(0.1), k.mul_(0.9), v.add_(0.2)
            if captured:
                graph.replay()
            else:
                a = call()
        return a, *ring

    for x, y in zip(tokens(False), tokens(True), strict=True):
        assert torch.equal(x, y)


@kernels
def test_strides_do_not_matter():
    from ka_attention.ops.triton.ring import step

    q, k, v, gate, _, sizes, options = text(gate="head", T=1)
    found = []
    for layout in ("heads", "tokens", "apart"):
        ring = [torch.ones(size, dtype=torch.float32, device=DEVICE) for size in sizes]
        one = [x.to(DEVICE, torch.float32) for x in (q, k, v)]
        if layout == "tokens":
            ring = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in ring]
        if layout == "apart":
            one = [torch.stack([x, x], -1)[..., 0] for x in one]
        count = torch.tensor(9, device=DEVICE)
        rest = options["window"], None, 0.25, None
        found.append((step(*one, tuple(ring), count, gate.to(DEVICE), (0.0, 1.0), *rest), *ring))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
