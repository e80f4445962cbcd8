"""Narrow windows, forward: a scan over the affine maps of segments (docs/maths.md, "Windows").

A block has as many rows as the window reaches back, BEFORE of them, so it reads the block before it and nothing else:

    A_b = F_b U_{b−1} + R_b V_b,     [F R] = (I − N)⁻¹ [W_{b,b−1} W_bb − N],     N = L_bb G

`weights_kernel` forms the rows of F, R and, where there is room beside F, S of (I − N)⁻¹ = I + S. Then it is to walk:
`walk_kernel` first with nothing before a segment, and with the unit matrix there and V = 0, which gives what the
segment makes of any state before it, u ↦ c + M u; `scan_kernel` goes through the maps of a head; `walk_kernel` again,
from the states found, gives A. With blocks of 16 rows the first walk is short, and `weights_kernel` does it as it goes.
Columns of the head dimension are independent: programs share them out. Cached tokens are the block before the first,
packed sequences are one with a mask. Where a mask keeps tokens apart (APART) it keeps apart what is not finite, too.
"""

import triton
import triton.language as tl

from ka_attention.ops.triton.primitives import LN2, block, capped, inverse, put


@triton.jit
def place(H, segments):
    """Where this program works: head of all, batch entry, head of the entry, segment."""
    head = tl.program_id(0) // segments
    b = tl.cast(head // H, tl.int64)
    return tl.cast(head, tl.int64), b, head % H, tl.program_id(0) % segments


@triton.jit
def joined(X, PAST, r0, stride, past_stride, n, P, d0, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
           HAS_PAST: tl.constexpr):  # fmt: skip
    """`block`, with rows r < 0 from the end of PAST [P, D]. One load, as the address is chosen: two cost registers."""
    if HAS_PAST:
        r = r0 + tl.arange(0, ROWS)[:, None]
        d = d0 + tl.arange(0, BD)[None, :]
        row = tl.cast(r, tl.int64)
        x = tl.where(r < 0, PAST + ((P + row) * past_stride + d), X + (row * stride + d))
        return tl.load(x, mask=(r >= -P) & (r < n) & (d < D), other=0.0)
    else:
        return block(X, r0, stride, n, d0, ROWS, D, BD)


@triton.jit
def gates(GATE, rows, stride, n):
    """Gates of the rows; 0 outside."""
    return tl.load(GATE + tl.cast(rows, tl.int64) * stride, mask=(rows >= 0) & (rows < n), other=0.0)


@triton.jit
def attends(i, j, n, P, window, STARTS, MASK, mask_strides, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
            HAS_MASK: tl.constexpr):  # fmt: skip
    """Whether token i, if there is one, attends to token j, cached where negative: [i, j]. Not CAUSAL: all j < i."""
    exists = (i >= 0) & (i < n)
    if PACKED:
        first = tl.load(STARTS + i, mask=exists, other=0)
    else:
        first = i * 0 - P
    seen = j[None, :] >= tl.maximum(first, i - window + 1)[:, None]
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None])
    if HAS_MASK:
        seen = seen & exists[:, None]
        mask = MASK + (
            tl.cast(i, tl.int64)[:, None] * mask_strides[2] + tl.cast(P + j, tl.int64)[None, :] * mask_strides[3]
        )
        seen = seen & (tl.load(mask, mask=seen, other=0) != 0)
    return seen


