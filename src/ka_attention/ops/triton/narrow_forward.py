"""Narrow windows, forward: a scan over the affine maps of blocks (docs/maths.md, "Windows").

A block of BM ≥ window − 1 rows reads, of all that lies before it, the block before it only:

    A_b = R_b V_b + F_b U_{b−1},     R = (I − L G)⁻¹ (L (I − G) + diag(d)),     F = (I − L G)⁻¹ W_b,b−1

`maps_kernel` forms R and F, and walks the blocks of a segment with U = 0 before it. That gives what the segment makes
of any U before it, U ↦ c + M U: a map of BM rows. `scan_kernel` goes through the maps of a head, and `apply_kernel`
walks again: R, F and U are there already. Cached tokens are the block before the first, packed sequences are one with
a mask. Where a mask keeps tokens apart (APART) it keeps apart also what is not finite; the check costs 6 to 8 %.
"""

import triton
import triton.language as tl

from ka_attention.ops.triton.primitives import LN2, inverse, scores


@triton.jit
def block(X, r0, stride, n, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Rows r0 … r0 + BM of X [n, D] as [BM, BD]; 0 outside, also before the first."""
    r = tl.arange(0, BM)[:, None]
    d = tl.arange(0, BD)[None, :]
    inside = (r0 + r >= 0) & (r0 + r < n)
    if D != BD:
        inside = inside & (d < D)
    return tl.load(X + (tl.cast(r0, tl.int64) * stride + (r * stride + d)), mask=inside, other=0.0)


@triton.jit
def cached(x, X, r0, P, stride, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """x, with rows r < 0 from the end of X [P, D]."""
    r = r0 + tl.arange(0, BM)[:, None]
    d = tl.arange(0, BD)[None, :]
    inside = (r < 0) & (P + r >= 0) & (d < D)
    return tl.where(r < 0, tl.load(X + (tl.cast(P + r, tl.int64) * stride + d), mask=inside, other=0.0), x)


@triton.jit
def put(X, x, r0, stride, low, n, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Store x [BM, BD] as rows r0 … of X [n, D], rounded to X's dtype; nothing below row `low`."""
    r = tl.arange(0, BM)[:, None]
    d = tl.arange(0, BD)[None, :]
    inside = (r0 + r >= low) & (r0 + r < n)
    if D != BD:
        inside = inside & (d < D)
    tl.store(X + (tl.cast(r0, tl.int64) * stride + (r * stride + d)), x.to(X.dtype.element_ty), mask=inside)


@triton.jit
def gates(GATE, rows, stride, n):
    """Gates of the rows; 0 outside."""
    return tl.load(GATE + tl.cast(rows, tl.int64) * stride, mask=(rows >= 0) & (rows < n), other=0.0)


@triton.jit
def attends(i, j, n, P, window, STARTS, MASK, mask_strides, PACKED: tl.constexpr, HAS_MASK: tl.constexpr):
    """Whether new token i [BM] attends to token j [BM], which is a cached one where negative: [BM, BM]."""
    seen = (i >= 0) & (i < n)
    if PACKED:
        first = tl.load(STARTS + i, mask=seen, other=0)
    else:
        first = i * 0 - P
    seen = seen[:, None] & (j[None, :] <= i[:, None]) & (i[:, None] - j[None, :] < window)
    seen = seen & (j[None, :] >= first[:, None])
    if HAS_MASK:
        mask = MASK + (
            tl.cast(i, tl.int64)[:, None] * mask_strides[2] + tl.cast(P + j, tl.int64)[None, :] * mask_strides[3]
        )
        seen = seen & (tl.load(mask, mask=seen, other=0) != 0)
    return seen


@triton.jit
def small(x, PRECISION: tl.constexpr):
    """x, of entries that are weights, as an operand: float16 has the mantissa of tf32 and suffices for their range."""
    return x.to(tl.float16) if PRECISION == "half" else x


@triton.jit
def _finite(x):
    """0 for what is no finite number."""
    return tl.where(x * 0.0 == 0.0, x, 0.0).to(x.dtype)


@triton.jit
def _spread(W, x):
    """W with NaN for every weight, other than 0, of a row of x that is not finite."""
    lost = tl.sum(x.to(tl.float32) * 0.0, 1) != 0.0
    return tl.where(lost[None, :] & (W != 0.0), float("nan"), W)


@triton.jit
def _read(R, v, F, u, V, r0, V_ROW: tl.constexpr, n, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
          APART: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """R v + F u, v being the rows r0 … of V. With APART what is not finite in v and u reaches those who give it weight
    and nobody else: 0 · NaN is 0 there.
    """
    a = tl.dot(R.to(v.dtype), v, input_precision=DOT)
    a = tl.dot(F.to(v.dtype), u, a, input_precision=DOT)
    if APART and tl.sum(a * 0.0) != 0.0:
        v = block(V, r0, V_ROW, n, BM, D, BD)  # again, so that it need not stay in registers
        a = tl.dot(_spread(R, v).to(v.dtype), _finite(v), input_precision=DOT)
        a = tl.dot(_spread(F, u).to(v.dtype), _finite(u), a, input_precision=DOT)
    return a


@triton.jit(do_not_specialize=["gate_strides", "mask_strides", "H", "T", "P", "window", "span", "segments"])
def maps_kernel(
    Q, K, V, GATE, K_PAST, U_PAST, MASK, STARTS, A, LSE, RF, STATE, MAP,
    q_strides, k_strides, v_strides, gate_strides, k_past_strides, u_past_strides, mask_strides,
    scale, softcap, H, T, P, window, span, segments,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, WHOLE: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_PAST: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The blocks of one segment of one head: log-sum-exp, R and F side by side in RF [T, 2 BM], and the segment's map.
    WHOLE: the segment is the sequence, so A itself.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    head = tl.program_id(0) // segments
    segment = tl.program_id(0) % segments
    b = tl.cast(head // H, tl.int64)
    h = head % H
    head = tl.cast(head, tl.int64)
    Q += b * q_strides[0] + h * q_strides[1]
    K += b * k_strides[0] + h // GROUP * k_strides[1]
    V += b * v_strides[0] + h // GROUP * v_strides[1]
    i = tl.arange(0, BM)
    diagonal = i[:, None] == i[None, :]
    first = segment * span
    u = tl.zeros([BM, BD], Q.dtype.element_ty)
    if HAS_PAST:
        K_PAST += b * k_past_strides[0] + h // GROUP * k_past_strides[1]
        U_PAST += b * u_past_strides[0] + h * u_past_strides[1]
        u = cached(u, U_PAST, (first - 1) * BM, P, u_past_strides[2], BM, D, BD)
    if HAS_MASK:
        MASK += b * mask_strides[0] + h * mask_strides[1]
    if HAS_GATE:
        GATE += b * gate_strides[0] + h * gate_strides[1]
    M = tl.where(diagonal, 1.0, 0.0)
    for tile in range(first, tl.minimum(first + span, tl.cdiv(T, BM))):
        r0 = tile * BM
        rows = r0 + i
        q = block(Q, r0, Q_ROW, T, BM, D, BD)
        k = block(K, r0, K_ROW, T, BM, D, BD)
        before = block(K, r0 - BM, K_ROW, T, BM, D, BD)
        if HAS_PAST:
            before = cached(before, K_PAST, r0 - BM, P, k_past_strides[2], BM, D, BD)
        v = block(V, r0, V_ROW, T, BM, D, BD)
        seen = attends(rows, rows, T, P, window, STARTS, MASK, mask_strides, PACKED, HAS_MASK)
        s = tl.where(seen, scores(q, k, scale, softcap, SOFTCAP, DOT), -float("inf"))
        seen = attends(rows, rows - BM, T, P, window, STARTS, MASK, mask_strides, PACKED, HAS_MASK)
        sp = tl.where(seen, scores(q, before, scale, softcap, SOFTCAP, DOT), -float("inf"))
        top = tl.max(tl.maximum(s, sp), 1)
        shift = tl.where(top == -float("inf"), 0.0, top)  # a row that attends nothing
        p = tl.math.exp2(s - shift[:, None])
        pp = tl.math.exp2(sp - shift[:, None])
        total = tl.sum(p + pp, 1)
        tl.store(LSE + head * T + rows, (shift + tl.math.log2(total)) * LN2, mask=rows < T)
        r = tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
        p *= r
        pp *= r
        if APART:
            known = total * 0.0 == 0.0  # no score of the row is NaN or infinite
            p = tl.where(known[:, None], p, 0.0)
            pp = tl.where(known[:, None], pp, 0.0)
        L = tl.where(diagonal, 0.0, p)
        if HAS_GATE:
            g = gates(GATE, rows, gate_strides[2], T)
            R = p - L * g[None, :]
            S = inverse(L * g[None, :], BM, PRECISION)
            R = tl.dot(small(S, PRECISION), small(R, PRECISION), R, input_precision=DOT)
        else:
            S = inverse(L, BM, PRECISION)
            d = tl.sum(tl.where(diagonal, p, 0.0), 0)
            R = tl.where(diagonal, 1.0, S) * d[None, :]
        F = tl.dot(small(S, PRECISION), small(pp, PRECISION), pp, input_precision=DOT)
        if APART and tl.sum(total * 0.0) != 0.0:  # rows without weights, and those that read them
            lost = tl.where((diagonal | (S != 0.0)) & (known[None, :] == 0), 1.0, 0.0)
            R = tl.where(tl.sum(lost, 1)[:, None] > 0.0, float("nan"), R)
        a = _read(R, v, F, u, V, r0, V_ROW, T, BM, D, BD, APART, DOT)
        if HAS_GATE:
            u = (v + g[:, None] * (a - v)).to(v.dtype)
        else:
            u = a.to(v.dtype)
        if WHOLE:
            put(A + head * T * D, a, r0, D, 0, T, BM, D, BD)
        else:
            put(RF + head * T * 2 * BM, R, r0, 2 * BM, 0, T, BM, BM, BM)
            put(RF + head * T * 2 * BM + BM, F, r0, 2 * BM, 0, T, BM, BM, BM)
            M = tl.dot(small(F, PRECISION), small(M, PRECISION), input_precision=DOT)
            if HAS_GATE:
                M *= g[:, None]
    if not WHOLE:
        put(STATE + head * segments * BM * D, u, segment * BM, D, 0, segments * BM, BM, D, BD)
        put(MAP + head * segments * BM * BM, M, segment * BM, BM, 0, segments * BM, BM, BM, BM)


@triton.jit
def _scan(STATE, MAP, INTO, segments, d, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, REVERSE: tl.constexpr,
          SPREAD: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """The loop of `scan_kernel`; 0 · u of all u together."""
    i = tl.arange(0, BM)[:, None]
    u = tl.zeros([BM, BD], STATE.dtype.element_ty)
    zero = tl.zeros([BM, BD], tl.float32)
    for step in tl.range(0, segments, num_stages=1 if SPREAD else 4):
        segment = segments - 1 - step if REVERSE else step
        state = (segment * BM + i) * D + d
        c = tl.load(STATE + state, mask=d < D, other=0.0)
        M = tl.load(MAP + (segment * BM + i) * BM + tl.arange(0, BM)[None, :])
        tl.store(INTO + state, u, mask=d < D)
        zero += u.to(tl.float32) * 0.0
        if SPREAD:
            M = _spread(M.to(tl.float32), u).to(M.dtype)
            u = _finite(u)
        u = tl.dot(M, u, c.to(tl.float32), input_precision=DOT).to(u.dtype)
    return zero


@triton.jit(do_not_specialize=["segments"])
def scan_kernel(
    STATE, MAP, INTO, segments,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, REVERSE: tl.constexpr, APART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """u ← c + M u over the segments of one head, for BD columns of the head dimension. STATE holds every c, INTO gets
    the u that each segment meets.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    head = tl.cast(tl.program_id(0), tl.int64) * segments * BM
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    STATE += head * D
    MAP += head * BM
    INTO += head * D
    zero = _scan(STATE, MAP, INTO, segments, d, D, BD, BM, REVERSE, False, DOT)
    if APART and tl.sum(zero) != 0.0:
        _scan(STATE, MAP, INTO, segments, d, D, BD, BM, REVERSE, True, DOT)


@triton.jit(do_not_specialize=["gate_strides", "H", "T", "P", "span", "segments"])
def apply_kernel(
    V, GATE, U_PAST, RF, STATE, A,
    v_strides, gate_strides, u_past_strides, H, T, P, span, segments,
    V_ROW: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_PAST: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A of one segment of one head, from the U before it and the R and F of its blocks."""
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    head = tl.program_id(0) // segments
    segment = tl.program_id(0) % segments
    b = tl.cast(head // H, tl.int64)
    h = head % H
    head = tl.cast(head, tl.int64)
    V += b * v_strides[0] + h // GROUP * v_strides[1]
    RF += head * T * 2 * BM
    A += head * T * D
    i = tl.arange(0, BM)
    first = segment * span
    u = block(STATE + head * segments * BM * D, segment * BM, D, segments * BM, BM, D, BD)
    if HAS_PAST:
        U_PAST += b * u_past_strides[0] + h * u_past_strides[1]
        u = cached(u, U_PAST, (first - 1) * BM, P, u_past_strides[2], BM, D, BD)
    if HAS_GATE:
        GATE += b * gate_strides[0] + h * gate_strides[1]
    for tile in range(first, tl.minimum(first + span, tl.cdiv(T, BM))):
        r0 = tile * BM
        v = block(V, r0, V_ROW, T, BM, D, BD)
        R = block(RF, r0, 2 * BM, T, BM, BM, BM)
        F = block(RF + BM, r0, 2 * BM, T, BM, BM, BM)
        a = _read(R, v, F, u, V, r0, V_ROW, T, BM, D, BD, APART, DOT)
        put(A, a, r0, D, 0, T, BM, D, BD)
        if HAS_GATE:
            g = gates(GATE, r0 + i, gate_strides[2], T)
            u = (v + g[:, None] * (a - v)).to(v.dtype)
        else:
            u = a.to(v.dtype)
