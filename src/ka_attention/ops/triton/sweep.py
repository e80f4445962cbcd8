"""Short windows: a band makes the chain of blocks a linear recurrence, computed by one light sequential pass.

With window ≤ BM + 1 a block reads the block before only, so everything else is fully parallel (docs/maths.md):

    forward     A_b = Y_b + C_b A_{b−1},     C_b = (I + S_b) W_b,b−1 G_{b−1}
    backward    Y_b = Z_b + C_b Y_{b+1},     C_b = (I + S_b) G_b W_b+1,bᵀ,     Z_b = (I + S_b) dA_b

where I + S is the inverse of the block's own triangular system.
"""

import triton
import triton.language as tl

from ka_attention.ops.triton.primitives import LN2, inverse, load_tile, locate, scores, store_tile, visible


@triton.jit(do_not_specialize=["B", "H", "T"])
def sweep_kernel(
    X, CORNER, CU, B, H, T,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """X_b += C_b X_{b∓1} in place, block after block, for BD columns of one head: the columns of X are independent."""
    h = tl.program_id(0) % H
    sequence = tl.program_id(0) // H
    d0 = tl.program_id(1) * BD
    if PACKED:
        start = tl.load(CU + sequence)
        n = tl.load(CU + sequence + 1) - start
        head = tl.cast(h, tl.int64) * T + start
    else:
        n = T
        head = (tl.cast(sequence, tl.int64) * H + h) * T
    blocks = tl.cdiv(n, BM)
    X += head * D + d0
    CORNER += head * BM
    r = tl.arange(0, BM)
    d = tl.arange(0, BD)[None, :]
    tile = r[:, None] * D + d
    inside = d0 + d < D
    b = blocks - 1 if REVERSE else 0
    state = tl.load(X + tl.cast(b * BM, tl.int64) * D + tile, mask=(b * BM + r[:, None] < n) & inside, other=0.0)
    # Loads run stages ahead of the recurrence: no step loads what another stores.
    for step in tl.range(1, blocks, num_stages=4):
        b = blocks - 1 - step if REVERSE else step
        rows = b * BM + r[:, None]
        at = X + tl.cast(b * BM, tl.int64) * D + tile
        c = load_tile(CORNER, b * BM, BM, n, BM, BM, BM, True)
        x = tl.load(at, mask=(rows < n) & inside, other=0.0)
        state = tl.dot(c, state, x.to(tl.float32), input_precision=DOT).to(x.dtype)
        tl.store(at, state, mask=(rows < n) & inside)


@triton.jit(do_not_specialize=["B", "H", "T", "P", "window"])
def corner_kernel(
    DA, Q, K, GATE, MASK, CU, SCHEDULE, LSE, Y, CORNER,
    q_strides, k_strides, gate_strides, mask_strides,
    scale, softcap, B, H, T, P, window,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_MASK: tl.constexpr, PACKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The backward's Z_b, into Y, and C_b of one block."""
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    _, b, h, rank, start, n = locate(tl.program_id(0), CU, SCHEDULE, B, H, T, PACKED)
    r0 = rank * BM
    if PACKED and r0 >= n:
        return
    b = tl.cast(b, tl.int64)
    head = (b * H + h) * T + start
    Q += b * q_strides[0] + h * q_strides[1] + tl.cast(start, tl.int64) * Q_ROW
    K += b * k_strides[0] + h // GROUP * k_strides[1] + tl.cast(start, tl.int64) * K_ROW
    LSE += head
    if HAS_MASK:
        MASK += b * mask_strides[0] + h * mask_strides[1]
    i = tl.arange(0, BM)
    k = load_tile(K, r0, K_ROW, n, BM, D, BD, True)
    own = _transposed_weights(k, Q, LSE, r0, r0, n, Q_ROW, MASK, mask_strides, P, window,
                              scale, softcap, D, BD, BM, HAS_MASK, SOFTCAP, DOT)  # fmt: skip
    own = tl.where(i[:, None] < i[None, :], own, 0.0)
    corner = _transposed_weights(k, Q, LSE, r0, r0 + BM, n, Q_ROW, MASK, mask_strides, P,
                                 window, scale, softcap, D, BD, BM, HAS_MASK, SOFTCAP, DOT)  # fmt: skip
    if HAS_GATE:
        GATE += b * gate_strides[0] + h * gate_strides[1] + tl.cast(start, tl.int64) * gate_strides[2]
        g = tl.load(GATE + tl.cast(r0 + i, tl.int64) * gate_strides[2], mask=r0 + i < n, other=0.0)
        own = own * g[:, None]
        corner = corner * g[:, None]
    da = load_tile(DA + head * D, r0, D, n, BM, D, BD, True)
    S = inverse(own, BM, PRECISION).to(da.dtype)
    store_tile(Y + head * D, tl.dot(S, da, da.to(tl.float32), input_precision=DOT), r0, n, BM, D, BD)
    corner = tl.dot(S, corner.to(da.dtype), corner, input_precision=DOT)
    store_tile(CORNER + head * BM, corner, r0, n, BM, BM, BM)


@triton.jit
def _transposed_weights(k, Q, LSE, j, i, n, Q_ROW: tl.constexpr, MASK, mask_strides, P, window, scale, softcap,
                        D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, HAS_MASK: tl.constexpr,
                        SOFTCAP: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """W_ijᵀ [BM columns j …, BM rows i …]; 0 for rows outside the sequence."""
    rows = i + tl.arange(0, BM)
    columns = j + tl.arange(0, BM)
    q = load_tile(Q, i, Q_ROW, n, BM, D, BD, True)
    lse = tl.load(LSE + rows, mask=rows < n, other=0.0) / LN2
    seen = visible((P + rows)[None, :], (P + columns)[:, None], P + n, P + n, MASK, mask_strides, P, window,
                   True, HAS_MASK)  # fmt: skip
    return tl.where(seen, tl.math.exp2(scores(k, q, scale, softcap, SOFTCAP, DOT) - lse[None, :]), 0.0)


@triton.jit(do_not_specialize=["rows"])
def delta_kernel(Y, A, DELTA, rows, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr):
    """δ_i = Y_i · A_i of contiguous [rows, D] tensors."""
    r0 = tl.program_id(0) * BM
    y = load_tile(Y, r0, D, rows, BM, D, BD, True).to(tl.float32)
    delta = tl.sum(y * load_tile(A, r0, D, rows, BM, D, BD, True), 1)
    r = tl.cast(r0, tl.int64) + tl.arange(0, BM)
    tl.store(DELTA + r, delta, mask=r < rows)
