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


def text(T=8, D=16, Hkv=2, slots=5, gate=1.0, own=True, window=None, softcap=None, mask=False):
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

    monkeypatch.setattr(module, "_launches", {})
    if name.startswith("more slots"):
        monkeypatch.setattr(module, "MOST_ROWS", 4)

    def kernel(q, k, v, ring, count, *, gate, bounds, window, mask, scale, softcap):
        return dispatch.load("triton").step(q, k, v, ring, count, gate, bounds, window, mask, scale, softcap)

    given = text(**CASES[name])
    truth = decode(ring_step, *given)
    for dtype in [torch.float32, torch.float16] if name == "KA" or CUDA else [torch.float32]:
        found = decode(kernel, *given, dtype=dtype, device=DEVICE)
        for x, y in zip(found, truth, strict=True):
            assert (x - y).abs().max() <= 16 * torch.finfo(dtype).eps, dtype


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
