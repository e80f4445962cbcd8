"""The backward kernels: the reverse triangular solve fused with FlashAttention-2's dK/dV loop, and dQ.

With dU_j = Σ_{i>j} W_ij Y_i and everything below transposed (columns j are the rows of a tile):

    Y_j  = dA_j + g_j dU_j = (I + S_jᵀ) (dA_j + g_j Σ_{blocks i>j} W_ijᵀ Y_i),     I + S_jᵀ = (I − G L_jjᵀ)⁻¹
    dV_j = d_j Y_j + (1 − g_j) dU_j,        dg_j = dU_j · (A_j − V_j)
    dS   = W ∘ (Y Uᵀ − δ),  δ_i = Y_i · A_i,  with Y_i · V_i on the diagonal
    dK   = scale dSᵀ Q,     dQ = scale dS K

The forward saved S, so no system is solved again.
"""

import triton
import triton.language as tl

from ka_attention.ops.triton.primitives import (
    LN2,
    load_tile,
    locate,
    publish,
    scores,
    slope,
    store_tile,
    visible,
    wait,
)


@triton.jit
def _weights(k, Q, LSE, j, i, n, columns, MASK, mask_strides, P, window, scale, softcap,
             Q_ROW: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
             GUARD: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, HAS_MASK: tl.constexpr,
             SOFTCAP: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """q_i, W_ijᵀ and the slope of the soft cap: rows i … of the new tokens, positions j …, whose keys k holds.

    Rows outside the sequence weigh 0; without GUARD there must be none.
    """
    q = load_tile(Q, i, Q_ROW, n, ROWS, D, BD, GUARD)  # [ROWS, BD]
    rows = i + tl.arange(0, ROWS)
    lse = tl.load(LSE + rows, mask=rows < n, other=float("inf")) / LN2
    s = scores(k, q, scale, softcap, SOFTCAP, DOT)  # [BM, ROWS]
    p = tl.math.exp2(s - lse[None, :])
    if MASKED:
        seen = visible((P + rows)[None, :], (j + tl.arange(0, BM))[:, None], P + n, columns, MASK, mask_strides, P,
                       window, WINDOW, HAS_MASK)  # fmt: skip
        p = tl.where(seen, p, 0.0)
    return q, p, slope(s, softcap, SOFTCAP)


@triton.jit
def _row_tiles(first, last, end, k, u, Q, V, Y, LSE, DELTA, j, c0, n, columns, MASK, mask_strides, P, window, scale,
               softcap, du, dk, d, DIAGONAL: tl.constexpr, WITH_DU: tl.constexpr, Q_ROW: tl.constexpr,
               V_ROW: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
               RAGGED: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, HAS_MASK: tl.constexpr,
               SOFTCAP: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Add what tiles first … last of BN rows, counted from row `end` up, give to dU, if wanted, dK and, on the
    DIAGONAL, d. Their Y and δ are final.
    """
    for tile in range(first, last):
        r0 = end - (tile + 1) * BN
        q, p, slopes = _weights(k, Q, LSE, j, r0, n, columns, MASK, mask_strides, P, window, scale, softcap, Q_ROW, BN,
                                BM, D, BD, RAGGED, MASKED, WINDOW, HAS_MASK, SOFTCAP, DOT)  # fmt: skip
        y = load_tile(Y, r0, D, n, BN, D, BD, RAGGED)
        rows = r0 + tl.arange(0, BN)
        delta = tl.load(DELTA + rows, mask=rows < n, other=0.0)
        dw = tl.dot(u, tl.trans(y), input_precision=DOT)
        if DIAGONAL:
            own = tl.sum(y.to(tl.float32) * load_tile(V, r0, V_ROW, n, BN, D, BD, RAGGED), 1)
            column = c0 + tl.arange(0, BM)[:, None]
            dw = tl.where(column == rows[None, :], own[None, :], dw)
            d += tl.sum(tl.where(column == rows[None, :], p, 0.0), 1)
            p = tl.where(column <= rows[None, :], p, 0.0)
        ds = p * (dw - delta[None, :]) * slopes
        if WITH_DU:
            if DIAGONAL:
                p = tl.where(column < rows[None, :], p, 0.0)
            du = tl.dot(p.to(y.dtype), y, du, input_precision=DOT)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=DOT)
    return du, dk, d


@triton.jit(do_not_specialize=["B", "H", "T", "P", "window", "wave"])
def columns_kernel(
    DA, Q, K, V, GATE, U_PAST, MASK, CU, SCHEDULE, A, U, LSE, SAVED, Y, DELTA, DK, DV, DU, DGATE, FLAGS,
    da_strides, q_strides, k_strides, v_strides, gate_strides, u_strides, mask_strides,
    scale, softcap, B, H, T, P, window, wave,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr,
    REACH: tl.constexpr, HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One column block of one head, last block first: all that flows back into its keys and values.

    MODE: "chain" finds Y and δ of the block, waiting for the blocks after it, and with a gate U. The REACH nearest of
    them it meets with (I + Sᵀ) G W_ijᵀ, formed before it waits, so that one product lies between two blocks. "solved"
    finds all this complete; "past" handles cached columns, K and U_PAST being the cache: DK and DU.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    MASKED: tl.constexpr = WINDOW or HAS_MASK or MODE == "past"
    R: tl.constexpr = BM // BN
    CHAIN: tl.constexpr = MODE == "chain" and REACH > 0
    APART: tl.constexpr = R * REACH if CHAIN else 0  # row tiles that wait for the last moment
    t = tl.atomic_add(FLAGS, 1) if CHAIN else tl.program_id(0)
    sequence, b, h, rank, start, n = locate(t, CU, SCHEDULE, B, H, T, wave, PACKED)
    blocks = tl.cdiv(n, BM)
    if PACKED and rank >= blocks:
        return
    c0 = rank * BM if MODE == "past" else (blocks - 1 - rank) * BM
    b = tl.cast(b, tl.int64)
    flag = FLAGS + 1 + sequence * H + h if CHAIN else 0
    head = (b * H + h) * T + start
    Q += b * q_strides[0] + h * q_strides[1] + tl.cast(start, tl.int64) * Q_ROW
    K += b * k_strides[0] + h // GROUP * k_strides[1] + tl.cast(start, tl.int64) * K_ROW
    Y += head * D
    LSE += head
    DELTA += head
    if HAS_MASK:
        MASK += b * mask_strides[0] + h * mask_strides[1]
    j = c0 if MODE == "past" else P + c0  # position of the first column
    columns = P if MODE == "past" else P + n
    size = P if MODE == "past" else n

    k = load_tile(K, c0, K_ROW, size, BM, D, BD, True)
    if MODE == "past":
        U_PAST += b * u_strides[0] + h * u_strides[1]
        u = load_tile(U_PAST, c0, u_strides[2], size, BM, D, BD, True)
    else:
        i = c0 + tl.arange(0, BM)
        A += head * D
        V += b * v_strides[0] + h // GROUP * v_strides[1] + tl.cast(start, tl.int64) * V_ROW
        if HAS_GATE:
            GATE += b * gate_strides[0] + h * gate_strides[1] + tl.cast(start, tl.int64) * gate_strides[2]
            g = tl.load(GATE + tl.cast(i, tl.int64) * gate_strides[2], mask=i < n, other=0.0)
        if HAS_GATE and MODE == "chain":
            v = load_tile(V, c0, V_ROW, n, BM, D, BD, RAGGED)
            u = v + g[:, None] * (load_tile(A, c0, D, n, BM, D, BD, RAGGED).to(tl.float32) - v)
            u = u.to(k.dtype)
            store_tile(U + head * D, u, c0, D, n, BM, D, BD)
        else:
            u = load_tile(U + head * D, c0, D, n, BM, D, BD, RAGGED)

    du = tl.zeros([BM, BD], tl.float32)
    dk = tl.zeros([BM, BD], tl.float32)
    d = tl.zeros([BM], tl.float32)
    # Row tiles from the end of the sequence up: tile t has rows blocks · BM − (t + 1) · BN …
    t = 0 * n
    if WINDOW:
        t = (blocks * BM - tl.minimum(j + BM - 1 + window - P, blocks * BM)) // BN
    end = blocks * R if MODE == "past" else rank * R
    near = tl.maximum(end - APART, 0)
    if CHAIN:
        while t < near:
            stop = tl.minimum(wait(flag, t // R + 1) * R, near)
            du, dk, d = _row_tiles(t, stop, blocks * BM, k, u, Q, V, Y, LSE, DELTA, j, c0, n, columns, MASK,
                                   mask_strides, P, window, scale, softcap, du, dk, d, False, True, Q_ROW, V_ROW,
                                   BN, BM, D, BD, RAGGED, MASKED, WINDOW, HAS_MASK, SOFTCAP, DOT)  # fmt: skip
            t = stop
    else:
        du, dk, d = _row_tiles(t, near, blocks * BM, k, u, Q, V, Y, LSE, DELTA, j, c0, n, columns, MASK,
                               mask_strides, P, window, scale, softcap, du, dk, d, False, MODE == "past" or HAS_GATE,
                               Q_ROW, V_ROW, BN, BM, D, BD, RAGGED, MASKED, WINDOW, HAS_MASK, SOFTCAP, DOT)  # fmt: skip

    if MODE == "past":
        store_tile(DU + (b * H + h) * P * D, du, c0, D, P, BM, D, BD)
        store_tile(DK + (b * H + h) * P * D, dk * scale, c0, D, P, BM, D, BD)
    else:
        if MODE == "chain":
            S = tl.trans(load_tile(SAVED + head * BM, c0, BM, n, BM, BM, BM, RAGGED))
            DA += b * da_strides[0] + h * da_strides[1] + tl.cast(start, tl.int64) * da_strides[2]
            y = load_tile(DA, c0, da_strides[2], n, BM, D, BD, RAGGED) + (g[:, None] * du if HAS_GATE else du)
            y = tl.dot(S, y.to(S.dtype), y, input_precision=DOT)
            if CHAIN:
                for before in tl.range(near // R, rank, num_stages=1):
                    r0 = (blocks - 1 - before) * BM
                    p = _weights(k, Q, LSE, j, r0, n, columns, MASK, mask_strides, P, window, scale, softcap, Q_ROW, BM,
                                 BM, D, BD, RAGGED, MASKED, WINDOW, HAS_MASK, SOFTCAP, DOT)[1]  # fmt: skip
                    if HAS_GATE:
                        p *= g[:, None]
                    p = tl.dot(S, p.to(S.dtype), p, input_precision=DOT).to(S.dtype)
                    wait(flag, before + 1)
                    y = tl.dot(p, load_tile(Y, r0, D, n, BM, D, BD, RAGGED), y, input_precision=DOT)
            # dW is taken from the rounded Y, so δ, its weighted mean, is too.
            y = y.to(u.dtype)
            delta = tl.sum(y.to(tl.float32) * load_tile(A, c0, D, n, BM, D, BD, RAGGED), 1)
            store_tile(Y, y, c0, D, n, BM, D, BD)
            tl.store(DELTA + i, delta, mask=i < n)
            if CHAIN:
                publish(flag, rank + 1)
        # Last the rows that `du` must not have had before the solve: those of a link, and the block's own.
        if CHAIN:
            du, dk, d = _row_tiles(near, end, blocks * BM, k, u, Q, V, Y, LSE, DELTA, j, c0, n, columns, MASK,
                                   mask_strides, P, window, scale, softcap, du, dk, d, False, HAS_GATE, Q_ROW, V_ROW,
                                   BN, BM, D, BD, RAGGED, MASKED, WINDOW, HAS_MASK, SOFTCAP, DOT)  # fmt: skip
        du, dk, d = _row_tiles(end, end + R, blocks * BM, k, u, Q, V, Y, LSE, DELTA, j, c0, n, columns, MASK,
                               mask_strides, P, window, scale, softcap, du, dk, d, True, HAS_GATE, Q_ROW, V_ROW,
                               BN, BM, D, BD, RAGGED, MASKED, WINDOW, HAS_MASK, SOFTCAP, DOT)  # fmt: skip
        dv = d[:, None] * load_tile(Y, c0, D, n, BM, D, BD, RAGGED)
        if HAS_GATE:
            dv += (1.0 - g)[:, None] * du
            v = load_tile(V, c0, V_ROW, n, BM, D, BD, RAGGED)
            a = load_tile(A, c0, D, n, BM, D, BD, RAGGED)
            tl.store(DGATE + head + i, tl.sum(du * (a.to(tl.float32) - v), 1), mask=i < n)
        store_tile(DV + head * D, dv, c0, D, n, BM, D, BD)
        store_tile(DK + head * D, dk * scale, c0, D, n, BM, D, BD)


@triton.jit
def _dq_step(q, y, lse, delta, K, U, j, n, k_stride, u_stride, seen, dq, scale, softcap,
             BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, GUARD: tl.constexpr, MASKED: tl.constexpr,
             SOFTCAP: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Add what columns j … j + BN of K and U give to dQ."""
    k = load_tile(K, j, k_stride, n, BN, D, BD, GUARD)
    s = scores(q, k, scale, softcap, SOFTCAP, DOT)
    p = tl.math.exp2(s - lse[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    u = load_tile(U, j, u_stride, n, BN, D, BD, GUARD)
    ds = p * (tl.dot(y, tl.trans(u), input_precision=DOT) - delta[:, None]) * slope(s, softcap, SOFTCAP)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=DOT)


@triton.jit(do_not_specialize=["B", "H", "T", "P", "window", "wave"])
def dq_kernel(
    Q, K, V, K_PAST, U_PAST, MASK, CU, SCHEDULE, A, U, LSE, SAVED, Y, DELTA, DQ,
    q_strides, k_strides, v_strides, k_past_strides, u_past_strides, mask_strides,
    scale, softcap, B, H, T, P, window, wave,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SOLVED: tl.constexpr,
    ROW: tl.constexpr, HAS_PAST: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one row block of one head, longest rows first; with SOLVED also δ, and Y from the Z of a sweep."""
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    MASKED: tl.constexpr = WINDOW or HAS_MASK
    _, b, h, rank, start, n = locate(tl.program_id(0), CU, SCHEDULE, B, H, T, wave, PACKED)
    blocks = tl.cdiv(n, BM)
    if PACKED and rank >= blocks:
        return
    r0 = (blocks - 1 - rank) * BM
    b = tl.cast(b, tl.int64)
    head = (b * H + h) * T + start
    Q += b * q_strides[0] + h * q_strides[1] + tl.cast(start, tl.int64) * Q_ROW
    K += b * k_strides[0] + h // GROUP * k_strides[1] + tl.cast(start, tl.int64) * K_ROW
    V += b * v_strides[0] + h // GROUP * v_strides[1] + tl.cast(start, tl.int64) * V_ROW
    if HAS_MASK:
        MASK += b * mask_strides[0] + h * mask_strides[1]
    i = tl.arange(0, BM)
    rows = r0 + i
    q = load_tile(Q, r0, Q_ROW, n, BM, D, BD, RAGGED)
    y = load_tile(Y + head * D, r0, D, n, BM, D, BD, RAGGED)
    lse = tl.load(LSE + head + rows, mask=rows < n, other=float("inf")) / LN2
    if SOLVED:
        S = tl.trans(load_tile(SAVED + head * ROW, r0, ROW, n, BM, BM, BM, RAGGED))
        y = tl.dot(S, y, y.to(tl.float32), input_precision=DOT).to(y.dtype)
        store_tile(Y + head * D, y, r0, D, n, BM, D, BD)
        delta = tl.sum(y.to(tl.float32) * load_tile(A + head * D, r0, D, n, BM, D, BD, RAGGED), 1)
        tl.store(DELTA + head + rows, delta, mask=rows < n)
    else:
        delta = tl.load(DELTA + head + rows, mask=rows < n, other=0.0)
    k = load_tile(K, r0, K_ROW, n, BM, D, BD, RAGGED)
    u = load_tile(U + head * D, r0, D, n, BM, D, BD, RAGGED)
    v = load_tile(V, r0, V_ROW, n, BM, D, BD, RAGGED)
    s = scores(q, k, scale, softcap, SOFTCAP, DOT)
    inside = i[:, None] >= i[None, :]
    if MASKED:
        inside = inside & visible((P + rows)[:, None], (P + rows)[None, :], P + n, P + n, MASK, mask_strides, P, window,
                              WINDOW, HAS_MASK)  # fmt: skip
    p = tl.where(inside, tl.math.exp2(s - lse[:, None]), 0.0)
    dw = tl.dot(y, tl.trans(u), input_precision=DOT)
    dw = tl.where(i[:, None] == i[None, :], tl.sum(y.to(tl.float32) * v, 1)[:, None], dw)
    ds = p * (dw - delta[:, None]) * slope(s, softcap, SOFTCAP)
    dq = tl.dot(ds.to(k.dtype), k, input_precision=DOT)
    if HAS_PAST:
        K_PAST += b * k_past_strides[0] + h // GROUP * k_past_strides[1]
        U_PAST += b * u_past_strides[0] + h * u_past_strides[1]
        first = tl.maximum(P + r0 - window + 1, 0) // BN * BN if WINDOW else 0
        for j in range(first, P, BN):
            seen = visible((P + rows)[:, None], (j + tl.arange(0, BN))[None, :], P + n, P, MASK, mask_strides, P,
                           window, WINDOW, HAS_MASK)  # fmt: skip
            dq = _dq_step(q, y, lse, delta, K_PAST, U_PAST, j, P, k_past_strides[2], u_past_strides[2], seen, dq, scale,
                          softcap, BN, D, BD, True, True, SOFTCAP, DOT)  # fmt: skip
    first = tl.maximum(r0 - window + 1, 0) // BN * BN if WINDOW else 0
    for j in range(first, r0, BN):
        seen = True
        if MASKED:
            seen = visible((P + rows)[:, None], (P + j + tl.arange(0, BN))[None, :], P + n, P + n, MASK,
                           mask_strides, P, window, WINDOW, HAS_MASK)  # fmt: skip
        dq = _dq_step(q, y, lse, delta, K, U + head * D, j, n, K_ROW, D, seen, dq, scale, softcap, BN, D, BD,
                      False, MASKED, SOFTCAP, DOT)  # fmt: skip
    store_tile(DQ + head * D, dq * scale, r0, D, n, BM, D, BD)
