"""Decoding: one new token a sequence over a cached prefix, the keys split over programs as in flash-decoding.

A = Σ_j W_j U_j + W_own V, so only the last value differs from ordinary attention over the cache.
"""

import triton
import triton.language as tl

from ka_attention.ops.triton.primitives import LN2, LOG2E, visible


@triton.jit
def _score(products, scale, softcap, SOFTCAP: tl.constexpr):
    """log2(e) · scale · q · k, capped, from the elementwise products [..., BD] of q and k."""
    s = tl.sum(products, 1) * (scale * LOG2E)
    if SOFTCAP:
        cap = softcap * LOG2E
        s = cap * (1.0 - 2.0 / (tl.math.exp2(s * (2.0 * LOG2E / cap)) + 1.0))
    return s


@triton.jit(do_not_specialize=["H", "P", "SPLIT"])
def split_kernel(
    Q, K_PAST, U_PAST, MASK, PART, TOP, TOTAL, q_strides, k_strides, u_strides, mask_strides,
    scale, softcap, H, P, SPLIT,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    HAS_MASK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Online softmax over SPLIT cached positions of one head: weighted sum, maximum and sum of the exponentials."""
    b = tl.cast(tl.program_id(0) // H, tl.int64)
    h = tl.program_id(0) % H
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    first = tl.program_id(1) * SPLIT
    d = tl.arange(0, BD)
    q = tl.load(Q + b * q_strides[0] + h * q_strides[1] + d, mask=d < D, other=0.0).to(tl.float32)
    K_PAST += b * k_strides[0] + h // GROUP * k_strides[1]
    U_PAST += b * u_strides[0] + h * u_strides[1]
    if HAS_MASK:
        MASK += b * mask_strides[0] + h * mask_strides[1]
    top = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BD], tl.float32)
    for j0 in tl.range(first, tl.minimum(first + SPLIT, P), BN, num_stages=STAGES):
        j = j0 + tl.arange(0, BN)
        inside = (j < P)[:, None] & (d < D)[None, :]
        at = tl.cast(j, tl.int64)[:, None]
        k = tl.load(K_PAST + at * k_strides[2] + d[None, :], mask=inside, other=0.0)
        u = tl.load(U_PAST + at * u_strides[2] + d[None, :], mask=inside, other=0.0)
        s = _score(q[None, :] * k, scale, softcap, SOFTCAP)
        seen = visible(P, j, P + 1, P, MASK, mask_strides, P, 0, False, HAS_MASK)
        s = tl.where(seen, s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 0))
        shift = tl.where(new == -float("inf"), 0.0, new)
        p = tl.math.exp2(s - shift)
        alpha = tl.math.exp2(top - shift)
        acc = acc * alpha + tl.sum(p[:, None] * u, 0)
        total = total * alpha + tl.sum(p, 0)
        top = new
    tl.store(PART + tl.cast(part, tl.int64) * BD + d, acc)
    tl.store(TOP + part + tl.arange(0, 1), top)
    tl.store(TOTAL + part + tl.arange(0, 1), total)


@triton.jit(do_not_specialize=["H", "P", "parts"])
def join_kernel(
    Q, K, V, MASK, PART, TOP, TOTAL, A, LSE, q_strides, k_strides, v_strides, mask_strides,
    scale, softcap, H, P, parts,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, HAS_MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Join the parts of one head with the token itself."""
    b = tl.cast(tl.program_id(0) // H, tl.int64)
    h = tl.program_id(0) % H
    d = tl.arange(0, BD)
    i = tl.arange(0, PARTS)
    part = tl.program_id(0) * parts + i
    top = tl.load(TOP + part, mask=i < parts, other=-float("inf"))
    total = tl.load(TOTAL + part, mask=i < parts, other=0.0)
    acc = tl.load(PART + tl.cast(part, tl.int64)[:, None] * BD + d[None, :], mask=(i < parts)[:, None], other=0.0)
    q = tl.load(Q + b * q_strides[0] + h * q_strides[1] + d, mask=d < D, other=0.0).to(tl.float32)
    k = tl.load(K + b * k_strides[0] + h // GROUP * k_strides[1] + d, mask=d < D, other=0.0)
    v = tl.load(V + b * v_strides[0] + h // GROUP * v_strides[1] + d, mask=d < D, other=0.0)
    s = _score((q * k)[None, :], scale, softcap, SOFTCAP)  # [1]
    if HAS_MASK:
        MASK += b * mask_strides[0] + h * mask_strides[1]
        s = tl.where(tl.load(MASK + tl.cast(P, tl.int64) * mask_strides[3]) != 0, s, -float("inf"))
    best = tl.maximum(s, tl.max(top, 0))
    best = tl.where(best == -float("inf"), 0.0, best)
    w = tl.math.exp2(top - best)
    own = tl.math.exp2(s - best)
    sum = own + tl.sum(w * total, 0)
    a = (own * v + tl.sum(w[:, None] * acc, 0)) * tl.where(sum == 0.0, 0.0, 1.0 / sum)
    tl.store(A + tl.cast(tl.program_id(0), tl.int64) * D + d, a.to(A.dtype.element_ty), mask=d < D)
    tl.store(LSE + tl.program_id(0) + tl.arange(0, 1), (best + tl.math.log2(sum)) * LN2)
