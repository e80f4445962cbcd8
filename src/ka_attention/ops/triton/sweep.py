"""Windows: a band makes the chain of blocks a linear recurrence, computed by one light sequential pass.

A block whose window ends within K blocks reads those only, so all that remains sequential (docs/maths.md) is

    forward     A_b = X_b + Σ_{d=1…K} C_bd A_{b−d},     C_bd = (I + S_b) W_b,b−d G_{b−d}
    backward    Y_b = X_b + Σ_{d=1…K} C_bd Y_{b+d},     C_bd = (I + S_b) G_b W_b+d,bᵀ

where I + S is the inverse of the block's own triangular system and X_b what the block has without the others.
"""

# mypy: disable-error-code="assignment, misc"
# (tuples grow while Triton unrolls loops)

import triton
import triton.language as tl

from ka_attention.ops.triton.primitives import block, load_tile, put


@triton.jit(do_not_specialize=["B", "H", "T"])
def sweep_kernel(
    X, BAND, CU, B, H, T,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, REACH: tl.constexpr, STAGES: tl.constexpr,
    PACKED: tl.constexpr, RAGGED: tl.constexpr, REVERSE: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """The recurrence in place, X becoming A or Y, for BD columns of one head: the columns of X are independent.

    A finished block is pushed into the sums of the REACH blocks after it, which stay in registers: one product, of the
    nearest, lies between two blocks.
    """
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
    X += head * D
    BAND += head * REACH * BM
    SIGN: tl.constexpr = -1 if REVERSE else 1
    blocks = tl.cdiv(n, BM)
    first = blocks - 1 if REVERSE else 0
    sums = ()
    for distance in tl.static_range(REACH + 1):
        sums += (block(X, (first + SIGN * distance) * BM, D, n, d0, BM, D, BD).to(tl.float32),)
    # Loads run stages ahead of the recurrence: no step loads what another stores.
    for step in tl.range(0, blocks, num_stages=STAGES):
        b = first + SIGN * step
        y = sums[0].to(X.dtype.element_ty)
        put(X, y, b * BM, D, 0, n, d0, BM, D, BD)
        rest = ()
        for distance in tl.static_range(1, REACH + 1):
            to = b + SIGN * distance
            inside = (to >= 0) & (to < blocks)
            c = load_tile(BAND + (distance - 1) * BM, tl.where(inside, to, b) * BM, REACH * BM, n, BM, BM, BM, RAGGED)
            # A sum apart from the product, which the selection keeps apart: as its accumulator it would move from
            # register to register between products, and the compiler lets each of these finish before the next.
            rest += (sums[distance] + tl.where(inside, tl.dot(c, y, input_precision=DOT), 0.0),)
        rest += (block(X, (b + SIGN * (REACH + 1)) * BM, D, n, d0, BM, D, BD).to(tl.float32),)
        sums = rest
