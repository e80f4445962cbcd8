"""What the kernels share: where a program works, tiles, scores, the in-block inverse, waiting and publishing.

Shapes in comments: BM rows of a row block, BN columns of a step, BD the head dimension padded to a power of two.
Scores are kept in units of log 2, so that exp2 needs no further factor.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(t, CU, SCHEDULE, B, H, T, wave, PACKED: tl.constexpr):
    """Work item t as (sequence, batch, head, rank, first row, length). `rank` counts the row blocks of a sequence.

    Heads take turns in waves. Within a wave items are in rank-major order, so its heads advance together and rank r − 1
    always precedes r.
    """
    heads = H if PACKED else B * H  # of all batch entries
    turns = tl.num_programs(0) // heads
    first = t // (turns * wave) * wave
    t -= first * turns
    size = tl.minimum(wave, heads - first)
    h = first + t % size
    turn = t // size
    if PACKED:
        sequence = tl.load(SCHEDULE + turn * 2)
        rank = tl.load(SCHEDULE + turn * 2 + 1)
        start = tl.load(CU + sequence)
        return sequence, sequence * 0, h, rank, start, tl.load(CU + sequence + 1) - start
    else:
        return h // H, h // H, h % H, turn, h * 0, T


@triton.jit
def load_tile(X, row, stride, n, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, GUARD: tl.constexpr):
    """Rows row … row + ROWS of X [n, D] as [ROWS, BD]; 0 outside. Without GUARD all rows must lie inside."""
    r = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BD)[None, :]
    x = X + tl.cast(row, tl.int64) * stride + (r * stride + d)
    if not GUARD and D == BD:
        return tl.load(x)
    else:
        inside = row + r < n if D == BD else (d < D) & (row + r < n if GUARD else True)
        return tl.load(x, mask=inside, other=0.0)


@triton.jit
def store_tile(X, x, row, stride, n, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Store x [ROWS, BD] as rows row … of X [n, D], rounded to X's dtype; nothing outside."""
    put(X, x, row, stride, 0, n, 0, ROWS, D, BD)


@triton.jit
def block(X, r0, stride, n, d0, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Rows r0 … and columns d0 … of X [n, D] as [ROWS, BD]; 0 outside, also before the first row."""
    r = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BD)[None, :]
    inside = (r0 + r >= 0) & (r0 + r < n)
    if D % BD != 0:
        inside = inside & (d0 + d < D)
    return tl.load(X + (tl.cast(r0, tl.int64) * stride + d0 + (r * stride + d)), mask=inside, other=0.0)


@triton.jit
def put(X, x, r0, stride, low, n, d0, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Store x [ROWS, BD] as rows r0 … and columns d0 … of X [n, D], rounded to its dtype; nothing below row `low`."""
    r = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BD)[None, :]
    inside = (r0 + r >= low) & (r0 + r < n)
    if D % BD != 0:
        inside = inside & (d0 + d < D)
    tl.store(X + (tl.cast(r0, tl.int64) * stride + d0 + (r * stride + d)), x.to(X.dtype.element_ty), mask=inside)


