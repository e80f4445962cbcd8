"""Narrow windows, forward: a scan over the affine maps of segments (docs/maths.md, "Windows").

A block of 16 rows reads, of all that lies before it, the n blocks before it only, n = 1, 2 or 4:

    A_b = E_b [U_{b−n}; …; U_{b−1}; V_b],     E = (I − N)⁻¹ (W − N),     N = L_bb G: of the block itself

`weights_kernel` forms the rows of E. What is left is to walk: `walk_kernel` first with nothing before a segment, and
with the unit matrix there and V = 0, which gives what the segment makes of any state before it, u ↦ c + M u;
`scan_kernel` goes through the maps of a head; `walk_kernel` again, from the states found, gives A. With n = 1 the first
walk is short, and `weights_kernel` does it as it goes. Columns of the head dimension are independent: programs share
them out. Cached tokens are the blocks before the first, packed sequences are one with a mask. Where a mask keeps tokens
apart (APART) it keeps apart also what is not finite.
"""

# mypy: disable-error-code="assignment, misc"
# (tuples grow while Triton unrolls loops)

import triton
import triton.language as tl

from ka_attention.ops.triton.primitives import LN2, block, capped, inverse, put

BLOCK = tl.constexpr(16)  # rows of a block: the least that a product of matrices takes


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
    Q, K, V, GATE, K_PAST, U_PAST, MASK, STARTS, LSE, E, STATE, MAP,
    q_strides, k_strides, v_strides, gate_strides, k_past_strides, u_past_strides, mask_strides,
    scale, softcap, H, T, P, window, span, segments,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    BEFORE: tl.constexpr, WIDTH: tl.constexpr, WALK: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_PAST: tl.constexpr, HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr, SOFTCAP: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS / 16 blocks of one head, each of which reaches BEFORE = 16 n tokens back: log-sum-exp and E, and where there
    is room beside it S of (I − N)⁻¹ = I + S. With WALK, for n = 1, those of one segment, and its c and M.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    # Weights as operands: float16 has the mantissa of tf32 and suffices for their range.
    SMALL: tl.constexpr = tl.float16 if PRECISION == "half" else tl.float32
    head, b, h, segment = place(H, segments)
    Q += b * q_strides[0] + h * q_strides[1]
    K += b * k_strides[0] + h // GROUP * k_strides[1]
    E += head * T * WIDTH
    if HAS_PAST:
        K_PAST += b * k_past_strides[0] + h // GROUP * k_past_strides[1]
    if HAS_MASK:
        MASK += b * mask_strides[0] + h * mask_strides[1]
    if HAS_GATE:
        GATE += b * gate_strides[0] + h * gate_strides[1]
    i = tl.arange(0, ROWS)
    diagonal = i[:, None] == i[None, :]
    first = segment * span
    steps = 1
    if WALK:
        steps = tl.minimum(span, tl.cdiv(T, BLOCK) - first)
        V += b * v_strides[0] + h // GROUP * v_strides[1]
        M = tl.where(diagonal, 1.0, 0.0)
        u = tl.zeros([BLOCK, BD], Q.dtype.element_ty)
        if HAS_PAST:
            U_PAST += b * u_past_strides[0] + h * u_past_strides[1]
            u = block(U_PAST, P - BLOCK, u_past_strides[2], tl.where(first == 0, P, 0), 0, BLOCK, D, BD)
    for step in range(steps):
        r0 = (first + step) * ROWS
        rows = r0 + i
        s = tl.zeros([ROWS, ROWS], tl.float32)
        sp = tl.zeros([ROWS, BEFORE], tl.float32)
        for d0 in range(0, D, CHUNK):
            q = block(Q, r0, Q_ROW, T, d0, ROWS, D, CHUNK)
            k = block(K, r0, K_ROW, T, d0, ROWS, D, CHUNK)
            before = joined(K, K_PAST, r0 - BEFORE, K_ROW, k_past_strides[2] if HAS_PAST else 0, T, P, d0, BEFORE, D,
                            CHUNK, HAS_PAST)  # fmt: skip
            s = tl.dot(q, tl.trans(k), s, input_precision=DOT)
            sp = tl.dot(q, tl.trans(before), sp, input_precision=DOT)
        seen = attends(rows, rows, T, P, window, STARTS, MASK, mask_strides, True, PACKED, HAS_MASK)
        s = tl.where(seen, capped(s, scale, softcap, SOFTCAP), -float("inf"))
        j = r0 - BEFORE + tl.arange(0, BEFORE)
        seen = attends(rows, j, T, P, window, STARTS, MASK, mask_strides, False, PACKED, HAS_MASK)
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
        N = tl.where((i[:, None] // BLOCK == i[None, :] // BLOCK) & ~diagonal, p, 0.0)
        p -= N
        if HAS_GATE:
            g = gates(GATE, rows, gate_strides[2], T)
            p += N * (1.0 - g)[None, :]
            N *= g[None, :]
        # Of each block, [ROWS / 16, 16, 16]: a warp has one, and waits for no other.
        S = inverse(tl.sum(tl.reshape(N, [ROWS // BLOCK, BLOCK, ROWS // BLOCK, BLOCK]), 2), BLOCK, PRECISION)
        p = _solved(S.to(SMALL), p, ROWS, ROWS, DOT)
        pp = _solved(S.to(SMALL), pp, ROWS, BEFORE, DOT)
        if APART:  # rows without weights, and those that read them
            lost = tl.max(tl.where(tl.reshape(known, [ROWS // BLOCK, 1, BLOCK]), 0.0, tl.abs(S)), 2)
            p = tl.where(((tl.reshape(lost, [ROWS]) > 0.0) | (known == 0))[:, None] & diagonal, float("nan"), p)
        _put_band(E, pp, r0, WIDTH, T, 0, ROWS, BEFORE, BEFORE)
        _put_band(E, p, r0, WIDTH, T, BEFORE, ROWS, ROWS, BEFORE)
        if WIDTH > BEFORE + BLOCK:
            put(E + BEFORE + BLOCK, tl.reshape(S, [ROWS, BLOCK]), r0, WIDTH, 0, T, 0, ROWS, BLOCK, BLOCK)
        if WALK:
            v = block(V, r0, V_ROW, T, 0, BLOCK, D, BD)
            a = tl.dot(p.to(v.dtype), v, input_precision=DOT)
            a = tl.dot(pp.to(v.dtype), u, a, input_precision=DOT)
            M = tl.dot(pp.to(SMALL), M.to(SMALL), input_precision=DOT)
            if HAS_GATE:
                a = v + g[:, None] * (a - v)
                M *= g[:, None]
            u = a.to(v.dtype)
    if WALK:
        put(STATE + head * segments * BLOCK * D, u, segment * BLOCK, D, 0, segments * BLOCK, 0, BLOCK, D, BD)
        MAP += head * segments * BLOCK * BLOCK
        put(MAP, M, segment * BLOCK, BLOCK, 0, segments * BLOCK, 0, BLOCK, BLOCK, BLOCK)


@triton.jit
def _solved(S, W, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr):
    """(I + S) W of each block."""
    W = tl.reshape(W, [ROWS // BLOCK, BLOCK, COLUMNS])
    return tl.reshape(tl.dot(S, W.to(S.dtype), W, input_precision=DOT), [ROWS, COLUMNS])


@triton.jit
def _put_band(E, W, r0, stride, n, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BEFORE: tl.constexpr):
    """W [ROWS, COLUMNS] of rows from r0 on and columns from `column` on: their part of the band, where E has it."""
    i = tl.arange(0, ROWS)[:, None]
    c = column - i // BLOCK * BLOCK + tl.arange(0, COLUMNS)[None, :]
    inside = (r0 + i < n) & (c >= 0) & (c < BEFORE + BLOCK)
    tl.store(E + (tl.cast(r0, tl.int64) * stride + (i * stride + c)), W.to(E.dtype.element_ty), mask=inside)


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
def _state(X, r0, stride, n, d0, BEFORE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """BEFORE rows of X from r0 on as the tiles of a state."""
    tiles = ()
    for c in tl.static_range(0, BEFORE, BLOCK):
        tiles += (tokens(X, r0 + c, stride, n, d0, BLOCK, D, BD),)
    return tiles


@triton.jit
def unit(dtype, BEFORE: tl.constexpr):
    """The tiles of the unit matrix, transposed [BEFORE, 16] each, of a dtype."""
    tiles = ()
    for c in tl.static_range(0, BEFORE, BLOCK):
        at = tl.arange(0, BEFORE)[:, None] == c + tl.arange(0, BLOCK)[None, :]
        tiles += (tl.where(at, 1.0, 0.0).to(dtype),)
    return tiles


@triton.jit
def _put_others(A, a, r0, stride, n, STARTS, d0, D: tl.constexpr, BD: tl.constexpr):
    """`put` BLOCK rows of A, but for tokens that are the first of all that they see."""
    r = r0 + tl.arange(0, BLOCK)
    d = d0 + tl.arange(0, BD)[None, :]
    inside = (r < n) & (tl.load(STARTS + r, mask=r < n, other=0) != r)
    tl.store(A + (r.to(tl.int64)[:, None] * stride + d), a, mask=inside[:, None] & (d < D))


@triton.jit
def _walk(state, M, V, GATE, E, A, STARTS, r, rows, T, gate_stride, d0, V_ROW: tl.constexpr, A_ROW: tl.constexpr,
          D: tl.constexpr, BD: tl.constexpr, BEFORE: tl.constexpr, WIDTH: tl.constexpr, MAPS: tl.constexpr,
          HAS_GATE: tl.constexpr, APART: tl.constexpr, SPREAD: tl.constexpr, STAGES: tl.constexpr,
          DOT: tl.constexpr):  # fmt: skip
    """The loop of `walk_kernel` over `rows` rows from r on: the state after it, M, and 0 · a of all a together."""
    zero = tl.zeros([BD, BLOCK], tl.float32)
    # n blocks a step, so that every tile of the state is new: Triton does not pipeline a loop that hands one on.
    ROWS: tl.constexpr = BLOCK if SPREAD else BEFORE
    for step in tl.range(0, tl.cdiv(rows, ROWS), num_stages=1 if SPREAD else STAGES):
        for n in tl.static_range(0, ROWS, BLOCK):
            r0 = r + step * ROWS + n
            v = tokens(V, r0, V_ROW, T, d0, BLOCK, D, BD)
            a = _read(v, block(E + BEFORE, r0, WIDTH, T, 0, BLOCK, BLOCK, BLOCK), None, SPREAD, DOT)
            m = tl.zeros([BEFORE, BLOCK], tl.float32)
            for c in tl.static_range(0, BEFORE, BLOCK):
                e = block(E + c, r0, WIDTH, T, 0, BLOCK, BLOCK, BLOCK)
                a = _read(state[c // BLOCK], e, a, SPREAD, DOT)
                if MAPS:
                    m = _read(M[c // BLOCK], e, m, SPREAD, DOT)
            if not MAPS:
                if STARTS is None:
                    put(A, tl.trans(a.to(v.dtype)), r0, A_ROW, 0, T, d0, BLOCK, D, BD)
                else:
                    _put_others(A, tl.trans(a.to(v.dtype)), r0, A_ROW, T, STARTS, d0, D, BD)
            if APART:
                zero += a * 0.0
            if HAS_GATE:
                g = gates(GATE, r0 + tl.arange(0, BLOCK), gate_stride, T)[None, :]
                a = v + g * (a - v)
                m *= g
            state = state[1:] + (a.to(v.dtype),)  # noqa: RUF005 (Triton takes no stars)
            if MAPS:
                M = M[1:] + (m.to(v.dtype),)  # noqa: RUF005
    return state, M, zero


@triton.jit(do_not_specialize=["gate_strides", "H", "T", "P", "span", "segments"])
def walk_kernel(
    V, GATE, U_PAST, E, INTO, A, STARTS, STATE, MAP,
    v_strides, gate_strides, u_past_strides, H, T, P, span, segments,
    V_ROW: tl.constexpr, A_ROW: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BEFORE: tl.constexpr, WIDTH: tl.constexpr, MAPS: tl.constexpr, WHOLE: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_PAST: tl.constexpr, APART: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BD columns of the head dimension of one segment of one head, all transposed: what a product leaves in registers
    is then the left operand of the next. MAPS: the segment's c and M; else A, with the state before the segment from
    INTO, or WHOLE: the segment is the sequence. With STARTS tokens that are the first they see have A already.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    head, b, h, segment = place(H, segments)
    slot = (head * segments + segment) * BEFORE  # of the segment's state, in rows
    V += b * v_strides[0] + h // GROUP * v_strides[1]
    E += head * T * WIDTH
    if HAS_GATE:
        GATE += b * gate_strides[0] + h * gate_strides[1]
    gate_stride = gate_strides[2] if HAS_GATE else 0
    d0 = tl.program_id(1) * BD
    first = segment * span
    if HAS_PAST:  # before the first segment
        U_PAST += b * u_past_strides[0] + h * u_past_strides[1]
        start = _state(U_PAST, P - BEFORE, u_past_strides[2], tl.where(first == 0, P, 0), d0, BEFORE, D, BD)
    else:
        start = _state(V, 0, V_ROW, 0, d0, BEFORE, D, BD)  # nothing
    M = unit(V.dtype.element_ty, BEFORE) if MAPS else ()
    if not MAPS and not WHOLE:
        into = _state(INTO + slot * D, 0, D, BEFORE, d0, BEFORE, D, BD)
        for c in tl.static_range(BEFORE // BLOCK):
            start = start[1:] + (start[0] + into[c],)  # noqa: RUF005
    if not MAPS:
        A += head * (T if STARTS is None else 1) * D
    rows = tl.minimum(span * BLOCK, T - first * BLOCK)
    after, maps, zero = _walk(start, M, V, GATE, E, A, STARTS, first * BLOCK, rows, T, gate_stride, d0, V_ROW, A_ROW,
                              D, BD, BEFORE, WIDTH, MAPS, HAS_GATE, APART, False, STAGES, DOT)  # fmt: skip
    if APART and tl.sum(zero) != 0.0:
        after, maps, zero = _walk(start, M, V, GATE, E, A, STARTS, first * BLOCK, rows, T, gate_stride, d0, V_ROW,
                                  A_ROW, D, BD, BEFORE, WIDTH, MAPS, HAS_GATE, APART, True, STAGES, DOT)  # fmt: skip
    if MAPS:
        for c in tl.static_range(0, BEFORE, BLOCK):
            put(STATE + slot * D, tl.trans(after[c // BLOCK]), c, D, 0, BEFORE, d0, BLOCK, D, BD)
            put(MAP + slot * BEFORE, tl.trans(maps[c // BLOCK]), c, BEFORE, 0, BEFORE, 0, BLOCK, BEFORE, BEFORE)


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
