"""The forward kernel: FlashAttention's loop over finished column blocks, then the solve of the diagonal block.

    X   = Σ_{c<b−K} P_bc U_c + (L_bb (I − G) + diag(d)) V_b
    A_b = (I − L_bb G)⁻¹ (X + Σ_{c≥b−K} P_bc U_c) = (I + S) X + Σ_{c≥b−K} C_bc U_c,     C_bc = (I + S) P_bc

All that does not need the U of the nearest K blocks is computed before the program waits for them: the chain from block
to block is one matrix product long.
"""

import triton
import triton.language as tl

from ka_attention.ops.triton.primitives import (
    LN2,
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


@triton.jit(do_not_specialize=["B", "H", "T", "P", "window", "wave"])
def forward_kernel(
    Q, K, V, GATE, K_PAST, U_PAST, MASK, CU, SCHEDULE, A, U, LSE, SOLVE, BAND, FLAGS,
    q_strides, k_strides, v_strides, gate_strides, k_past_strides, u_past_strides, mask_strides,
    scale, softcap, B, H, T, P, window, wave,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr,
    REACH: tl.constexpr, SAVE: tl.constexpr, HAS_GATE: tl.constexpr, HAS_PAST: tl.constexpr, HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr, RAGGED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row block of one head. MODE: "chain" waits for the blocks before, for the last REACH one by one; "single"
    attends to no other block; "band", for rows that reach REACH blocks back at most, leaves those to `sweep_kernel`: it
    stores (I + S) P_bc G for it. With SAVE the backward finds S in SOLVE.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    MASKED: tl.constexpr = WINDOW or HAS_MASK
    COMPLETE: tl.constexpr = MODE != "band" or not HAS_GATE  # a band adds (I − G) V of other blocks to x
    t = tl.atomic_add(FLAGS, 1) if MODE == "chain" else tl.program_id(0)
    sequence, b, h, rank, start, n = locate(t, CU, SCHEDULE, B, H, T, wave, PACKED)
    r0 = rank * BM
    if PACKED and r0 >= n:
        return
    b = tl.cast(b, tl.int64)
    flag = FLAGS + 1 + sequence * H + h if MODE == "chain" else 0
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
    if MODE == "chain":
        j = tl.maximum(r0 - window + 1, 0) // BN * BN if WINDOW else r0 * 0
        far = r0 - REACH * BM
        while j < far:
            stop = tl.minimum(wait(flag, j // BM + 1) * BM, far)
            for c in range(j, stop, BN):
                seen = True
                if MASKED:
                    seen = visible((P + rows)[:, None], (P + c + tl.arange(0, BN))[None, :], P + n, P + n, MASK,
                                   mask_strides, P, window, WINDOW, HAS_MASK)  # fmt: skip
                acc, m, total = _absorb(q, K, U, c, n, K_ROW, D, seen, acc, m, total, scale, softcap, BN, D, BD,
                                    False, MASKED, SOFTCAP, DOT)  # fmt: skip
            j = stop

    # The softmax is complete with the weights of the nearest blocks, of which `last` is the last, and of the diagonal.
    i = tl.arange(0, BM)
    top = m
    near = tl.maximum(r0 - REACH * BM, 0)
    if REACH > 1:
        for c in tl.range(near, r0 - BM, BM):
            s = _band_scores(q, K, c, n, K_ROW, rows, MASK, mask_strides, P, window, scale, softcap, BM, D, BD,
                             MASKED, WINDOW, HAS_MASK, SOFTCAP, DOT)  # fmt: skip
            new = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(new == -float("inf"), 0.0, new)
            total = total * tl.math.exp2(top - shift) + tl.sum(tl.math.exp2(s - shift[:, None]), 1)
            top = new
    before = top
    k = load_tile(K, r0, K_ROW, n, BM, D, BD, RAGGED)
    s = scores(q, k, scale, softcap, SOFTCAP, DOT)  # [BM, BM]
    s = tl.where(i[:, None] >= i[None, :], s, -float("inf"))
    if MASKED:
        seen = visible((P + rows)[:, None], (P + rows)[None, :], P + n, P + n, MASK, mask_strides,
                       P, window, WINDOW, HAS_MASK)  # fmt: skip
        s = tl.where(seen, s, -float("inf"))
    top = tl.maximum(top, tl.max(s, 1))
    last = tl.zeros([BM, BM], tl.float32)
    if MODE != "single" and r0 > 0:
        k = load_tile(K, r0 - BM, K_ROW, n, BM, D, BD, False)
        last = scores(q, k, scale, softcap, SOFTCAP, DOT)
        if MASKED:
            seen = visible((P + rows)[:, None], (P + rows)[None, :] - BM, P + n, P + n, MASK, mask_strides, P,
                           window, WINDOW, HAS_MASK)  # fmt: skip
            last = tl.where(seen, last, -float("inf"))
        top = tl.maximum(top, tl.max(last, 1))
        last = tl.math.exp2(last - tl.where(top == -float("inf"), 0.0, top)[:, None])
    shift = tl.where(top == -float("inf"), 0.0, top)  # a row that attends nothing
    p = tl.math.exp2(s - shift[:, None])
    total = total * tl.math.exp2(before - shift) + tl.sum(p, 1) + tl.sum(last, 1)
    r = tl.where(total == 0.0, 0.0, 1.0 / total)
    tl.store(LSE + head + rows, (shift + tl.math.log2(total)) * LN2, mask=rows < n)

    v = load_tile(V, r0, V_ROW, n, BM, D, BD, RAGGED)
    p = p * r[:, None]
    last = (last * r[:, None]).to(v.dtype)
    d = tl.sum(tl.where(i[:, None] == i[None, :], p, 0.0), 1)
    L = tl.where(i[:, None] > i[None, :], p, 0.0)
    x = d[:, None] * v
    if MODE == "chain" or HAS_PAST:
        x += acc * (tl.math.exp2(m - shift) * r)[:, None]
    if HAS_GATE:
        GATE += b * gate_strides[0] + h * gate_strides[1] + tl.cast(start, tl.int64) * gate_strides[2]
        g = tl.load(GATE + tl.cast(rows, tl.int64) * gate_strides[2], mask=rows < n, other=0.0)
        x = tl.dot((L * (1.0 - g)[None, :]).to(v.dtype), v, x, input_precision=DOT)
        L = L * g[None, :]
    S = inverse(L, BM, PRECISION).to(v.dtype)
    if SAVE:
        store_tile(SOLVE + head * BM, S, r0, BM, n, BM, BM, BM)
    # As early as x is complete: for a product after a conditional one ptxas may take an address computed only there.
    if COMPLETE:
        a = tl.dot(S, x.to(v.dtype), x, input_precision=DOT)
    if MODE == "band":
        BAND += head * REACH * BM
    if REACH > 1:
        for c in tl.range(near, r0 - BM, BM, num_stages=1):
            s = _band_scores(q, K, c, n, K_ROW, rows, MASK, mask_strides, P, window, scale, softcap, BM, D, BD,
                             MASKED, WINDOW, HAS_MASK, SOFTCAP, DOT)  # fmt: skip
            w = (tl.math.exp2(s - shift[:, None]) * r[:, None]).to(v.dtype)
            if MODE == "band":
                w, x = _gated(w, x, V, GATE, c, V_ROW, gate_strides, BM, D, BD, HAS_GATE, DOT)
            w = tl.dot(S, w, w.to(tl.float32), input_precision=DOT)
            if MODE == "band":
                store_tile(BAND + (r0 - c - BM), w, r0, REACH * BM, n, BM, BM, BM)
            if MODE == "chain":
                wait(flag, c // BM + 1)
                u = load_tile(U, c, D, n, BM, D, BD, False)
                a = tl.dot(w.to(u.dtype), u, a, input_precision=DOT)
    if r0 > 0:
        if MODE == "band":
            last, x = _gated(last, x, V, GATE, r0 - BM, V_ROW, gate_strides, BM, D, BD, HAS_GATE, DOT)
        if MODE != "single":
            last = tl.dot(S, last, last.to(tl.float32), input_precision=DOT).to(v.dtype)
        if MODE == "band":
            store_tile(BAND, last, r0, REACH * BM, n, BM, BM, BM)
    if not COMPLETE:
        a = tl.dot(S, x.to(v.dtype), x, input_precision=DOT)
    if MODE == "chain" and r0 > 0:
        wait(flag, rank)
        u = load_tile(U, r0 - BM, D, n, BM, D, BD, False)
        a = tl.dot(last, u, a, input_precision=DOT)
    store_tile(A, a, r0, D, n, BM, D, BD)
    if HAS_GATE and MODE == "chain":
        store_tile(U, v + g[:, None] * (a - v), r0, D, n, BM, D, BD)
    if MODE == "chain":
        publish(flag, rank + 1)


@triton.jit
def _band_scores(q, K, c, n, K_ROW: tl.constexpr, rows, MASK, mask_strides, P, window, scale, softcap,
                 BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr,
                 HAS_MASK: tl.constexpr, SOFTCAP: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Scores of the rows with the whole column block c …, which lies before them; −∞ where nothing is seen."""
    k = load_tile(K, c, K_ROW, n, BM, D, BD, False)
    s = scores(q, k, scale, softcap, SOFTCAP, DOT)
    if MASKED:
        seen = visible((P + rows)[:, None], (P + c + tl.arange(0, BM))[None, :], P + n, P + n, MASK, mask_strides, P,
                       window, WINDOW, HAS_MASK)  # fmt: skip
        s = tl.where(seen, s, -float("inf"))
    return s


@triton.jit
def _gated(w, x, V, GATE, c, V_ROW: tl.constexpr, gate_strides, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
           HAS_GATE: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """The weights w of column block c as P G, and x with P (I − G) V added."""
    if HAS_GATE:
        g = tl.load(GATE + tl.cast(c + tl.arange(0, BM), tl.int64) * gate_strides[2])
        v = load_tile(V, c, V_ROW, 0, BM, D, BD, False)
        x = tl.dot((w * (1.0 - g)[None, :]).to(v.dtype), v, x, input_precision=DOT)
        w = (w * g[None, :]).to(v.dtype)
    return w, x