@triton.jit
def scores(x, y, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """log2(e) · scale · x yᵀ, capped: [rows of x, rows of y]."""
    return capped(tl.dot(x, tl.trans(y), input_precision=PRECISION), scale, softcap, SOFTCAP)


@triton.jit
def capped(s, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log 2 from the products s."""
    if SOFTCAP:
        # tanh(z) = 1 − 2 / (exp(2 z) + 1) stays exact where exp overflows.
        s = softcap * LOG2E * (1.0 - 2.0 / (tl.math.exp2(s * (2.0 * LOG2E * scale / softcap)) + 1.0))
    else:
        s = s * (scale * LOG2E)
    return s


@triton.jit
def slope(s, softcap, SOFTCAP: tl.constexpr):
    """d(capped score)/d(score), from the capped score in units of log 2."""
    if SOFTCAP:
        tanh = s / (softcap * LOG2E)
        return 1.0 - tanh * tanh
    else:
        return 1.0


@triton.jit
def visible(i, j, rows, columns, MASK, mask_strides, P, window, WINDOW: tl.constexpr, HAS_MASK: tl.constexpr):
    """Whether position i < rows may attend position j < columns, apart from causality. i and j broadcast.

    Positions count the P cached tokens; MASK, of this head, has one row a new token and one column a position.
    """
    first = tl.maximum(i - window + 1, 0) if WINDOW else i * 0
    # One comparison a pair: rows outside see nothing, and nothing sees columns outside.
    seen = tl.where(j < columns, j, -1) >= tl.where(i < rows, first, columns)
    if HAS_MASK:
        mask = MASK + (tl.cast(i - P, tl.int64) * mask_strides[2] + tl.cast(j, tl.int64) * mask_strides[3])
        seen = seen & (tl.load(mask, mask=seen, other=0) != 0)
    return seen


@triton.jit
def wait(FLAG, blocks):
    """Spin until at least `blocks` row blocks of this sequence and head are published; how many are.

    This cannot deadlock, on any number of multiprocessors: work is given out by an atomic ticket in dependency order,
    so the program that will publish the block already runs, and it waits itself for earlier tickets only.
    """
    done = tl.atomic_add(FLAG, 0, sem="acquire")
    while done < blocks:
        done = tl.atomic_add(FLAG, 0, sem="acquire")
    return done


@triton.jit
def publish(FLAG, blocks):
    """Make all stores of this program visible, then announce that `blocks` row blocks are finished."""
    tl.debug_barrier()
    tl.atomic_xchg(FLAG, blocks, sem="release")


@triton.jit
def inverse(N, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """S of (I − N)⁻¹ = I + S for strictly triangular N [SIZE, SIZE].

    First for tiles of 16 rows on the diagonal, side by side: (I − N)⁻¹ = (I − M)⁻¹ (I + D), where I + D is the inverse
    of those alone and M = (I + D) (N − diagonal tiles) moves from tile to tile.

    For gates in [0, 1] every entry of N, of its powers and of S is a probability (the walk visits a token at most
    once), so float16, with the mantissa of tf32, cannot overflow: PRECISION "half" computes with float16 operands.
    Matrix units round their sums towards zero. Over these factors that adds up, so "tf32x3" is float32 proper here.
    """
    if SIZE == 16:
        return _geometric(N, 16, PRECISION)
    else:
        OPERAND: tl.constexpr = tl.float16 if PRECISION == "half" else tl.float32
        DOT: tl.constexpr = "tf32" if PRECISION == "tf32" else "ieee"
        TILES: tl.constexpr = SIZE // 16
        t = tl.arange(0, TILES)
        diagonal = t[:, None, None, None] == t[None, None, :, None]
        tiles = tl.reshape(N, [TILES, 16, TILES, 16])
        D = _geometric(tl.sum(tl.where(diagonal, tiles, 0.0), 2), 16, PRECISION).to(OPERAND)
        M = tl.reshape(tl.where(diagonal, 0.0, tiles), [TILES, 16, SIZE])
        M = tl.reshape(tl.dot(D, M.to(OPERAND), M, input_precision=DOT), [SIZE, SIZE])
        M = _geometric(M, TILES, PRECISION)
        D = tl.reshape(tl.where(diagonal, D[:, :, None, :], 0.0), [SIZE, SIZE])
        return tl.dot(M.to(OPERAND), D, M + D, input_precision=DOT)


@triton.jit
def _geometric(N, ORDER: tl.constexpr, PRECISION: tl.constexpr):
    """N + N² + … = (I + N)(I + N²)(I + N⁴)… − I for N whose power ORDER is 0."""
    DOT: tl.constexpr = "tf32" if PRECISION == "tf32" else "ieee"
    S = N
    power = N.to(tl.float16) if PRECISION == "half" else N
    for k in tl.static_range(1, 4):
        if (1 << k) < ORDER:
            square = tl.dot(power, power, input_precision=DOT)
            power = square.to(power.dtype)
            S = tl.dot(S.to(power.dtype), power, S + square, input_precision=DOT)
    return S
