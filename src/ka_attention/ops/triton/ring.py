"""A step of decoding through a ring (ops/ring.py says what it computes): one kernel, or two where slots are many.

Then the first reads pieces of the ring side by side, as flash-decoding does, and the second what they gave.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ka_attention.ops.triton.launcher import Launch
from ka_attention.ops.triton.plan import strides
from ka_attention.ops.triton.primitives import capped
from ka_attention.ops.triton.tiles import padded, segments

TILE = 8192  # bytes of U read at once
STAGES = 3  # of a loop: two steps are on their way
PROGRAMS = 4  # a multiprocessor, as many as pieces are made for
MAX_PLANS = 1024

_plans: dict[tuple, tuple[Launch | None, Launch, int]] = {}


def step(q, k, v, ring, count, gate, bounds, window, mask, scale, softcap) -> Tensor:
    """`ops.ring.ring_step` on a GPU."""
    keys, values = ring
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    number, g = (1.0, gate) if isinstance(gate, Tensor) else (float(gate), None)
    tensors = q, k, v, keys, values, count, g, mask
    layout = [None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors]
    key = (q.device, *layout, number, bounds, window, scale, softcap)
    if key not in _plans:
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        _plans[key] = _plan(tensors, number, bounds, window, scale, softcap)
    read, end, pieces = _plans[key]
    a, part, lse = torch.empty_like(q, memory_format=torch.contiguous_format), None, None
    with torch.cuda.device_of(q):
        if read is not None:
            part, lse = (q.new_empty(*q.shape[:2], pieces, *size, dtype=torch.float32) for size in (q.shape[3:], ()))
            read(*tensors, part, lse, None)
        end(*tensors, part, lse, a)
    return a


def _plan(tensors, number, bounds, window, scale, softcap) -> tuple[Launch | None, Launch, int]:
    """The launch that reads pieces, where there are several, the one that ends the step, and how many pieces."""
    q, k, v, keys, values, _, g, mask = tensors
    (B, H, _, D), slots, group, BD = q.shape, keys.shape[2], q.shape[1] // k.shape[1], padded(q.shape[3])
    heads = min(group & -group, 4)  # of those of one key head, so many read it together
    pieces = segments(q.device, B * H // heads, slots // 16, PROGRAMS)
    heads = heads if pieces > 1 else 1  # that end a step
    rows = min(max(1, TILE // (heads * BD * q.element_size())), triton.next_power_of_2(slots))
    span = triton.cdiv(slots, pieces * rows) * rows
    pieces = triton.cdiv(slots, span)
    lines = *(strides(x)[:2] for x in (q, k, v)), *(strides(x)[:3] for x in (keys, values))
    columns = (0, 0, 0, 0) if mask is None else (*strides(mask)[:2], mask.stride(-1), mask.shape[-1])
    gates = (0, 0) if g is None else (0, g.stride(0)) if g.ndim == 1 else strides(g)[:2]
    numbers = lines, columns, gates, H, slots, span, window, pieces, scale, softcap, number, *bounds
    constants = {
        "GROUP": group, "SHARED": H // values.shape[1], "D": D, "BD": BD, "ROWS": rows,
        "PIECES": triton.next_power_of_2(pieces), "STAGES": min(STAGES, span // rows), "num_warps": 4,
    }  # fmt: skip
    read = Launch(step_kernel, (B * H // heads, pieces), *numbers, HEADS=heads, **constants) if pieces > 1 else None
    return read, Launch(step_kernel, (B * H,), *numbers, HEADS=1, **constants), pieces


@triton.jit
def _walk(Q, K, V, KEYS, VALUES, COUNT, MASK, n, piece, lines, columns, H, slots, span, window, scale, softcap,
          HEADS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
          ROWS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """What `_join` gives of heads n … n + HEADS, all of one key head, over a piece, the first with the new token."""
    OWN: tl.constexpr = HEADS if SHARED == 1 or MASK is not None else 1  # heads of U: what a mask hides is not read
    q_strides, k_strides, v_strides, keys_strides, values_strides = lines
    b, h, last = tl.cast(n // H, tl.int64), n % H, tl.load(COUNT) - 1
    row, d = tl.arange(0, ROWS)[:, None], tl.arange(0, BD)[None, :]
    head, own = h + tl.arange(0, HEADS), ((h + tl.arange(0, OWN)) // SHARED).to(tl.int64)[:, None]
    inside, key_head = (d < D)[None], tl.cast(h // GROUP, tl.int64)
    q = tl.load(Q + b * q_strides[0] + head[:, None] * q_strides[1] + d, mask=d < D, other=0.0).to(tl.float32)[None]
    k = tl.load(K + b * k_strides[0] + key_head * k_strides[1] + d, mask=d < D, other=0.0).to(tl.float32)[None]
    v = tl.load(V + b * v_strides[0] + key_head * v_strides[1] + d, mask=d < D, other=0.0).to(tl.float32)[None]
    KEYS += b * keys_strides[0] + key_head * keys_strides[1] + (row[:, :, None] * keys_strides[2] + d[None])
    VALUES += b * values_strides[0] + ((own * values_strides[1] + d)[None] + row[:, :, None] * values_strides[2])
    newest, column, start = (last % slots).to(tl.int32), tl.minimum(last, columns[3] - 1).to(tl.int32), piece * span
    stop = tl.minimum(tl.minimum(start + span, slots), last + 1).to(tl.int32)  # nobody has written what is beyond
    # Each row of a tile has a state of its own, so that threads wait for one another at the end alone.
    seen = row + start == 0
    if MASK is not None:
        MASK += b * columns[0] + head[None, :] * columns[1]
        seen = seen & (tl.load(MASK + column * columns[2]) != 0)
    top = tl.where(seen, capped(tl.sum(q * k, 2), scale, softcap, softcap is not None), float("-inf"))
    total = tl.where(seen, 1.0, tl.zeros([ROWS, HEADS], tl.float32))
    a = tl.where(total[:, :, None] > 0, v, 0.0)
    for slot in tl.range(start, stop, ROWS, num_stages=STAGES):
        age = newest - slot - row
        age = tl.where(age < 0, age + slots, age)
        seen = (slot + row < stop) & (age > 0) & (age < window)
        at = tl.cast(slot, tl.int64)
        keys = tl.load(KEYS + at * keys_strides[2], mask=seen[:, :, None] & inside, other=0.0).to(tl.float32)
        if MASK is not None:
            seen = seen & (tl.load(MASK + tl.maximum(column - age, 0) * columns[2], mask=seen, other=0) != 0)
        u = tl.load(VALUES + at * values_strides[2], mask=seen[:, :, None] & inside, other=0.0).to(tl.float32)
        s = tl.where(seen, capped(tl.sum(keys * q, 2), scale, softcap, softcap is not None), float("-inf"))
        higher = tl.maximum(top, s)
        base = tl.where(higher > float("-inf"), higher, 0.0)
        w, shrink = tl.math.exp2(s - base), tl.math.exp2(top - base)
        a = a * shrink[:, :, None] + w[:, :, None] * u
        total = total * shrink + w
        top = higher
    return _join(top, total, a)


@triton.jit
def _join(top, total, a):
    """The softmax state of all rows together: the highest score and Σ w, [HEADS], and Σ w U, [HEADS, BD]."""
    highest = tl.max(top, 0)
    w = tl.math.exp2(top - tl.where(highest > float("-inf"), highest, 0.0)[None, :])
    return highest, tl.sum(total * w, 0), tl.sum(a * w[:, :, None], 0)


@triton.jit(do_not_specialize=["columns", "H", "slots", "span", "window", "pieces"])
def step_kernel(
    Q, K, V, KEYS, VALUES, COUNT, G, MASK, PART, LSE, A,
    lines, columns, gate_strides, H, slots, span, window, pieces, scale, softcap, gate, low, high,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program for each query head: A = Σ W U of the ring + W V of the new token, whose slot nobody reads.

    Without A one for HEADS of them and a piece: A of it alone, and the log-sum-exp in units of log 2, which are what a
    call with both reads. A key head is stored by the first of the GROUP query heads that read it, U by the first of the
    SHARED query heads that have it in common.
    """
    n, d = tl.program_id(0) * HEADS, tl.arange(0, BD)
    inside = d < D
    if A is None or PART is None:
        top, total, a = _walk(
            Q, K, V, KEYS, VALUES, COUNT, MASK, n, tl.program_id(1), lines, columns, H, slots, span, window, scale,
            softcap, HEADS, GROUP, SHARED, D, BD, ROWS, STAGES,
        )  # fmt: skip
    else:
        piece = tl.arange(0, PIECES)[:, None]
        at, there = tl.cast(n, tl.int64) * pieces + piece, piece < pieces
        top = tl.load(LSE + at, mask=there, other=float("-inf"))
        part = PART + (at[:, :, None] * D + d[None, None, :])
        a = tl.load(part, mask=there[:, :, None] & inside[None, None, :], other=0.0)
        top, total, a = _join(top, tl.where(top > float("-inf"), 1.0, 0.0), a)
    total = tl.where(total > 0, total, 1.0)
    a = a / total[:, None]
    if A is None:
        at = (n + tl.arange(0, HEADS)).to(tl.int64) * pieces + tl.program_id(1)
        tl.store(PART + at[:, None] * D + d[None, :], a, mask=inside[None, :])
        tl.store(LSE + at, top + tl.math.log2(total))
    else:
        _, k_strides, v_strides, keys_strides, values_strides = lines
        a = tl.sum(a, 0).to(A.dtype.element_ty)  # of one head
        tl.store(A + tl.cast(n, tl.int64) * D + d, a, mask=inside)
        b, h, slot = tl.cast(n // H, tl.int64), n % H, (tl.load(COUNT) - 1) % slots
        KEYS += b * keys_strides[0] + tl.cast(h // GROUP, tl.int64) * keys_strides[1] + slot * keys_strides[2] + d
        VALUES += b * values_strides[0] + tl.cast(h // SHARED, tl.int64) * values_strides[1] + slot * values_strides[2]
        if h % GROUP == 0:
            tl.store(KEYS, tl.load(K + b * k_strides[0] + h // GROUP * k_strides[1] + d, mask=inside), mask=inside)
        if G is not None:
            g = tl.load(G + b * gate_strides[0] + h * gate_strides[1]).to(tl.float32)
            gate = tl.minimum(tl.maximum(g, low), high)
        v = tl.load(V + b * v_strides[0] + h // GROUP * v_strides[1] + d, mask=inside).to(tl.float32)
        a = a.to(tl.float32)
        u = tl.where(gate == 0, v, tl.where(gate == 1, a, v + gate * (a - v)))
        if h % SHARED == 0:
            tl.store(VALUES + d, u.to(VALUES.dtype.element_ty), mask=inside)
