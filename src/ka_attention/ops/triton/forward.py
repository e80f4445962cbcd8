"""The forward kernel: FlashAttention's loop over finished column blocks, then the solve of the diagonal block.

    X   = Σ_{c<b−K} P_bc U_c + (L_bb (I − G) + diag(d)) V_b
    A_b = (I − L_bb G)⁻¹ (X + Σ_{c≥b−K} P_bc U_c) = (I + S) X + Σ_{c≥b−K} C_bc U_c,     C_bc = (I + S) P_bc

All that does not need the U of the nearest K blocks is computed before the program waits for them: the chain from block
to block is one matrix product long.
"""

# mypy: disable-error-code="assignment, misc"
# (tuples grow while Triton unrolls loops)

import triton
import triton.language as tl

from ka_attention.ops.triton.primitives import (
    LN2,
    block,
    inverse,
    load_tile,
    locate,
    publish,
    scores,
    store_tile,
    visible,
    wait,
)


@triton.jit
def _absorb(q, K, U, j, n, k_stride, u_stride, seen, acc, m, total, scale, softcap,
            BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, GUARD: tl.constexpr, MASKED: tl.constexpr,
            SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One step of online softmax over columns j … j + BN of K and U."""
    k = load_tile(K, j, k_stride, n, BN, D, BD, GUARD)  # [BN, BD]
    s = scores(q, k, scale, softcap, SOFTCAP, PRECISION)  # [BM, BN]
    if MASKED:
        s = tl.where(seen, s, -float("inf"))
    top = tl.maximum(m, tl.max(s, 1))
    shift = tl.where(top == -float("inf"), 0.0, top) if MASKED else top
    p = tl.math.exp2(s - shift[:, None])
    alpha = tl.math.exp2(m - shift)
    u = load_tile(U, j, u_stride, n, BN, D, BD, GUARD)
    acc = tl.dot(p.to(u.dtype), u, acc * alpha[:, None], input_precision=PRECISION)
    return acc, top, total * alpha + tl.sum(p, 1)


@triton.jit
def _far(q, K, U, flag, first, last, rows, n, MASK, mask_strides, P, window, acc, m, total, scale, softcap,
         K_ROW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
         MASKED: tl.constexpr, WINDOW: tl.constexpr, HAS_MASK: tl.constexpr, SOFTCAP: tl.constexpr,
         DOT: tl.constexpr):  # fmt: skip
    """Online softmax over columns first … last, block by block as they are published."""
    j = first
    while j < last:
        stop = tl.minimum(wait(flag, j // BM + 1) * BM, last)
        for c in range(j, stop, BN):
            seen = True
            if MASKED:
                seen = visible((P + rows)[:, None], (P + c + tl.arange(0, BN))[None, :], P + n, P + n, MASK,
                               mask_strides, P, window, WINDOW, HAS_MASK)  # fmt: skip
            acc, m, total = _absorb(q, K, U, c, n, K_ROW, D, seen, acc, m, total, scale, softcap, BN, D, BD, False,
                                    MASKED, SOFTCAP, DOT)  # fmt: skip
        j = stop
    return acc, m, total


@triton.jit(do_not_specialize=["B", "H", "T", "P", "window", "wave"])
def forward_kernel(
    Q, K, V, GATE, K_PAST, U_PAST, MASK, CU, SCHEDULE, A, U, LSE, SAVED, FLAGS,
    q_strides, k_strides, v_strides, gate_strides, k_past_strides, u_past_strides, mask_strides,
    scale, softcap, B, H, T, P, window, wave,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr,
    REACH: tl.constexpr, ROW: tl.constexpr, SAVE: tl.constexpr, HAS_GATE: tl.constexpr, HAS_PAST: tl.constexpr,
    HAS_MASK: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One row block of one head. It waits for the blocks before, for the last REACH one by one, or, where rows reach
    REACH blocks back at most, BAND, leaves those to `sweep_kernel`: a row of SAVED, ROW numbers long, ends with
    (I + S) P_bc G for it. With SAVE the row begins with S, for the backward.

    A chain of long rows and many heads computes scores once (online softmax). Where few heads have a window, the chain
    sets the pace: there a pass over the scores comes first, so that all but the products with U is ready before any
    wait.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    MASKED: tl.constexpr = WINDOW or HAS_MASK
    CHAIN: tl.constexpr = REACH > 0 and not BAND
    AHEAD: tl.constexpr = CHAIN and WINDOW and REACH > 1
    t = tl.atomic_add(FLAGS, 1) if CHAIN else tl.program_id(0)
    sequence, b, h, rank, start, n = locate(t, CU, SCHEDULE, B, H, T, wave, PACKED)
    r0 = rank * BM
    if PACKED and r0 >= n:
        return
    b = tl.cast(b, tl.int64)
    flag = FLAGS + 1 + sequence * H + h if CHAIN else 0
    head = (b * H + h) * T + start  # first row of this sequence and head in contiguous [B, H, T, …]
    Q += b * q_strides[0] + h * q_strides[1] + tl.cast(start, tl.int64) * Q_ROW
    K += b * k_strides[0] + h // GROUP * k_strides[1] + tl.cast(start, tl.int64) * K_ROW
    V += b * v_strides[0] + h // GROUP * v_strides[1] + tl.cast(start, tl.int64) * V_ROW
    A += head * D
    U += head * D
    if HAS_MASK:
        MASK += b * mask_strides[0] + h * mask_strides[1]
    rows = r0 + tl.arange(0, BM)
    q = load_tile(Q, r0, Q_ROW, n, BM, D, BD, RAGGED)
    m = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)

    if HAS_PAST:
        K_PAST += b * k_past_strides[0] + h // GROUP * k_past_strides[1]
        U_PAST += b * u_past_strides[0] + h * u_past_strides[1]
        first = tl.maximum(P + r0 - window + 1, 0) // BN * BN if WINDOW else 0
        for j in range(first, P, BN):
            seen = visible((P + rows)[:, None], (j + tl.arange(0, BN))[None, :], P + n, P, MASK, mask_strides, P,
                           window, WINDOW, HAS_MASK)  # fmt: skip
            acc, m, total = _absorb(q, K_PAST, U_PAST, j, P, k_past_strides[2], u_past_strides[2], seen, acc, m, total,
                                    scale, softcap, BN, D, BD, True, True, SOFTCAP, DOT)  # fmt: skip
    first = tl.maximum(r0 - window + 1, 0) // BM * BM if WINDOW else r0 * 0
    last = tl.maximum(r0 - REACH * BM, 0)
    if CHAIN and not AHEAD:
        acc, m, total = _far(q, K, U, flag, first, last, rows, n, MASK, mask_strides, P, window, acc, m, total, scale,
                             softcap, K_ROW, BM, BN, D, BD, MASKED, WINDOW, HAS_MASK, SOFTCAP, DOT)  # fmt: skip

    # The softmax is complete with the scores of far blocks, where they come later, of near ones and of the diagonal.
    i = tl.arange(0, BM)
    top = m
    if AHEAD:
        for c in tl.range(first, last, BM):
            s = _block_scores(q, K, c, n, K_ROW, rows, MASK, mask_strides, P, window, scale, softcap, BM, D, BD, False,
                              MASKED, WINDOW, HAS_MASK, SOFTCAP, DOT)  # fmt: skip
            top, total, s = _count(s, top, total)
    weights, tops = (), ()
    for near in tl.static_range(REACH):
        c = r0 - (REACH - near) * BM
        s = tl.full([BM, BM], -float("inf"), tl.float32)
        if c >= 0:
            s = _block_scores(q, K, c, n, K_ROW, rows, MASK, mask_strides, P, window, scale, softcap, BM, D, BD, False,
                              MASKED, WINDOW, HAS_MASK, SOFTCAP, DOT)  # fmt: skip
        top, total, s = _count(s, top, total)
        weights += (s.to(V.dtype.element_ty),)
        tops += (top,)
    s = _block_scores(q, K, r0, n, K_ROW, rows, MASK, mask_strides, P, window, scale, softcap, BM, D, BD, RAGGED,
                      MASKED, WINDOW, HAS_MASK, SOFTCAP, DOT)  # fmt: skip
    s = tl.where(i[:, None] >= i[None, :], s, -float("inf"))
    top, total, p = _count(s, top, total)
    shift = tl.where(top == -float("inf"), 0.0, top)  # a row that attends nothing
    r = tl.where(total == 0.0, 0.0, 1.0 / total)
    tl.store(LSE + head + rows, (shift + tl.math.log2(total)) * LN2, mask=rows < n)

    p = p * r[:, None]
    d = tl.sum(tl.where(i[:, None] == i[None, :], p, 0.0), 1)
    L = tl.where(i[:, None] > i[None, :], p, 0.0)
    if HAS_GATE:
        GATE += b * gate_strides[0] + h * gate_strides[1] + tl.cast(start, tl.int64) * gate_strides[2]
        g = tl.load(GATE + tl.cast(rows, tl.int64) * gate_strides[2], mask=rows < n, other=0.0)
        own = (L * (1.0 - g)[None, :]).to(V.dtype.element_ty)
        L = L * g[None, :]
    S = inverse(L, BM, PRECISION).to(V.dtype.element_ty)
    if SAVE:
        store_tile(SAVED + head * ROW, S, r0, ROW, n, BM, BM, BM)
    v = load_tile(V, r0, V_ROW, n, BM, D, BD, RAGGED)
    x = d[:, None] * v
    if HAS_GATE:
        x = tl.dot(own, v, x, input_precision=DOT)
    links = ()
    for near in tl.static_range(REACH):
        w = (weights[near] * (tl.math.exp2(tops[near] - shift) * r)[:, None]).to(v.dtype)
        if BAND and HAS_GATE:
            c = r0 - (REACH - near) * BM
            w, x = _gated(w, x, V, GATE, c, V_ROW, gate_strides, BM, D, BD, DOT)
        w = tl.dot(S, w, w.to(tl.float32), input_precision=DOT).to(v.dtype)
        if BAND:
            store_tile(SAVED + head * ROW + ROW - (near + 1) * BM, w, r0, ROW, n, BM, BM, BM)
        links += (w,)
    if AHEAD:
        acc = acc * tl.math.exp2(m - shift)[:, None] + x * total[:, None]
        acc, m, total = _far(q, K, U, flag, first, last, rows, n, MASK, mask_strides, P, window, acc, shift, total,
                             scale, softcap, K_ROW, BM, BN, D, BD, MASKED, WINDOW, HAS_MASK, SOFTCAP, DOT)  # fmt: skip
        x = acc * (tl.math.exp2(m - shift) * r)[:, None]
    elif CHAIN or HAS_PAST:
        x += acc * (tl.math.exp2(m - shift) * r)[:, None]
    a = tl.dot(S, x.to(v.dtype), x, input_precision=DOT)
    if CHAIN:
        for near in tl.static_range(REACH):
            c = r0 - (REACH - near) * BM
            if c >= 0:
                wait(flag, c // BM + 1)
                u = load_tile(U, c, D, n, BM, D, BD, False)
                a = tl.dot(links[near], u, a, input_precision=DOT)
    store_tile(A, a, r0, D, n, BM, D, BD)
    if HAS_GATE and CHAIN:
        store_tile(U, v + g[:, None] * (a - v), r0, D, n, BM, D, BD)
    if CHAIN:
        publish(flag, rank + 1)


@triton.jit
def _block_scores(q, K, c, n, K_ROW: tl.constexpr, rows, MASK, mask_strides, P, window, scale, softcap,
                  BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, GUARD: tl.constexpr, MASKED: tl.constexpr,
                  WINDOW: tl.constexpr, HAS_MASK: tl.constexpr, SOFTCAP: tl.constexpr,
                  DOT: tl.constexpr):  # fmt: skip
    """Scores of the rows with the column block c …; −∞ where nothing is seen, causality apart."""
    k = load_tile(K, c, K_ROW, n, BM, D, BD, GUARD)
    s = scores(q, k, scale, softcap, SOFTCAP, DOT)
    if MASKED:
        seen = visible((P + rows)[:, None], (P + c + tl.arange(0, BM))[None, :], P + n, P + n, MASK, mask_strides, P,
                       window, WINDOW, HAS_MASK)  # fmt: skip
        s = tl.where(seen, s, -float("inf"))
    return s


@triton.jit
def _count(s, top, total):
    """The largest score and the sum of the weights with those of scores s, and these weights, all relative to it."""
    new = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new == -float("inf"), 0.0, new)
    p = tl.math.exp2(s - shift[:, None])
    return new, total * tl.math.exp2(top - shift) + tl.sum(p, 1), p


@triton.jit
def _gated(w, x, V, GATE, c, V_ROW: tl.constexpr, gate_strides, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
           DOT: tl.constexpr):  # fmt: skip
    """The weights w of column block c as P G, and x with P (I − G) V added; nothing before the first row."""
    j = c + tl.arange(0, BM)
    g = tl.load(GATE + tl.cast(j, tl.int64) * gate_strides[2], mask=j >= 0, other=0.0)
    v = block(V, c, V_ROW, c + BM, 0, BM, D, BD)
    x = tl.dot((w * (1.0 - g)[None, :]).to(v.dtype), v, x, input_precision=DOT)
    return (w * g[None, :]).to(v.dtype), x