@triton.jit(do_not_specialize=["gate_strides", "mask_strides", "H", "T", "P", "window", "span", "segments"])
def weights_kernel(
    Q, K, V, GATE, K_PAST, U_PAST, MASK, STARTS, LSE, F, R, STATE, MAP,
    q_strides, k_strides, v_strides, gate_strides, k_past_strides, u_past_strides, mask_strides,
    scale, softcap, H, T, P, window, span, segments,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, BEFORE: tl.constexpr,
    WIDTH: tl.constexpr, WALK: tl.constexpr, HAS_GATE: tl.constexpr, HAS_PAST: tl.constexpr, HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr, SOFTCAP: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp, F and R of `span` blocks of one head; with WALK, for which these are a segment, its c and M, too."""
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    # Weights as operands: float16 has the mantissa of tf32 and suffices for their range.
    SMALL: tl.constexpr = tl.float16 if PRECISION == "half" else tl.float32
    head, b, h, segment = place(H, segments)
    Q += b * q_strides[0] + h * q_strides[1]
    K += b * k_strides[0] + h // GROUP * k_strides[1]
    F += head * T * WIDTH
    R += head * T * BEFORE
    if HAS_PAST:
        K_PAST += b * k_past_strides[0] + h // GROUP * k_past_strides[1]
    if HAS_MASK:
        MASK += b * mask_strides[0] + h * mask_strides[1]
    if HAS_GATE:
        GATE += b * gate_strides[0] + h * gate_strides[1]
    i = tl.arange(0, BEFORE)
    diagonal = i[:, None] == i[None, :]
    first = segment * span
    steps = 1
    if WALK:
        steps = tl.minimum(span, tl.cdiv(T, BEFORE) - first)
        V += b * v_strides[0] + h // GROUP * v_strides[1]
        M = tl.where(diagonal, 1.0, 0.0)
        u = tl.zeros([BEFORE, BD], Q.dtype.element_ty)
        if HAS_PAST:
            U_PAST += b * u_past_strides[0] + h * u_past_strides[1]
            u = block(U_PAST, P - BEFORE, u_past_strides[2], tl.where(first == 0, P, 0), 0, BEFORE, D, BD)
    for step in range(steps):
        r0 = (first + step) * BEFORE
        rows = r0 + i
        s = tl.zeros([BEFORE, BEFORE], tl.float32)
        sp = tl.zeros([BEFORE, BEFORE], tl.float32)
        for d0 in range(0, D, CHUNK):
            q = block(Q, r0, Q_ROW, T, d0, BEFORE, D, CHUNK)
            k = block(K, r0, K_ROW, T, d0, BEFORE, D, CHUNK)
            before = joined(K, K_PAST, r0 - BEFORE, K_ROW, k_past_strides[2] if HAS_PAST else 0, T, P, d0, BEFORE, D,
                            CHUNK, HAS_PAST)  # fmt: skip
            s = tl.dot(q, tl.trans(k), s, input_precision=DOT)
            sp = tl.dot(q, tl.trans(before), sp, input_precision=DOT)
        seen = attends(rows, rows, T, P, window, STARTS, MASK, mask_strides, True, PACKED, HAS_MASK)
        s = tl.where(seen, capped(s, scale, softcap, SOFTCAP), -float("inf"))
        seen = attends(rows, rows - BEFORE, T, P, window, STARTS, MASK, mask_strides, False, PACKED, HAS_MASK)
        sp = tl.where(seen, capped(sp, scale, softcap, SOFTCAP), -float("inf"))
        top = tl.maximum(tl.max(s, 1), tl.max(sp, 1))
        shift = tl.where(top == -float("inf"), 0.0, top)  # a row that attends nothing
        p = tl.math.exp2(s - shift[:, None])
        pp = tl.math.exp2(sp - shift[:, None])
        total = tl.sum(p, 1) + tl.sum(pp, 1)
        tl.store(LSE + head * T + rows, (shift + tl.math.log2(total)) * LN2, mask=rows < T)
        r = tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
        p *= r
        pp *= r
        if APART:
            known = total * 0.0 == 0.0  # no score of the row is NaN or infinite
            p = tl.where(known[:, None], p, 0.0)
            pp = tl.where(known[:, None], pp, 0.0)
        N = tl.where(diagonal, 0.0, p)
        if HAS_GATE:
            g = gates(GATE, rows, gate_strides[2], T)
            N *= g[None, :]
        p, pp = (p - N).to(SMALL), pp.to(SMALL)
        S = inverse(N, BEFORE, PRECISION)
        solve = tl.where(diagonal, 1.0, S).to(SMALL)
        p = tl.dot(solve, p, input_precision=DOT)
        pp = tl.dot(solve, pp, input_precision=DOT)
        if APART:  # rows without weights, and those that read them
            lost = tl.where((diagonal | (S != 0.0)) & (known[None, :] == 0), 1.0, 0.0)
            p = tl.where((tl.sum(lost, 1)[:, None] > 0.0) & diagonal, float("nan"), p)
        put(F, pp, r0, WIDTH, 0, T, 0, BEFORE, BEFORE, BEFORE)
        put(R, p, r0, BEFORE, 0, T, 0, BEFORE, BEFORE, BEFORE)
        if WIDTH > BEFORE:
            put(F + BEFORE, S, r0, WIDTH, 0, T, 0, BEFORE, BEFORE, BEFORE)
        if WALK:
            v = block(V, r0, V_ROW, T, 0, BEFORE, D, BD)
            a = tl.dot(p.to(v.dtype), v, input_precision=DOT)
            a = tl.dot(pp.to(v.dtype), u, a, input_precision=DOT)
            M = tl.dot(pp.to(SMALL), M.to(SMALL), input_precision=DOT)
            if HAS_GATE:
                a = v + g[:, None] * (a - v)
                M *= g[:, None]
            u = a.to(v.dtype)
    if WALK:
        put(STATE + head * segments * BEFORE * D, u, segment * BEFORE, D, 0, segments * BEFORE, 0, BEFORE, D, BD)
        MAP += head * segments * BEFORE * BEFORE
        put(MAP, M, segment * BEFORE, BEFORE, 0, segments * BEFORE, 0, BEFORE, BEFORE, BEFORE)


@triton.jit
def _finite(x):
    """0 for what is no finite number."""
    return tl.where(x * 0.0 == 0.0, x, 0.0).to(x.dtype)


@triton.jit
def _spread(W, u, AXIS: tl.constexpr):
    """W with NaN for every weight, other than 0, of a token of u, whose numbers lie along AXIS, that is not finite."""
    lost = tl.sum(u.to(tl.float32) * 0.0, AXIS) != 0.0
    return tl.where(lost[None, :] & (W != 0.0), float("nan"), W).to(W.dtype)


@triton.jit
def _read(u, W, a, SPREAD: tl.constexpr, DOT: tl.constexpr):
    """a + u Wᵀ. With SPREAD what is not finite in u reaches those who give it weight and nobody else: 0 · NaN is 0."""
    if SPREAD:
        W = _spread(W, u, 0)
        u = _finite(u)
    return tl.dot(u, tl.trans(W), a, input_precision=DOT)


@triton.jit
def tokens(X, r0, stride, n, d0, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """`block` transposed, [BD, ROWS], and loaded so: to turn it later would take registers."""
    r = tl.arange(0, ROWS)[None, :]
    d = d0 + tl.arange(0, BD)[:, None]
    inside = (r0 + r >= 0) & (r0 + r < n) & (d < D)
    return tl.load(X + (tl.cast(r0, tl.int64) * stride + (r * stride + d)), mask=inside, other=0.0)


@triton.jit
def _walk(u, M, V, GATE, F, R, A, r, rows, T, gate_stride, d0, V_ROW: tl.constexpr, D: tl.constexpr,
          BD: tl.constexpr, BEFORE: tl.constexpr, WIDTH: tl.constexpr, MAPS: tl.constexpr, HAS_GATE: tl.constexpr,
          APART: tl.constexpr, SPREAD: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """The loop of `walk_kernel` over `rows` rows from r on: the state after it, M, and 0 · a of all a together."""
    zero = tl.zeros([BD, BEFORE], tl.float32)
    for step in tl.range(0, tl.cdiv(rows, BEFORE), num_stages=1 if SPREAD else STAGES):
        r0 = r + step * BEFORE
        v = tokens(V, r0, V_ROW, T, d0, BEFORE, D, BD)
        a = _read(v, block(R, r0, BEFORE, T, 0, BEFORE, BEFORE, BEFORE), None, SPREAD, DOT)
        f = block(F, r0, WIDTH, T, 0, BEFORE, BEFORE, BEFORE)
        a = _read(u, f, a, SPREAD, DOT)
        if MAPS:
            m = _read(M, f, None, SPREAD, DOT)
        else:
            put(A, tl.trans(a.to(v.dtype)), r0, D, 0, T, d0, BEFORE, D, BD)
        if APART:
            zero += a * 0.0
        if HAS_GATE:
            g = gates(GATE, r0 + tl.arange(0, BEFORE), gate_stride, T)[None, :]
            a = v + g * (a - v)
            if MAPS:
                m *= g
        u = a.to(v.dtype)
        if MAPS:
            M = m.to(v.dtype)
    return u, M, zero


@triton.jit(do_not_specialize=["gate_strides", "H", "T", "P", "span", "segments"])
def walk_kernel(
    V, GATE, U_PAST, F, R, INTO, A, STATE, MAP,
    v_strides, gate_strides, u_past_strides, H, T, P, span, segments,
    V_ROW: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BEFORE: tl.constexpr,
    WIDTH: tl.constexpr, MAPS: tl.constexpr, WHOLE: tl.constexpr, HAS_GATE: tl.constexpr, HAS_PAST: tl.constexpr,
    APART: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BD columns of the head dimension of one segment of one head, all transposed: what a product leaves in registers
    is then the left operand of the next. MAPS: the segment's c and M; else A, with the state before the segment from
    INTO, or WHOLE: the segment is the sequence.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    head, b, h, segment = place(H, segments)
    slot = (head * segments + segment) * BEFORE  # of the segment's state, in rows
    V += b * v_strides[0] + h // GROUP * v_strides[1]
    F += head * T * WIDTH
    R += head * T * BEFORE
    if HAS_GATE:
        GATE += b * gate_strides[0] + h * gate_strides[1]
    gate_stride = gate_strides[2] if HAS_GATE else 0
    d0 = tl.program_id(1) * BD
    first = segment * span
    u = tl.zeros([BD, BEFORE], V.dtype.element_ty)
    if HAS_PAST:  # before the first segment
        U_PAST += b * u_past_strides[0] + h * u_past_strides[1]
        u = tokens(U_PAST, P - BEFORE, u_past_strides[2], tl.where(first == 0, P, 0), d0, BEFORE, D, BD)
    M = unit(V.dtype.element_ty, BEFORE) if MAPS else u
    if not MAPS and not WHOLE:
        u += tokens(INTO + slot * D, 0, D, BEFORE, d0, BEFORE, D, BD)
    if not MAPS:
        A += head * T * D
    rows = tl.minimum(span * BEFORE, T - first * BEFORE)
    after, maps, zero = _walk(u, M, V, GATE, F, R, A, first * BEFORE, rows, T, gate_stride, d0, V_ROW, D, BD, BEFORE,
                              WIDTH, MAPS, HAS_GATE, APART, False, STAGES, DOT)  # fmt: skip
    if APART and tl.sum(zero) != 0.0:
        after, maps, zero = _walk(u, M, V, GATE, F, R, A, first * BEFORE, rows, T, gate_stride, d0, V_ROW, D, BD,
                                  BEFORE, WIDTH, MAPS, HAS_GATE, APART, True, STAGES, DOT)  # fmt: skip
    if MAPS:
        put(STATE + slot * D, tl.trans(after), 0, D, 0, BEFORE, d0, BEFORE, D, BD)
        put(MAP + slot * BEFORE, tl.trans(maps), 0, BEFORE, 0, BEFORE, 0, BEFORE, BEFORE, BEFORE)


@triton.jit
def unit(dtype, SIZE: tl.constexpr):
    """The unit matrix."""
    i = tl.arange(0, SIZE)
    return tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(dtype)


@triton.jit
def _scan(u, STATE, MAP, INTO, first, last, segments, d, D: tl.constexpr, BEFORE: tl.constexpr, REVERSE: tl.constexpr,
          SPREAD: tl.constexpr, STORE: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """u ← c + M u over segments first … last: u, and 0 · u of all u together. STORE: INTO gets what each meets."""
    i = tl.arange(0, BEFORE)[:, None]
    zero = u.to(tl.float32) * 0.0
    for step in tl.range(first, last, num_stages=1 if SPREAD else 4):
        r = (segments - 1 - step if REVERSE else step) * BEFORE + i
        c = tl.load(STATE + r * D + d, mask=d < D, other=0.0)
        M = tl.load(MAP + r * BEFORE + tl.arange(0, BEFORE)[None, :])
        if STORE:
            tl.store(INTO + r * D + d, u, mask=d < D)
        if SPREAD:
            M = _spread(M, u, 1)
            u = _finite(u)
        u = tl.dot(M, u, c.to(tl.float32), input_precision=DOT).to(u.dtype)
        zero += u.to(tl.float32) * 0.0
    return u, zero


@triton.jit(do_not_specialize=["segments", "span"])
def scan_kernel(
    STATE, MAP, INTO, STATES, MAPS, segments, span,
    D: tl.constexpr, BD: tl.constexpr, BEFORE: tl.constexpr, REVERSE: tl.constexpr, COMPOSE: tl.constexpr,
    GROUPS: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u ← c + M u over the segments of one head, for BD columns of the head dimension. STATE holds every c, INTO gets
    the u that each segment meets. Where there are many, in GROUPS of `span`: first COMPOSE, c and M of each group into
    STATES and MAPS, M as what becomes of the unit matrix beside c; then each group, after a scan over those before it.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    head, group, groups = tl.cast(tl.program_id(0), tl.int64), tl.program_id(2), tl.num_programs(2)
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    i = tl.arange(0, BEFORE)[:, None]
    STATE += head * segments * BEFORE * D
    MAP += head * segments * BEFORE * BEFORE
    first = group * span
    last = tl.minimum(first + span, segments)
    nothing = tl.zeros([BEFORE, BD], STATE.dtype.element_ty)
    if COMPOSE:
        u = tl.where(d - D == i, 1.0, nothing).to(nothing.dtype)
        u, zero = _scan(u, STATE, MAP, STATE, first, last, segments, d, D, BEFORE, False, False, False, DOT)
        at = (head * groups + group) * BEFORE + i
        tl.store(STATES + at * D + d, u, mask=d < D)
        tl.store(MAPS + at * BEFORE + d - D, u, mask=(d >= D) & (d < D + BEFORE))
    else:
        INTO += head * segments * BEFORE * D
        u = nothing
        if GROUPS:
            STATES += head * groups * BEFORE * D
            MAPS += head * groups * BEFORE * BEFORE
            u, zero = _scan(u, STATES, MAPS, INTO, 0, group, groups, d, D, BEFORE, False, False, False, DOT)
        u, zero = _scan(u, STATE, MAP, INTO, first, last, segments, d, D, BEFORE, REVERSE, False, True, DOT)
        if APART and tl.sum(zero) != 0.0:
            u, zero = _scan(nothing, STATE, MAP, INTO, 0, first, segments, d, D, BEFORE, REVERSE, True, False, DOT)
            _scan(u, STATE, MAP, INTO, first, last, segments, d, D, BEFORE, REVERSE, True, True, DOT)
