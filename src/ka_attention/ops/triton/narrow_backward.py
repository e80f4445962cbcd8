"""Narrow windows, backward: the adjoint of `narrow_forward`, from the last segment to the first.

With z_b what the rows after block b give to dU_b, Ā = dA + G z and F of the forward:

    z_{b−1} = F_bᵀ (dA_b + G_b z_b),     Y_b = (I − G L_bbᵀ)⁻¹ (dA_b + G_b z_b),     dU_b = z_b + L_bbᵀ Y_b

The first is an affine map of z as well: `adjoint_maps_kernel` composes it over the blocks of a segment, `scan_kernel`
over the segments, and `adjoint_apply_kernel` computes all gradients (docs/maths.md, "Adjoint").
"""

import triton
import triton.language as tl

from ka_attention.ops.triton.narrow_forward import attends, block, cached, gates, put, small
from ka_attention.ops.triton.primitives import LN2, inverse, scores, slope


@triton.jit(do_not_specialize=["gate_strides", "H", "T", "span", "segments"])
def adjoint_maps_kernel(
    DA, GATE, RF, STATE, MAP,
    da_strides, gate_strides, H, T, span, segments,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, HAS_GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The map from z after the blocks first + 1 … first + span of a segment to z of its block `first`."""
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    head = tl.program_id(0) // segments
    segment = tl.program_id(0) % segments
    b = tl.cast(head // H, tl.int64)
    h = head % H
    head = tl.cast(head, tl.int64)
    DA += b * da_strides[0] + h * da_strides[1]
    RF += head * T * 2 * BM
    if HAS_GATE:
        GATE += b * gate_strides[0] + h * gate_strides[1]
    i = tl.arange(0, BM)
    z = tl.zeros([BM, BD], tl.float32)
    M = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for step in range(span):
        r0 = (segment * span + span - step) * BM
        F = tl.trans(block(RF + BM, r0, 2 * BM, T, BM, BM, BM))
        x = block(DA, r0, da_strides[2], T, BM, D, BD)
        if HAS_GATE:
            g = gates(GATE, r0 + i, gate_strides[2], T)[:, None]
            z *= g
            M *= g
        z = tl.dot(F, (x + z).to(F.dtype), input_precision=DOT)
        M = tl.dot(small(F, PRECISION), small(M, PRECISION), input_precision=DOT)
    put(STATE + head * segments * BM * D, z, segment * BM, D, 0, segments * BM, BM, D, BD)
    put(MAP + head * segments * BM * BM, M, segment * BM, BM, 0, segments * BM, BM, BM, BM)


@triton.jit
def _weights(q, k, lse, i, j, n, P, window, STARTS, MASK, mask_strides, scale, softcap,
             PACKED: tl.constexpr, HAS_MASK: tl.constexpr, SOFTCAP: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """W of the rows i, whose queries are q, and the columns j, whose keys are k; and the slope of the soft cap."""
    seen = attends(i, j, n, P, window, STARTS, MASK, mask_strides, PACKED, HAS_MASK)
    s = scores(q, k, scale, softcap, SOFTCAP, DOT)
    return tl.where(seen, tl.math.exp2(s - lse[:, None]), 0.0), slope(s, softcap, SOFTCAP)


@triton.jit
def _log_sums(LSE, i, n):
    return tl.load(LSE + i, mask=(i >= 0) & (i < n), other=float("inf")) / LN2


@triton.jit
def _adjoint_rows(z, DA, Q, K, GATE, A, LSE, STARTS, MASK, r0, n, P, window, scale, softcap, da_stride, gate_strides,
                  mask_strides, Q_ROW: tl.constexpr, K_ROW: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                  BM: tl.constexpr, HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
                  SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Y and δ of the block at r0, given its z."""
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    rows = r0 + tl.arange(0, BM)
    q = block(Q, r0, Q_ROW, n, BM, D, BD)
    k = block(K, r0, K_ROW, n, BM, D, BD)
    p, _ = _weights(q, k, _log_sums(LSE, rows, n), rows, rows, n, P, window, STARTS, MASK, mask_strides, scale, softcap,
                    PACKED, HAS_MASK, SOFTCAP, DOT)  # fmt: skip
    L = tl.where(rows[:, None] == rows[None, :], 0.0, p)
    x = z.to(tl.float32)
    if HAS_GATE:
        g = gates(GATE, rows, gate_strides[2], n)
        L *= g[None, :]
        x *= g[:, None]
    x += block(DA, r0, da_stride, n, BM, D, BD)
    S = tl.trans(inverse(L, BM, PRECISION).to(q.dtype))
    y = tl.dot(S, x.to(q.dtype), x, input_precision=DOT).to(q.dtype)
    return y, tl.sum(y.to(tl.float32) * block(A, r0, D, n, BM, D, BD), 1)


@triton.jit(do_not_specialize=["gate_strides", "mask_strides", "H", "T", "P", "window", "span", "segments"])
def adjoint_apply_kernel(
    DA, Q, K, V, GATE, K_PAST, U_PAST, MASK, STARTS, A, LSE, STATE, DQ, DK, DV, DGATE, DK_PAST, DU_PAST,
    da_strides, q_strides, k_strides, v_strides, gate_strides, k_past_strides, u_past_strides, mask_strides,
    scale, softcap, H, T, P, window, span, segments,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, WHOLE: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_PAST: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one segment of one head.

    A step takes block b as columns: its own rows and those of block b + 1, the next, meet its keys. So dQ of the next
    block is complete then, and the walk goes on one block beyond the segment, which before the first is a cached one.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    head = tl.program_id(0) // segments
    segment = tl.program_id(0) % segments
    b = tl.cast(head // H, tl.int64)
    h = head % H
    head = tl.cast(head, tl.int64)
    DA += b * da_strides[0] + h * da_strides[1]
    Q += b * q_strides[0] + h * q_strides[1]
    K += b * k_strides[0] + h // GROUP * k_strides[1]
    V += b * v_strides[0] + h // GROUP * v_strides[1]
    A += head * T * D
    LSE += head * T
    if HAS_GATE:
        GATE += b * gate_strides[0] + h * gate_strides[1]
    if HAS_PAST:
        K_PAST += b * k_past_strides[0] + h // GROUP * k_past_strides[1]
        U_PAST += b * u_past_strides[0] + h * u_past_strides[1]
        DK_PAST += head * P * D
        DU_PAST += head * P * D
    if HAS_MASK:
        MASK += b * mask_strides[0] + h * mask_strides[1]
    i = tl.arange(0, BM)
    diagonal = i[:, None] == i[None, :]

    # The rows of the block after the segment meet its last keys.
    first = segment * span
    last = tl.minimum(first + span, tl.cdiv(T, BM))
    z = tl.zeros([BM, BD], Q.dtype.element_ty)
    if not WHOLE:
        z = block(STATE + head * segments * BM * D, segment * BM, D, segments * BM, BM, D, BD)
    y, delta = _adjoint_rows(z, DA, Q, K, GATE, A, LSE, STARTS, MASK, last * BM, T, P, window, scale, softcap,
                             da_strides[2], gate_strides, mask_strides, Q_ROW, K_ROW, D, BD, BM,
                             HAS_GATE, HAS_MASK, PACKED, SOFTCAP, PRECISION)  # fmt: skip
    dq = tl.zeros([BM, BD], tl.float32)

    for step in range(last - first + 1):
        r0 = (last - 1 - step) * BM
        rows = r0 + i
        next_q = block(Q, r0 + BM, Q_ROW, T, BM, D, BD)
        next_lse = _log_sums(LSE, rows + BM, T)
        q = block(Q, r0, Q_ROW, T, BM, D, BD)
        k = block(K, r0, K_ROW, T, BM, D, BD)
        v = block(V, r0, V_ROW, T, BM, D, BD)
        a = block(A, r0, D, T, BM, D, BD)
        da = block(DA, r0, da_strides[2], T, BM, D, BD)
        lse = _log_sums(LSE, rows, T)
        u = a
        if HAS_GATE:
            g = gates(GATE, rows, gate_strides[2], T)
            u = (v + g[:, None] * (a.to(tl.float32) - v)).to(a.dtype)
        if HAS_PAST:
            k = cached(k, K_PAST, r0, P, k_past_strides[2], BM, D, BD)
            u = cached(u, U_PAST, r0, P, u_past_strides[2], BM, D, BD)

        # The rows of the next block.
        p, slopes = _weights(next_q, k, next_lse, rows + BM, rows, T, P, window, STARTS, MASK, mask_strides, scale,
                             softcap, PACKED, HAS_MASK, SOFTCAP, DOT)  # fmt: skip
        du = tl.dot(tl.trans(p.to(y.dtype)), y, input_precision=DOT)
        dw = tl.dot(y, tl.trans(u), input_precision=DOT)
        ds = tl.where(p == 0.0, 0.0, p * (dw - delta[:, None]) * slopes).to(q.dtype)
        dq = tl.dot(ds, k, dq, input_precision=DOT)
        # Of this segment's rows only: block `last` belongs to the next.
        put(DQ + head * T * D, dq * scale, r0 + BM, D, 0, tl.minimum(last * BM, T), BM, D, BD)
        dk = tl.dot(tl.trans(ds), next_q, input_precision=DOT)

        # Its own rows.
        p, slopes = _weights(q, k, lse, rows, rows, T, P, window, STARTS, MASK, mask_strides, scale, softcap,
                             PACKED, HAS_MASK, SOFTCAP, DOT)  # fmt: skip
        d = tl.sum(tl.where(diagonal, p, 0.0), 1)
        L = tl.where(diagonal, 0.0, p)
        if HAS_GATE:
            S = inverse(L * g[None, :], BM, PRECISION)
            x = da + g[:, None] * du
        else:
            S = inverse(L, BM, PRECISION)
            x = da + du
        # dW is taken from the rounded Y, so δ, its weighted mean, is too.
        y = tl.dot(tl.trans(S.to(q.dtype)), x.to(q.dtype), x, input_precision=DOT).to(q.dtype)
        delta = tl.sum(y.to(tl.float32) * a, 1)
        own = tl.sum(y.to(tl.float32) * v, 1)
        dw = tl.where(diagonal, own[:, None], tl.dot(y, tl.trans(u), input_precision=DOT))
        ds = tl.where(p == 0.0, 0.0, p * (dw - delta[:, None]) * slopes).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=DOT) * scale
        dq = tl.dot(ds, k, input_precision=DOT)
        dv = d[:, None] * y
        if HAS_PAST:
            put(DK_PAST, dk, P + r0, D, 0, tl.where(r0 < 0, P, 0), BM, D, BD)
            put(DU_PAST, du, P + r0, D, 0, tl.where(r0 < 0, P, 0), BM, D, BD)
        if HAS_GATE:
            du = tl.dot(tl.trans(L.to(y.dtype)), y, du, input_precision=DOT)
            dv += (1.0 - g)[:, None] * du
            dg = tl.sum(du * (a.to(tl.float32) - v), 1)
            tl.store(DGATE + head * T + rows, dg, mask=(rows >= first * BM) & (rows < T))
        put(DK + head * T * D, dk, r0, D, first * BM, T, BM, D, BD)
        put(DV + head * T * D, dv, r0, D, first * BM, T, BM, D, BD)
