"""Narrow windows, backward: the adjoint of `narrow_forward`, from the last segment to the first.

With z_b what the rows after block b give to dU_b, and E of the forward, whose column tile c belongs to block b − n + c:

    X_b = dA_b + G z_b,     z_{b−n+c} += E_bcᵀ X_b for c < n,     Y_b = (I − G L_bbᵀ)⁻¹ X_b = (I + Sᵀ) X_b

That is an affine map of the n tiles of z that a block finds, walked and scanned as in the forward. `gradients_kernel`
then computes all gradients (docs/maths.md, "Adjoint"). With n = 1 it finds Y of a segment itself, from z after it;
else it takes tiles of more rows than a block, and Y is there from another walk (SOLVED).
"""

# mypy: disable-error-code="assignment, misc"
# (tuples grow while Triton unrolls loops)

import triton
import triton.language as tl

from ka_attention.ops.triton.narrow_forward import BLOCK, attends, gates, joined, place, tokens, unit
from ka_attention.ops.triton.primitives import LN2, block, inverse, put, scores, slope


@triton.jit(do_not_specialize=["gate_strides", "H", "T", "span", "segments"])
def adjoint_walk_kernel(
    DA, GATE, E, INTO, Y, STATE, MAP,
    da_strides, gate_strides, H, T, span, segments,
    D: tl.constexpr, BD: tl.constexpr, BEFORE: tl.constexpr, WIDTH: tl.constexpr, MAPS: tl.constexpr,
    SOLVED: tl.constexpr, WHOLE: tl.constexpr, HAS_GATE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`walk_kernel` backward. MAPS: the map from z after a segment to z of the blocks before it; else Y. Unless SOLVED
    a segment is meant one block later, for `gradients_kernel` begins with the block after it.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    head, b, h, segment = place(H, segments)
    slot = (head * segments + segment) * BEFORE
    DA += b * da_strides[0] + h * da_strides[1]
    E += head * T * WIDTH
    if HAS_GATE:
        GATE += b * gate_strides[0] + h * gate_strides[1]
    d0 = tl.program_id(1) * BD
    first = segment * span
    last = tl.minimum(first + span, tl.cdiv(T, BLOCK))
    state = ()  # z of the n blocks that the first step finds
    for c in tl.static_range(0, BEFORE, BLOCK):
        z = tl.zeros([BD, BLOCK], tl.float32)
        if not MAPS and not WHOLE:
            z += tokens(INTO + slot * D, c, D, BEFORE, d0, BLOCK, D, BD)
        state += (z,)
    M = unit(tl.float32, BEFORE) if MAPS else ()
    for step in tl.range(0, last - first, num_stages=STAGES):
        r0 = (last - (1 if SOLVED else 0) - step) * BLOCK
        x: tl.tensor = state[BEFORE // BLOCK - 1]
        m = M[BEFORE // BLOCK - 1] if MAPS else x
        if HAS_GATE:
            g = gates(GATE, r0 + tl.arange(0, BLOCK), gate_strides[2], T)[None, :]
            x *= g
            m *= g
        x += tokens(DA, r0, da_strides[2], T, d0, BLOCK, D, BD)
        rounded = x.to(DA.dtype.element_ty)
        if MAPS:
            M = _passed(m.to(DA.dtype.element_ty), M, E, r0, T, BEFORE, WIDTH, DOT)
        else:
            y = tl.dot(rounded, block(E + BEFORE + BLOCK, r0, WIDTH, T, 0, BLOCK, BLOCK, BLOCK), x, input_precision=DOT)
            put(Y + head * T * D, tl.trans(y.to(DA.dtype.element_ty)), r0, D, 0, T, d0, BLOCK, D, BD)
        state = _passed(rounded, state, E, r0, T, BEFORE, WIDTH, DOT)
    if MAPS:
        for c in tl.static_range(0, BEFORE, BLOCK):
            put(STATE + slot * D, tl.trans(state[c // BLOCK]), c, D, 0, BEFORE, d0, BLOCK, D, BD)
            put(MAP + slot * BEFORE, tl.trans(M[c // BLOCK]), c, BEFORE, 0, BEFORE, 0, BLOCK, BEFORE, BEFORE)


@triton.jit
def _passed(x, state, E, r0, n, BEFORE: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr):
    """The n tiles that the block before finds: those of the state but the last, and E x of the block at r0."""
    rest = (tl.dot(x, block(E, r0, WIDTH, n, 0, BLOCK, BLOCK, BLOCK), input_precision=DOT),)
    for c in tl.static_range(BLOCK, BEFORE, BLOCK):
        rest += (
            tl.dot(x, block(E + c, r0, WIDTH, n, 0, BLOCK, BLOCK, BLOCK), state[c // BLOCK - 1], input_precision=DOT),
        )
    return rest


@triton.jit
def _weights(q, k, LSE, i, n, seen, scale, softcap, SOFTCAP: tl.constexpr, DOT: tl.constexpr):
    """W of rows i, 0 where there is no such row, and columns that they see; and the slope of the soft cap."""
    lse = tl.load(LSE + i, mask=(i >= 0) & (i < n), other=float("inf")) / LN2
    s = scores(q, k, scale, softcap, SOFTCAP, DOT)
    return tl.where(seen, tl.math.exp2(s - lse[:, None]), 0.0), slope(s, softcap, SOFTCAP)


@triton.jit(do_not_specialize=["gate_strides", "mask_strides", "H", "T", "P", "window", "span", "segments"])
def gradients_kernel(
    DA, Q, K, V, GATE, K_PAST, U_PAST, MASK, STARTS, A, LSE, Y, INTO, DQ, DK, DV, DGATE, DK_PAST, DU_PAST,
    da_strides, q_strides, k_strides, v_strides, gate_strides, k_past_strides, u_past_strides, mask_strides,
    scale, softcap, H, T, P, window, span, segments,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, SOLVED: tl.constexpr,
    WHOLE: tl.constexpr, HAS_GATE: tl.constexpr, HAS_PAST: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of `span` tiles of one head, each of at least as many rows as the window reaches back.

    A step takes a tile as columns: its own rows and those of the next tile meet its keys. So dQ of the next tile is
    complete then, and the walk goes on one tile beyond the span, which before the first is one of cached tokens.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    head, b, h, segment = place(H, segments)
    first = segment * span
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
    if HAS_MASK:
        MASK += b * mask_strides[0] + h * mask_strides[1]
    i = tl.arange(0, ROWS)
    diagonal = i[:, None] == i[None, :]
    last = tl.minimum(first + span, tl.cdiv(T, ROWS))
    end = tl.minimum(last * ROWS, T)  # of this span's rows
    dq = tl.zeros([ROWS, BD], tl.float32)
    if SOLVED:
        start = last - 1
        Y += head * T * D
        y = block(Y, last * ROWS, D, T, 0, ROWS, D, BD)
        delta = tl.sum(y.to(tl.float32) * block(A, last * ROWS, D, T, 0, ROWS, D, BD), 1)
    else:  # begin one tile later, with rows that read one token each: their Y is z; what else they give, nobody stores
        start = last
        DA += b * da_strides[0] + h * da_strides[1]
        y = tl.zeros([ROWS, BD], Q.dtype.element_ty)
        if not WHOLE:
            y = block(INTO + (head * segments + segment) * ROWS * D, 0, D, ROWS, 0, ROWS, D, BD)
        delta = tl.zeros([ROWS], tl.float32)
    for step in tl.range(0, start - first + 2, num_stages=STAGES):
        r0 = (start - step) * ROWS
        rows = r0 + i
        k = joined(K, K_PAST, r0, K_ROW, k_past_strides[2] if HAS_PAST else 0, T, P, 0, ROWS, D, BD, HAS_PAST)
        v = block(V, r0, V_ROW, T, 0, ROWS, D, BD)
        a = joined(A, U_PAST, r0, D, u_past_strides[2] if HAS_PAST else 0, T, P, 0, ROWS, D, BD, HAS_PAST)
        if not SOLVED:
            own_q = block(Q, r0, Q_ROW, T, 0, ROWS, D, BD)
            da = block(DA, r0, da_strides[2], T, 0, ROWS, D, BD)
        u = a
        if HAS_GATE:
            g = gates(GATE, rows, gate_strides[2], T)
            if HAS_PAST:  # whose U is there
                g = tl.where(rows < 0, 1.0, g)
            u = (v + g[:, None] * (a.to(tl.float32) - v)).to(a.dtype)

        # The rows of the next tile.
        q = block(Q, r0 + ROWS, Q_ROW, T, 0, ROWS, D, BD)
        if SOLVED:
            y = block(Y, r0 + ROWS, D, T, 0, ROWS, D, BD)
        seen = attends(rows + ROWS, rows, T, P, window, STARTS, MASK, mask_strides, False, PACKED, HAS_MASK)
        p, slopes = _weights(q, k, LSE, rows + ROWS, T, seen, scale, softcap, SOFTCAP, DOT)
        if not SOLVED:
            p = tl.where(step == 0, tl.where(diagonal, 1.0, 0.0), p)
        dw = tl.dot(y, tl.trans(u), input_precision=DOT) - delta[:, None]
        ds = tl.where(p == 0.0, 0.0, p * dw * slopes).to(q.dtype)
        dq = tl.dot(ds, k, dq, input_precision=DOT)
        put(DQ + head * T * D, dq * scale, r0 + ROWS, D, 0, end, 0, ROWS, D, BD)
        dk = tl.dot(tl.trans(ds), q, input_precision=DOT)
        du = tl.dot(tl.trans(p.to(y.dtype)), y, input_precision=DOT)

        # Its own rows. dW is taken from the rounded Y, so δ, its weighted mean, is too.
        q = block(Q, r0, Q_ROW, T, 0, ROWS, D, BD) if SOLVED else own_q
        seen = attends(rows, rows, T, P, window, STARTS, MASK, mask_strides, True, PACKED, HAS_MASK)
        p, slopes = _weights(q, k, LSE, rows, T, seen, scale, softcap, SOFTCAP, DOT)
        L = tl.where(diagonal, 0.0, p)
        if SOLVED:
            y = block(Y, r0, D, T, 0, ROWS, D, BD)
        else:
            x = da + (g[:, None] * du if HAS_GATE else du)
            S = tl.trans(inverse(L * g[None, :] if HAS_GATE else L, ROWS, PRECISION).to(q.dtype))
            y = tl.dot(S, x.to(q.dtype), x, input_precision=DOT).to(q.dtype)
        delta = tl.sum(y.to(tl.float32) * a, 1)
        own = tl.sum(y.to(tl.float32) * v, 1)
        dw = tl.where(diagonal, own[:, None], tl.dot(y, tl.trans(u), input_precision=DOT)) - delta[:, None]
        ds = tl.where(p == 0.0, 0.0, p * dw * slopes).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=DOT) * scale
        dq = tl.dot(ds, k, input_precision=DOT)
        put(DK + head * T * D, dk, r0, D, first * ROWS, end, 0, ROWS, D, BD)
        if HAS_PAST:
            cached_tokens = tl.where(r0 < 0, P, 0)
            put(DK_PAST + head * P * D, dk, P + r0, D, 0, cached_tokens, 0, ROWS, D, BD)
            put(DU_PAST + head * P * D, du, P + r0, D, 0, cached_tokens, 0, ROWS, D, BD)
        dv = tl.sum(tl.where(diagonal, p, 0.0), 1)[:, None] * y
        if HAS_GATE:
            du = tl.dot(tl.trans(L.to(y.dtype)), y, du, input_precision=DOT)
            dv += (1.0 - g)[:, None] * du
            dg = tl.sum(du * (a.to(tl.float32) - v), 1)
            tl.store(DGATE + head * T + rows, dg, mask=(rows >= first * ROWS) & (rows < end))
        put(DV + head * T * D, dv, r0, D, first * ROWS, end, 0, ROWS, D, BD)
