"""Narrow windows, backward: the adjoint of `narrow_forward`, from the last segment to the first.

With z_b what the rows after block b give to dU_b, and E of the forward, whose column tile c belongs to block b − n + c:

    X_b = dA_b + G z_b,     z_{b−n+c} += E_bcᵀ X_b for c < n,     Y_b = (I − G L_bbᵀ)⁻¹ X_b = (I + Sᵀ) X_b

That is an affine map of the n tiles of z that a block finds, walked and scanned as in the forward. `gradients_kernel`
then finds Y complete, and computes all gradients (docs/maths.md, "Adjoint").
"""

# mypy: disable-error-code="assignment, misc"
# (tuples grow while Triton unrolls loops)

import triton
import triton.language as tl

from ka_attention.ops.triton.narrow_forward import (
    BLOCK,
    attends,
    block,
    cached,
    gates,
    put,
    put_tokens,
    tile_of,
    tokens,
)
from ka_attention.ops.triton.primitives import LN2, scores, slope


@triton.jit(do_not_specialize=["gate_strides", "H", "T", "P", "span", "segments"])
def adjoint_walk_kernel(
    DA, GATE, E, INTO, Y, STATE, MAP, DU_PAST,
    da_strides, gate_strides, H, T, P, span, segments,
    D: tl.constexpr, BD: tl.constexpr, BEFORE: tl.constexpr, WIDTH: tl.constexpr, MAPS: tl.constexpr,
    WHOLE: tl.constexpr, HAS_GATE: tl.constexpr, HAS_PAST: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`walk_kernel` backward. MAPS: the map from z after a segment to z of the blocks before it; else Y, and dU of
    cached tokens.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    head = tl.program_id(0) // segments
    segment = tl.program_id(0) % segments
    b = tl.cast(head // H, tl.int64)
    h = head % H
    head = tl.cast(head, tl.int64)
    slot = (head * segments + segment) * BEFORE
    DA += b * da_strides[0] + h * da_strides[1]
    E += head * T * WIDTH
    if HAS_GATE:
        GATE += b * gate_strides[0] + h * gate_strides[1]
    d0 = tl.program_id(1) * BD
    m0 = d0 - tl.cdiv(D, BD) * BD  # column of the map, if not negative
    first = segment * span
    last = tl.minimum(first + span, tl.cdiv(T, BLOCK))
    state = ()  # z of the blocks last − n … last − 1
    for c in tl.static_range(0, BEFORE, BLOCK):
        if MAPS:
            d = tl.arange(0, BD)[:, None]
            state += (tl.where(m0 + d == c + tl.arange(0, BLOCK)[None, :], 1.0, 0.0),)
        elif WHOLE:
            state += (tl.zeros([BD, BLOCK], tl.float32),)
        else:
            state += (tokens(INTO + slot * D, c, D, BEFORE, d0, BLOCK, D, BD).to(tl.float32),)
    for step in tl.range(0, last - first, num_stages=STAGES):
        r0 = (last - 1 - step) * BLOCK
        z: tl.tensor = state[BEFORE // BLOCK - 1]
        if HAS_GATE:
            z *= gates(GATE, r0 + tl.arange(0, BLOCK), gate_strides[2], T)[None, :]
        x = tokens(DA, r0, da_strides[2], T, d0, BLOCK, D, BD) + z
        rounded = x.to(DA.dtype.element_ty)
        if not MAPS:
            y = tl.dot(rounded, tile_of(E, r0, T, BEFORE + BLOCK, WIDTH), x, input_precision=DOT)
            put_tokens(Y + head * T * D, y, r0, D, T, d0, BLOCK, D, BD)
        rest = (tl.dot(rounded, tile_of(E, r0, T, 0, WIDTH), input_precision=DOT),)
        for c in tl.static_range(BLOCK, BEFORE, BLOCK):
            rest += (tl.dot(rounded, tile_of(E, r0, T, c, WIDTH), state[c // BLOCK - 1], input_precision=DOT),)
        state = rest
    for c in tl.static_range(0, BEFORE, BLOCK):
        if MAPS:
            put_tokens(STATE + slot * D, state[c // BLOCK], c, D, BEFORE, d0, BLOCK, D, BD)
            put_tokens(MAP + slot * BEFORE, state[c // BLOCK], c, BEFORE, BEFORE, m0, BLOCK, BEFORE, BD)
        elif HAS_PAST:
            cached_tokens = tl.where(first == 0, P, 0)
            put_tokens(DU_PAST + head * P * D, state[c // BLOCK], P - BEFORE + c, D, cached_tokens, d0, BLOCK, D, BD)


@triton.jit
def _log_sums(LSE, i, n):
    return tl.load(LSE + i, mask=(i >= 0) & (i < n), other=float("inf")) / LN2


@triton.jit
def _rows(q, k, y, u, lse, delta, seen, scale, softcap, SOFTCAP: tl.constexpr, DOT: tl.constexpr):
    """W of rows and columns that see each other, Y Uᵀ − δ, and the slope of the soft cap. lse is ∞ where no row is."""
    s = scores(q, k, scale, softcap, SOFTCAP, DOT)
    p = tl.where(seen, tl.math.exp2(s - lse[:, None]), 0.0)
    return p, tl.dot(y, tl.trans(u), input_precision=DOT) - delta[:, None], slope(s, softcap, SOFTCAP)


@triton.jit(do_not_specialize=["gate_strides", "mask_strides", "H", "T", "P", "window", "span", "groups"])
def gradients_kernel(
    Q, K, V, GATE, K_PAST, U_PAST, MASK, STARTS, A, LSE, Y, DQ, DK, DV, DGATE, DK_PAST,
    q_strides, k_strides, v_strides, gate_strides, k_past_strides, u_past_strides, mask_strides,
    scale, softcap, H, T, P, window, span, groups,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_PAST: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of `span` tiles of one head, each of at least as many rows as the window reaches back.

    A step takes a tile as columns: its own rows and those of the next tile meet its keys. So dQ of the next tile is
    complete then, and the walk goes on one tile beyond the span, which before the first is one of cached tokens.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    head = tl.program_id(0) // groups
    first = tl.program_id(0) % groups * span
    b = tl.cast(head // H, tl.int64)
    h = head % H
    head = tl.cast(head, tl.int64)
    Q += b * q_strides[0] + h * q_strides[1]
    K += b * k_strides[0] + h // GROUP * k_strides[1]
    V += b * v_strides[0] + h // GROUP * v_strides[1]
    A += head * T * D
    Y += head * T * D
    LSE += head * T
    if HAS_GATE:
        GATE += b * gate_strides[0] + h * gate_strides[1]
    if HAS_PAST:
        K_PAST += b * k_past_strides[0] + h // GROUP * k_past_strides[1]
        U_PAST += b * u_past_strides[0] + h * u_past_strides[1]
    if HAS_MASK:
        MASK += b * mask_strides[0] + h * mask_strides[1]
    i = tl.arange(0, ROWS)
    diagonal = i[:, None] == i[None, :]
    last = tl.minimum(first + span, tl.cdiv(T, ROWS))
    y = block(Y, last * ROWS, D, T, 0, ROWS, D, BD)
    delta = tl.sum(y.to(tl.float32) * block(A, last * ROWS, D, T, 0, ROWS, D, BD), 1)
    dq = tl.zeros([ROWS, BD], tl.float32)
    for step in tl.range(0, last - first + 1, num_stages=STAGES):
        r0 = (last - 1 - step) * ROWS
        rows = r0 + i
        k = block(K, r0, K_ROW, T, 0, ROWS, D, BD)
        v = block(V, r0, V_ROW, T, 0, ROWS, D, BD)
        a = block(A, r0, D, T, 0, ROWS, D, BD)
        u = a
        if HAS_GATE:
            g = gates(GATE, rows, gate_strides[2], T)
            u = (v + g[:, None] * (a.to(tl.float32) - v)).to(a.dtype)
        if HAS_PAST:
            k = cached(k, K_PAST, r0, P, k_past_strides[2], 0, ROWS, D, BD)
            u = cached(u, U_PAST, r0, P, u_past_strides[2], 0, ROWS, D, BD)

        # The rows of the next tile.
        q = block(Q, r0 + ROWS, Q_ROW, T, 0, ROWS, D, BD)
        y = block(Y, r0 + ROWS, D, T, 0, ROWS, D, BD)
        seen = attends(rows + ROWS, rows, T, P, window, STARTS, MASK, mask_strides, False, PACKED, HAS_MASK)
        p, dw, slopes = _rows(q, k, y, u, _log_sums(LSE, rows + ROWS, T), delta, seen, scale, softcap, SOFTCAP, DOT)
        ds = tl.where(p == 0.0, 0.0, p * dw * slopes).to(q.dtype)
        dq = tl.dot(ds, k, dq, input_precision=DOT)
        # Of this span's rows only: tile `last` belongs to the next.
        put(DQ + head * T * D, dq * scale, r0 + ROWS, D, 0, tl.minimum(last * ROWS, T), ROWS, D, BD)
        dk = tl.dot(tl.trans(ds), q, input_precision=DOT)
        if HAS_GATE:
            du = tl.dot(tl.trans(p.to(y.dtype)), y, input_precision=DOT)

        # Its own rows. dW is taken from the rounded Y, so δ, its weighted mean, is too.
        q = block(Q, r0, Q_ROW, T, 0, ROWS, D, BD)
        y = block(Y, r0, D, T, 0, ROWS, D, BD)
        delta = tl.sum(y.to(tl.float32) * a, 1)
        own = tl.sum(y.to(tl.float32) * v, 1) - delta
        seen = attends(rows, rows, T, P, window, STARTS, MASK, mask_strides, True, PACKED, HAS_MASK)
        p, dw, slopes = _rows(q, k, y, u, _log_sums(LSE, rows, T), delta, seen, scale, softcap, SOFTCAP, DOT)
        dw = tl.where(diagonal, own[:, None], dw)
        ds = tl.where(p == 0.0, 0.0, p * dw * slopes).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=DOT) * scale
        dq = tl.dot(ds, k, input_precision=DOT)
        put(DK + head * T * D, dk, r0, D, first * ROWS, T, ROWS, D, BD)
        if HAS_PAST:
            put(DK_PAST + head * P * D, dk, P + r0, D, 0, tl.where(r0 < 0, P, 0), ROWS, D, BD)
        dv = tl.sum(tl.where(diagonal, p, 0.0), 1)[:, None] * y
        if HAS_GATE:
            du = tl.dot(tl.trans(tl.where(diagonal, 0.0, p).to(y.dtype)), y, du, input_precision=DOT)
            dv += (1.0 - g)[:, None] * du
            dg = tl.sum(du * (a.to(tl.float32) - v), 1)
            tl.store(DGATE + head * T + rows, dg, mask=(rows >= first * ROWS) & (rows < T))
        put(DV + head * T * D, dv, r0, D, first * ROWS, T, ROWS, D, BD)
