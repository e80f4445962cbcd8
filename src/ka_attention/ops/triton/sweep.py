"""Windows: a band makes the chain of blocks a linear recurrence, computed by one light sequential pass.

A block whose window ends within K blocks reads those only, so all that remains sequential (docs/maths.md) is

    forward     A_b = X_b + Σ_{d=1…K} C_b,b−d A_{b−d},           C_bc = (I + S_b) W_bc G_c
    backward    Z_b = dA_b + Σ_{d=1…K} C_b+d,bᵀ Z_{b+d},         then Y_b = (I + S_b)ᵀ Z_b

where I + S is the inverse of the block's own triangular system and X_b what the block has without the others. Both
passes read the same tiles C, which the forward kernel forms.
"""

# mypy: disable-error-code="assignment, misc"
# (tuples grow while Triton unrolls loops)

import triton
import triton.language as tl

from ka_attention.ops.triton.primitives import block, put


@triton.jit(do_not_specialize=["B", "H", "T"])
def sweep_kernel(
    X, V, GATE, A, SAVED, CU, Y, U, x_strides, v_strides, gate_strides, B, H, T,
    V_ROW: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, REACH: tl.constexpr,
    PARTS: tl.constexpr, ROW: tl.constexpr, STAGES: tl.constexpr, HAS_GATE: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The recurrence, X becoming Y, for BD columns of one head: the columns are independent. REVERSE: the backward's,
    which leaves Z in Y, and with a gate also U.

    A finished block is pushed into the sums of the REACH blocks that read it, which stay in registers: one product, of
    the tiles of all of them at once (PARTS, a power of two), lies between two blocks.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    h = tl.program_id(0) % H
    sequence = tl.program_id(0) // H
    d0 = tl.program_id(1) * BD
    start = tl.load(CU + sequence) if PACKED else 0
    n = tl.load(CU + sequence + 1) - start if PACKED else T
    if PACKED and n == 0:
        return
    b = tl.cast(0 if PACKED else sequence, tl.int64)
    start = tl.cast(start, tl.int64)
    head = (b * H + h) * T + start
    X += b * x_strides[0] + h * x_strides[1] + start * x_strides[2]
    Y += head * D
    BAND = SAVED + head * ROW + ROW - REACH * BM
    if HAS_GATE and REVERSE:
        V += b * v_strides[0] + h // GROUP * v_strides[1] + start * V_ROW
        GATE += b * gate_strides[0] + h * gate_strides[1] + start * gate_strides[2]
        A += head * D
        U += head * D
    blocks = tl.cdiv(n, BM)
    sums = ()
    for k in tl.static_range(PARTS + 1):
        r0 = (blocks - 1 - k) * BM if REVERSE else k * BM
        sums += (block(X, r0, x_strides[2], n, d0, BM, D, BD).to(tl.float32),)
    # Between the first step and the last ones all that is read lies within the sequence.
    bounds = (0, 1, tl.maximum(blocks - PARTS - 1, 1), blocks)
    for part in tl.static_range(3):
        sums = _steps(sums, bounds[part], bounds[part + 1], X, V, GATE, A, BAND, Y, U, x_strides[2], gate_strides, n,
                      d0, V_ROW, D, BD, BM, REACH, PARTS, ROW, STAGES, HAS_GATE, REVERSE, part != 1 or REACH < PARTS,
                      DOT)  # fmt: skip


@triton.jit
def _steps(sums, first, last, X, V, GATE, A, BAND, Y, U, x_stride, gate_strides, n, d0, V_ROW: tl.constexpr,
           D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, REACH: tl.constexpr, PARTS: tl.constexpr,
           ROW: tl.constexpr, STAGES: tl.constexpr, HAS_GATE: tl.constexpr, REVERSE: tl.constexpr, GUARD: tl.constexpr,
           DOT: tl.constexpr):  # fmt: skip
    """Steps first … last of the recurrence: the sums of the next PARTS + 1 blocks after them."""
    SIGN: tl.constexpr = -1 if REVERSE else 1
    blocks = tl.cdiv(n, BM)
    i = tl.arange(0, BM)
    part = tl.arange(0, PARTS * BM)
    distance = 1 + part // BM
    # Loads run stages ahead of the recurrence: no step loads what another stores.
    for step in tl.range(first, last, num_stages=STAGES):
        r0 = (blocks - 1 - step if REVERSE else step) * BM
        y = sums[0].to(Y.dtype.element_ty)
        put(Y, y, r0, D, 0, n, d0, BM, D, BD)
        at = BAND + tl.cast(r0, tl.int64) * ROW
        if REVERSE:
            at += i[:, None] * ROW + part[None, :]
            inside = (r0 + i < n)[:, None] & (distance <= REACH)[None, :]
        else:
            row = distance * BM + part % BM
            at += (row * ROW + (distance - 1) * BM)[:, None] + i[None, :]
            inside = ((r0 + row < n) & (distance <= REACH))[:, None]
        c = tl.load(at, mask=inside, other=0.0) if GUARD else tl.load(at)
        c = tl.trans(c) if REVERSE else c  # [PARTS BM, BM]
        pushed = _apart(tl.dot(c, y, input_precision=DOT), PARTS, BM, BD)
        rest = ()
        for k in tl.static_range(PARTS):
            rest += (sums[k + 1] + pushed[k],)
        rest += (block(X, r0 + SIGN * (PARTS + 1) * BM, x_stride, n, d0, BM, D, BD).to(tl.float32),)
        sums = rest
        if HAS_GATE and REVERSE:
            g = tl.load(GATE + tl.cast(r0 + i, tl.int64) * gate_strides[2], mask=r0 + i < n, other=0.0)
            v = block(V, r0, V_ROW, n, d0, BM, D, BD)
            a = block(A, r0, D, n, d0, BM, D, BD).to(tl.float32)
            put(U, v + g[:, None] * (a - v), r0, D, 0, n, d0, BM, D, BD)
    return sums


@triton.jit
def _apart(x, PARTS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """The PARTS tiles [BM, BD] of x, which are registers of their own."""
    if PARTS == 1:
        return (x,)
    else:
        x = tl.split(tl.permute(tl.reshape(x, (2, PARTS // 2 * BM, BD)), (1, 2, 0)))
        return _apart(x[0], PARTS // 2, BM, BD) + _apart(x[1], PARTS // 2, BM, BD)
