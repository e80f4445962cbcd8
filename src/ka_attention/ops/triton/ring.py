"""A step of decoding through a ring, as one kernel (ops/ring.py says what it computes)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ka_attention.ops.triton.launcher import Launch
from ka_attention.ops.triton.plan import strides
from ka_attention.ops.triton.primitives import capped
from ka_attention.ops.triton.tiles import padded

MOST_ROWS = 64  # slots read at once
MAX_LAUNCHES = 1024

_launches: dict[tuple, Launch] = {}


def step(q, k, v, ring, count, gate, bounds, window, mask, scale, softcap) -> Tensor:
    """`ops.ring.ring_step` on a GPU."""
    keys, values = ring
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    number, g = (1.0, gate) if isinstance(gate, Tensor) else (float(gate), None)
    tensors = q, k, v, keys, values, count, g, mask
    layout = [None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors]
    key = (q.device, *layout, number, bounds, window, scale, softcap)
    launch = _launches.get(key)
    if launch is None:
        if len(_launches) >= MAX_LAUNCHES:
            _launches.clear()
        launch = _launches[key] = _launch(tensors, number, bounds, window, scale, softcap)
    a = torch.empty_like(q, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(q):
        launch(*tensors, a)
    return a


def _launch(tensors, number, bounds, window, scale, softcap) -> Launch:
    q, k, v, keys, values, _, g, mask = tensors
    (B, H, _, D), slots = q.shape, keys.shape[2]
    numbers = (
        *(strides(x)[:2] for x in (q, k, v)), *(strides(x)[:3] for x in (keys, values)),
        (0, 0) if g is None else (0, g.stride(0)) if g.ndim == 1 else strides(g)[:2],
        (0, 0, 0) if mask is None else (*strides(mask)[:2], mask.stride(-1)),
        H, slots, window, 0 if mask is None else mask.shape[-1], scale, softcap or 0.0, number, *bounds,
    )  # fmt: skip
    return Launch(
        step_kernel, (B * H,), *numbers,
        GROUP=H // k.shape[1], SHARED=H // values.shape[1], D=D, BD=padded(D),
        ROWS=min(MOST_ROWS, triton.next_power_of_2(slots)),
        HAS_GATE=g is not None, HAS_MASK=mask is not None, SOFTCAP=softcap is not None,
        num_warps=4, num_stages=2,
    )  # fmt: skip


@triton.jit(do_not_specialize=["mask_strides", "H", "slots", "window", "columns"])
def step_kernel(
    Q, K, V, KEYS, VALUES, COUNT, G, MASK, A,
    q_strides, k_strides, v_strides, keys_strides, values_strides, gate_strides, mask_strides,
    H, slots, window, columns, scale, softcap, gate, low, high,
    GROUP: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A program for each query head: A = Σ W U of the ring + W V of the new token, whose slot nobody reads.

    A key head is stored by the first of the GROUP query heads that read it, U by the first of the SHARED query heads
    that have it in common.
    """
    b = tl.cast(tl.program_id(0) // H, tl.int64)
    h = tl.program_id(0) % H
    d = tl.arange(0, BD)
    inside = d < D
    last = tl.load(COUNT) - 1
    q = tl.load(Q + b * q_strides[0] + h * q_strides[1] + d, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(K + b * k_strides[0] + h // GROUP * k_strides[1] + d, mask=inside, other=0.0)
    v = tl.load(V + b * v_strides[0] + h // GROUP * v_strides[1] + d, mask=inside, other=0.0)
    KEYS += b * keys_strides[0] + h // GROUP * keys_strides[1]
    VALUES += b * values_strides[0] + h // SHARED * values_strides[1]
    first = tl.maximum(last + 1 - columns, 0)  # the position of the mask's first column

    top = capped(tl.sum(q * k.to(tl.float32), 0), scale, softcap, SOFTCAP)
    if HAS_MASK:
        MASK += b * mask_strides[0] + h * mask_strides[1]
        top = tl.where(tl.load(MASK + (last - first) * mask_strides[2]) != 0, top, float("-inf"))
    total = tl.where(top > float("-inf"), 1.0, 0.0)
    a = v.to(tl.float32) * total
    for start in range(0, slots, ROWS):
        slot = start + tl.arange(0, ROWS)
        age = (last - slot) % slots
        seen = (slot < slots) & (slot <= last) & (age > 0) & (age < window)
        if HAS_MASK:
            column = tl.maximum(last - age - first, 0)
            seen = seen & (tl.load(MASK + column * mask_strides[2], mask=seen, other=0) != 0)
        rows = seen[:, None] & inside[None, :]
        slot = tl.cast(slot, tl.int64)[:, None]
        keys = tl.load(KEYS + slot * keys_strides[2] + d[None, :], mask=rows, other=0.0).to(tl.float32)
        s = tl.where(seen, capped(tl.sum(keys * q[None, :], 1), scale, softcap, SOFTCAP), float("-inf"))
        higher = tl.maximum(top, tl.max(s, 0))
        base = tl.where(higher > float("-inf"), higher, 0.0)
        w = tl.math.exp2(s - base)
        values = tl.load(VALUES + slot * values_strides[2] + d[None, :], mask=rows, other=0.0).to(tl.float32)
        shrink = tl.math.exp2(top - base)
        a = a * shrink + tl.sum(w[:, None] * values, 0)
        total = total * shrink + tl.sum(w, 0)
        top = higher
    a = (a / tl.where(total > 0, total, 1.0)).to(A.dtype.element_ty)
    tl.store(A + (b * H + h) * D + d, a, mask=inside)

    slot = last % slots
    if h % GROUP == 0:
        tl.store(KEYS + slot * keys_strides[2] + d, k, mask=inside)
    if HAS_GATE:
        g = tl.load(G + b * gate_strides[0] + h * gate_strides[1]).to(tl.float32)
        gate = tl.minimum(tl.maximum(g, low), high)
    v = v.to(tl.float32)
    u = tl.where(gate == 0, v, tl.where(gate == 1, a.to(tl.float32), v + gate * (a.to(tl.float32) - v)))
    if h % SHARED == 0:
        tl.store(VALUES + slot * values_strides[2] + d, u.to(VALUES.dtype.element_ty), mask=inside)
