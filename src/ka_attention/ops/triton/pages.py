"""Packed new tokens, each sequence after its past in pages: decode steps and chunks of prompts in the same kernels.

A past needs no system, its U are known: ordinary attention, here in pieces of `span` tokens side by side where there
are few rows, so that a long past is not read by one program. The new tokens of a sequence are a chain of row blocks, as
in `forward_kernel`, whose first softmax state is that of the past. `pasts.py` launches them.
"""

import triton
import triton.language as tl

from ka_attention.ops.triton.primitives import inverse, load_tile, publish, scores, store_tile, wait


@triton.jit
def _find(t, CU, N, BM: tl.constexpr, MOST: tl.constexpr):
    """(sequence, first row, first token, number of tokens) of row block t; those of n begin at cu[n] // BM + n."""
    n = t * 0 - 1
    for i in range(0, N, MOST):
        at = i + tl.arange(0, MOST)
        first = tl.load(CU + at, mask=at < N, other=0) // BM + at
        n += tl.sum(((first <= t) & (at < N)).to(tl.int32))
    start = tl.load(CU + n)
    return n, (t - start // BM - n) * BM, start, tl.load(CU + n + 1) - start


@triton.jit
def _gates(GATE, token, stride, inside, low, high):
    """The gates of some tokens of one head, clamped."""
    g = tl.load(GATE + token * stride, mask=inside, other=0.0).to(tl.float32)
    return tl.minimum(tl.maximum(g, low), high)


@triton.jit
def _absorb(q, k, u, seen, acc, m, total, scale, softcap, SOFTCAP: tl.constexpr, DOT: tl.constexpr):
    """One step of online softmax."""
    s = tl.where(seen, scores(q, k, scale, softcap, SOFTCAP, DOT), -float("inf"))
    top = tl.maximum(m, tl.max(s, 1))
    shift = tl.where(top == -float("inf"), 0.0, top)
    p = tl.math.exp2(s - shift[:, None])
    alpha = tl.math.exp2(m - shift)
    acc = tl.dot(p.to(u.dtype), u, acc * alpha[:, None], input_precision=DOT)
    return acc, top, total * alpha + tl.sum(p, 1)


@triton.jit
def _first(length, r0, window, BN: tl.constexpr, WINDOW: tl.constexpr):
    """The first token of the past in sight of rows from r0 on, and where a loop over steps of BN begins."""
    lowest = length * 0
    if WINDOW:
        lowest = tl.minimum(tl.maximum(length + r0 - window + 1, 0), length)
    return lowest, tl.where(lowest < length, lowest // BN * BN, length)


@triton.jit
def _past(q, K, U, TABLE, lowest, first, last, i, window, scale, softcap, k_strides, u_strides, S, width,
          BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WINDOW: tl.constexpr,
          WHOLE: tl.constexpr, SOFTCAP: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Softmax state of rows at positions i [BM, 1] over tokens first … last of the past, none before `lowest`, whose
    pages may be gone. WHOLE: a step is in one page.
    """
    m = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    d = tl.arange(0, BD)[None, :]
    for j in range(first, last, BN):
        p = j + tl.arange(0, BN)
        inside = (p >= lowest) & (p < last)
        if WHOLE:
            page = tl.load(TABLE + j // S % width).to(tl.int64)
            slot = (j % S + tl.arange(0, BN))[:, None]
        else:
            page = tl.load(TABLE + p // S % width, mask=inside, other=0).to(tl.int64)[:, None]
            slot = (p % S)[:, None]
        held = inside[:, None] & (d < D)
        k = tl.load(K + (page * k_strides[0] + slot * k_strides[2] + d), mask=held, other=0.0)
        u = tl.load(U + (page * u_strides[0] + slot * u_strides[2] + d), mask=held, other=0.0)
        seen = inside[None, :]
        if WINDOW:
            seen = seen & (i - p[None, :] < window)
        acc, m, total = _absorb(q, k, u, seen, acc, m, total, scale, softcap, SOFTCAP, DOT)
    return acc, m, total


@triton.jit(do_not_specialize=["N", "T", "window", "span", "width"])
def past_kernel(
    Q, K, U, TABLE, LENGTHS, CU, PART, LSE, q_strides, k_strides, u_strides, table_stride, scale, softcap, N, T, window,
    span, S, width, Q_ROW: tl.constexpr, GROUP: tl.constexpr, U_GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MOST: tl.constexpr, WINDOW: tl.constexpr, WHOLE: tl.constexpr,
    SOFTCAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A of one row block over one piece of its past alone, and the log-sum-exp, in units of log 2."""
    n, r0, start, rows = _find(tl.program_id(0), CU, N, BM, MOST)
    h = tl.program_id(1)
    length = tl.load(LENGTHS + n)
    lowest, first = _first(length, r0, window, BN, WINDOW)
    first += tl.program_id(2) * span
    if (r0 >= rows) | (first >= length):
        return
    i = length + r0 + tl.arange(0, BM)[:, None]
    q = load_tile(Q + h * q_strides[1] + tl.cast(start, tl.int64) * Q_ROW, r0, Q_ROW, rows, BM, D, BD, True)
    acc, m, total = _past(
        q, K + h // GROUP * k_strides[1], U + h // U_GROUP * u_strides[1], TABLE + n * table_stride, lowest,
        first, tl.minimum(first + span, length), i, window, scale, softcap, k_strides, u_strides, S, width,
        BM, BN, D, BD, WINDOW, WHOLE, SOFTCAP, DOT,
    )  # fmt: skip
    piece = tl.program_id(2) * tl.num_programs(1) + h
    row = r0 + tl.arange(0, BM)
    at = tl.cast(piece, tl.int64) * T + start
    store_tile(PART + at * D, acc / tl.where(total == 0.0, 1.0, total)[:, None], r0, D, rows, BM, D, BD)
    lse = tl.where(total == 0.0, -float("inf"), m + tl.math.log2(tl.where(total == 0.0, 1.0, total)))
    tl.store(LSE + at + row, lse, mask=row < rows)


@triton.jit
def _rest(tile, h, K, V, GATE, CU, K2, V2, GATE2, STARTS, k_strides, v_strides, gate_strides, low, high, N, T,
          K_ROW: tl.constexpr, V_ROW: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
          BM: tl.constexpr, FIRST: tl.constexpr, STEPS: tl.constexpr, HAS_GATE: tl.constexpr):  # fmt: skip
    """V, gates and, where heads share them, K of BM tokens for one head, for sequences whose first FIRST tokens have U
    in V's place. STARTS: the first token that each sees; one of those itself alone, so that U is what it gets, and
    padding none.
    """
    t = tile * BM + tl.arange(0, BM)
    n = t * 0  # the last sequence that begins at t or before, 2^STEPS > N
    for step in tl.static_range(STEPS):
        at = n + (1 << (STEPS - 1 - step))
        n = tl.where(tl.load(CU + at, mask=at <= N, other=T) <= t, at, n)
    start = tl.load(CU + n, mask=t < T, other=0)
    is_first, is_new = t - start < FIRST, n < N
    if h == 0:
        tl.store(STARTS + t, tl.where(is_new, tl.where(is_first, t, start), T), mask=t < T)
    d, row = tl.arange(0, BD)[None, :], tl.cast(h, tl.int64) * T + t
    token, to = t.to(tl.int64)[:, None], row[:, None] * D + d
    rest = (t < T) & ((is_first & is_new) == 0)
    v = V + h // GROUP * v_strides[1] + token * V_ROW + d
    tl.store(V2 + to, tl.load(v, mask=(rest & is_new)[:, None] & (d < D), other=0.0), mask=rest[:, None] & (d < D))
    if GROUP > 1:
        k = K + h // GROUP * k_strides[1] + token * K_ROW + d
        tl.store(K2 + to, tl.load(k, mask=(t < T)[:, None] & (d < D), other=0.0), mask=(t < T)[:, None] & (d < D))
    if HAS_GATE:
        g = _gates(GATE + h * gate_strides[1], t, gate_strides[2], is_new & (t < T), low, high)
        tl.store(GATE2 + row, g, mask=t < T)


@triton.jit(do_not_specialize=["H", "N", "T", "window", "span", "width"])
def chunk_kernel(
    Q, K, V, GATE, K_PAGES, U_PAGES, TABLE, LENGTHS, CU, PART, LSE, FLAGS, A, U, K2, GATE2, STARTS,
    q_strides, k_strides, v_strides, gate_strides, kp_strides, up_strides, a_strides, u_strides, table_stride,
    scale, softcap, low, high, H, N, T, window, span, S, width,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, A_ROW: tl.constexpr, U_ROW: tl.constexpr,
    GROUP: tl.constexpr, U_GROUP: tl.constexpr, REST: tl.constexpr, STEPS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MOST: tl.constexpr, WINDOW: tl.constexpr,
    WHOLE: tl.constexpr, PIECES: tl.constexpr, SOLVE: tl.constexpr, CHAIN: tl.constexpr, FIRST: tl.constexpr,
    HAS_GATE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A of one row block, and U for the blocks after it. PIECES: `past_kernel` has read the past. Without SOLVE the
    gate is 0 and blocks do not wait. FIRST: of each sequence the first block alone, beside them programs that write
    what the `_rest` of it needs, REST tokens each. Gates are those of GATE, from low to high.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    h = tl.program_id(0) % H
    if FIRST:
        n, r0 = tl.program_id(0) // H, H * 0
        if n >= N:
            _rest(n - N, h, K, V, GATE, CU, K2, U, GATE2, STARTS, k_strides, v_strides, gate_strides, low, high, N, T,
                  K_ROW, V_ROW, GROUP, D, BD, REST, BM, STEPS, HAS_GATE)  # fmt: skip
            return
        start = tl.load(CU + n)
        rows = tl.minimum(tl.load(CU + n + 1) - start, BM)
    else:
        n, r0, start, rows = _find(tl.program_id(0) // H, CU, N, BM, MOST)
    if CHAIN:
        # A program takes the next block of its sequence and head, so whom it waits for runs already.
        FLAGS += (n * H + h) * 2
        if rows > BM:
            r0 = tl.atomic_add(FLAGS, 1) * BM
    if r0 >= rows:
        return
    row = r0 + tl.arange(0, BM)
    start = tl.cast(start, tl.int64)
    length = tl.load(LENGTHS + n)
    q = load_tile(Q + h * q_strides[1] + start * Q_ROW, r0, Q_ROW, rows, BM, D, BD, True)
    lowest, first = _first(length, r0, window, BN, WINDOW)
    if PIECES:
        m = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BD], tl.float32)
        for piece in tl.range(0, tl.cdiv(length - first, span), num_stages=3):
            at = tl.cast(piece * H + h, tl.int64) * T + start
            lse = tl.load(LSE + at + row, mask=row < rows, other=-float("inf"))
            top = tl.maximum(m, lse)
            shift = tl.where(top == -float("inf"), 0.0, top)
            alpha, beta = tl.math.exp2(m - shift), tl.math.exp2(lse - shift)
            part = load_tile(PART + at * D, r0, D, rows, BM, D, BD, True)
            acc = acc * alpha[:, None] + part * beta[:, None]
            m, total = top, total * alpha + beta
    else:
        acc, m, total = _past(
            q, K_PAGES + h // GROUP * kp_strides[1], U_PAGES + h // U_GROUP * up_strides[1], TABLE + n * table_stride,
            lowest, first, length, length + row[:, None], window, scale, softcap, kp_strides, up_strides, S, width,
            BM, BN, D, BD, WINDOW, WHOLE, SOFTCAP, DOT,
        )  # fmt: skip

    K += h // GROUP * k_strides[1] + start * K_ROW
    V += h // GROUP * v_strides[1] + start * V_ROW
    A += h * a_strides[1] + start * A_ROW
    j = tl.maximum(r0 - window + 1, 0) // BN * BN if WINDOW else r0 * 0
    if not SOLVE:
        for c in range(j, tl.minimum(r0 + BM, rows), BN):
            at = c + tl.arange(0, BN)
            k = load_tile(K, c, K_ROW, rows, BN, D, BD, True)
            v = load_tile(V, c, V_ROW, rows, BN, D, BD, True)
            seen = (at[None, :] <= row[:, None]) & (at < rows)[None, :]
            if WINDOW:
                seen = seen & (row[:, None] - at[None, :] < window)
            acc, m, total = _absorb(q, k, v, seen, acc, m, total, scale, softcap, SOFTCAP, DOT)
        store_tile(A, acc / tl.where(total == 0.0, 1.0, total)[:, None], r0, A_ROW, rows, BM, D, BD)
    else:
        if U is not None:
            U += h * u_strides[1] + start * U_ROW
        if CHAIN:
            while j < r0:
                stop = tl.minimum(wait(FLAGS + 1, j // BM + 1) * BM, r0)
                for c in range(j, stop, BN):
                    at = c + tl.arange(0, BN)
                    k = load_tile(K, c, K_ROW, rows, BN, D, BD, True)
                    u = load_tile(U, c, U_ROW, stop, BN, D, BD, True)  # beyond it nobody has written
                    seen = (at < stop)[None, :]
                    if WINDOW:
                        seen = seen & (row[:, None] - at[None, :] < window)
                    acc, m, total = _absorb(q, k, u, seen, acc, m, total, scale, softcap, SOFTCAP, DOT)
                j = stop
        i = tl.arange(0, BM)
        k = load_tile(K, r0, K_ROW, rows, BM, D, BD, True)
        v = load_tile(V, r0, V_ROW, rows, BM, D, BD, True)
        s = scores(q, k, scale, softcap, SOFTCAP, DOT)
        seen = (i[:, None] >= i[None, :]) & (row < rows)[None, :]
        if WINDOW:
            seen = seen & (i[:, None] - i[None, :] < window)
        s = tl.where(seen, s, -float("inf"))
        top = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(top == -float("inf"), 0.0, top)
        p = tl.math.exp2(s - shift[:, None])
        alpha = tl.math.exp2(m - shift)
        total = total * alpha + tl.sum(p, 1)
        r = tl.where(total == 0.0, 0.0, 1.0 / total)
        p = p * r[:, None]
        d = tl.sum(tl.where(i[:, None] == i[None, :], p, 0.0), 1)
        L = tl.where(i[:, None] > i[None, :], p, 0.0)
        a = acc * (alpha * r)[:, None] + d[:, None] * v
        g = tl.full([BM], 1.0, tl.float32)
        if HAS_GATE:
            g = _gates(GATE + h * gate_strides[1], start + row, gate_strides[2], row < rows, low, high)
        if rows > 1:  # one new token has no system
            if HAS_GATE:
                a = tl.dot((L * (1.0 - g)[None, :]).to(v.dtype), v, a, input_precision=DOT)
                L = L * g[None, :]
            a = tl.dot(inverse(L, BM, PRECISION).to(v.dtype), a.to(v.dtype), a, input_precision=DOT)
        store_tile(A, a, r0, A_ROW, rows, BM, D, BD)
        if FIRST or (CHAIN and HAS_GATE):
            store_tile(U, v + g[:, None] * (a - v), r0, U_ROW, rows, BM, D, BD)
        if CHAIN and rows > BM:
            publish(FLAGS + 1, r0 // BM + 1)


@triton.jit(do_not_specialize=["T", "nowhere"])
def store_kernel(
    K, V, A, GATE, PLACE, K_PAGES, U_PAGES, k_strides, v_strides, a_strides, gate_strides, kp_strides, up_strides,
    low, high, T, stride, nowhere, GROUP: tl.constexpr, U_GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, SOLVE: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """K, and U = V + g (A − V), of BM tokens and one head into their slots, if they have any; V without SOLVE."""
    h = tl.program_id(1)
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)[None, :]
    place = tl.load(PLACE + t, mask=t < T, other=0)[:, None]
    page, slot, inside = place // stride, place % stride, ((t < T)[:, None] & (place != nowhere)) & (d < D)
    t = t.to(tl.int64)[:, None]
    if h % GROUP == 0:
        k = tl.load(K + h // GROUP * k_strides[1] + t * k_strides[2] + d, mask=inside)
        tl.store(K_PAGES + page * kp_strides[0] + h // GROUP * kp_strides[1] + slot * kp_strides[2] + d, k, mask=inside)
    if h % U_GROUP == 0:
        u = tl.load(V + h // GROUP * v_strides[1] + t * v_strides[2] + d, mask=inside)
        if SOLVE:
            a = tl.load(A + h * a_strides[1] + t * a_strides[2] + d, mask=inside)
            if HAS_GATE:
                u = u + _gates(GATE + h * gate_strides[1], t, gate_strides[2], t < T, low, high) * (
                    a.to(tl.float32) - u
                )
            else:
                u = a
        at = page * up_strides[0] + h // U_GROUP * up_strides[1] + slot * up_strides[2] + d
        tl.store(U_PAGES + at, u.to(U_PAGES.dtype.element_ty), mask=inside)
