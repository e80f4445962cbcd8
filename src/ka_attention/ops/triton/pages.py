"""Packed new tokens, each sequence after its past in pages: decode steps and chunks of prompts in the same kernels.

A past needs no system, its U are known: ordinary attention, here in pieces of `span` tokens side by side where there
are few rows, so that a long past is not read by one program. The new tokens of a sequence are a chain of row blocks, as
in `forward_kernel`, whose first softmax state is that of the past.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ka_attention.ops.inputs import Past
from ka_attention.ops.triton.plan import strides
from ka_attention.ops.triton.primitives import inverse, load_tile, publish, scores, store_tile, wait
from ka_attention.ops.triton.tiles import INTERPRETED, padded


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


@triton.jit(do_not_specialize=["H", "N", "T", "window", "span", "width"])
def chunk_kernel(
    Q, K, V, GATE, K_PAGES, U_PAGES, TABLE, LENGTHS, CU, PART, LSE, FLAGS, A, U,
    q_strides, k_strides, v_strides, gate_strides, kp_strides, up_strides, table_stride,
    scale, softcap, H, N, T, window, span, S, width,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, GROUP: tl.constexpr, U_GROUP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MOST: tl.constexpr, WINDOW: tl.constexpr,
    WHOLE: tl.constexpr, PIECES: tl.constexpr, SOLVE: tl.constexpr, HAS_GATE: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A of one row block, and U for the blocks after it. PIECES: `past_kernel` has read the past. Without SOLVE the
    gate is 0 and blocks do not wait.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "half" else PRECISION
    t = tl.atomic_add(FLAGS, 1) if SOLVE else tl.program_id(0)
    h = t % H
    n, r0, start, rows = _find(t // H, CU, N, BM, MOST)
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
        for piece in range(0, tl.cdiv(length - first, span)):
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
    head = (h * tl.cast(T, tl.int64) + start) * D
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
        store_tile(A + head, acc / tl.where(total == 0.0, 1.0, total)[:, None], r0, D, rows, BM, D, BD)
        return

    flag = FLAGS + 1 + n * H + h
    while j < r0:
        stop = tl.minimum(wait(flag, j // BM + 1) * BM, r0)
        for c in range(j, stop, BN):
            at = c + tl.arange(0, BN)
            k = load_tile(K, c, K_ROW, rows, BN, D, BD, True)
            u = load_tile(U + head, c, D, rows, BN, D, BD, True)
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
    x = acc * (alpha * r)[:, None] + d[:, None] * v
    if HAS_GATE:
        g = tl.load(GATE + h * gate_strides[1] + (start + row) * gate_strides[2], mask=row < rows, other=0.0)
        x = tl.dot((L * (1.0 - g)[None, :]).to(v.dtype), v, x, input_precision=DOT)
        L = L * g[None, :]
    a = tl.dot(inverse(L, BM, PRECISION).to(v.dtype), x.to(v.dtype), x, input_precision=DOT)
    store_tile(A + head, a, r0, D, rows, BM, D, BD)
    if HAS_GATE:
        store_tile(U + head, v + g[:, None] * (a - v), r0, D, rows, BM, D, BD)
    publish(flag, r0 // BM + 1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, past: Past, cu_seqlens: Tensor, scale: float,
    window: int | None, softcap: float | None, is_softmax: bool,
) -> Tensor:  # fmt: skip
    """A [1, Hq, T, D], 0 after the last end. Grids follow from shapes, so that a CUDA graph serves other lengths."""
    k_pages, u_pages, table, lengths = past
    (_, H, T, D), N, (S, width) = q.shape, len(cu_seqlens) - 1, (k_pages.shape[2], table.shape[1])
    a = torch.zeros_like(q, memory_format=torch.contiguous_format)
    interpreted = q.device == INTERPRETED
    BM = 16 if interpreted or T <= 4 * N or q.dtype == torch.float32 else 64
    BN = 16 if interpreted else 32 if q.dtype == torch.float32 or D > 128 else 64
    longest = width * S if window is None else min(width * S, window - 1 + BN)  # from a multiple of BN on
    blocks = T // BM + N
    pieces = _pieces(blocks * H, triton.cdiv(longest, 16 if interpreted else 256), T)
    span = triton.cdiv(triton.cdiv(longest, pieces), BN) * BN
    precision = "half"
    if q.dtype == torch.float32:
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    constants = {
        "Q_ROW": q.stride(2), "GROUP": H // k.shape[1], "U_GROUP": H // u_pages.shape[1], "D": D, "BD": padded(D),
        "BM": BM, "BN": BN, "MOST": 16 if interpreted else 256, "WINDOW": window is not None, "WHOLE": S % BN == 0,
        "SOFTCAP": softcap is not None, "num_warps": 4 if BM * padded(D) > 2048 else 2,
    }  # fmt: skip
    row, page, table_stride = strides(q), (strides(k_pages), strides(u_pages)), strides(table)[0]
    part = lse = u = flags = None
    numbers = window or 0, span, S, max(width, 1)
    with torch.cuda.device_of(q):
        if pieces > 1:
            part, lse = (q.new_empty(pieces, H, T, *size, dtype=torch.float32) for size in ((D,), ()))
            past_kernel[blocks, H, pieces](
                q, k_pages, u_pages, table, lengths, cu_seqlens, part, lse, row, *page, table_stride, scale,
                softcap or 0.0, N, T, *numbers, DOT="ieee" if precision == "half" else precision, **constants,
            )  # fmt: skip
        if not is_softmax:
            u = a if gate is None else torch.empty_like(a)
            flags = torch.zeros(1 + N * H, dtype=torch.int32, device=q.device)
        chunk_kernel[(blocks * H,)](
            q, k, v, gate, k_pages, u_pages, table, lengths, cu_seqlens, part, lse, flags, a, u,
            row, strides(k), strides(v), strides(gate), *page, table_stride, scale, softcap or 0.0, H, N, T, *numbers,
            K_ROW=k.stride(2), V_ROW=v.stride(2), PIECES=pieces > 1, SOLVE=not is_softmax, HAS_GATE=gate is not None,
            PRECISION=precision, **constants,
        )  # fmt: skip
    return a


def _pieces(programs: int, most: int, rows: int) -> int:
    """Into how many pieces the longest past falls: enough programs for a GPU, and little memory between the kernels."""
    return max(1, min(most, 8192 // programs, (1 << 17) // rows))
