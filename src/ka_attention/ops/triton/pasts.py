"""Pasts in pages: which kernels run. Grids and all else follow from shapes, so that a CUDA graph serves other lengths.

Where many tokens are new, and the window is narrow or there is no past at all, the kernels for packed sequences are
faster than those of `pages.py`. These give the first tokens of each sequence, as many as may see its past; for the rest
those are tokens whose U is known.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ka_attention.ops.inputs import Past, Slots
from ka_attention.ops.triton.pages import chunk_kernel, past_kernel, store_kernel
from ka_attention.ops.triton.plan import strides
from ka_attention.ops.triton.tiles import INTERPRETED, narrow_reach, padded


def attend(
    packed: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, past: Past, cu_seqlens: Tensor,
    scale: float, window: int | None, softcap: float | None, is_softmax: bool, bounds: tuple[float, float],
) -> Tensor:  # fmt: skip
    """A [1, Hq, T, D], of any content after the last end. ``packed`` attends in packed sequences without a past, from
    their ends or, [1, T], the first token of each token's, then into the A it is given.
    """
    T, N, reach = q.shape[2], len(cu_seqlens) - 1, narrow_reach(q, window)
    arguments = q, k, v, gate, past, cu_seqlens, scale, window, softcap, is_softmax, bounds
    few = N if reach is not None else 4 * N  # with N tokens each sequence may be one
    if is_softmax or few >= T:
        return _by_pages(*arguments)
    if past.block_table.shape[1] == 0:
        gate = None if gate is None else gate.float().clamp(*bounds)
        return packed(q, k, v, gate, F.pad(cu_seqlens, (0, 1), value=T))  # padding is one sequence more
    return _by_pages(*arguments) if reach is None else _after_first(packed, reach, *arguments)


def _constants(q: Tensor, k: Tensor, u_pages: Tensor) -> dict[str, Any]:
    """What the kernels share."""
    H, D = q.shape[1], q.shape[3]
    groups = {"GROUP": H // k.shape[1], "U_GROUP": H // u_pages.shape[1]}
    return {"Q_ROW": q.stride(2), "D": D, "BD": padded(D), "MOST": 16 if q.device == INTERPRETED else 256, **groups}


def _by_pages(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, past: Past, cu_seqlens: Tensor, scale: float,
    window: int | None, softcap: float | None, is_softmax: bool, bounds: tuple[float, float],
    first: tuple[int, Tensor, Tensor, Tensor | None, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """All tokens, or, with ``first`` = (count, v2, k2, gate2, starts), of each sequence so many, and U of them into v2
    beside what `_rest` writes.
    """
    k_pages, u_pages, table, lengths = past
    (_, H, T, D), N, (S, width) = q.shape, len(cu_seqlens) - 1, (k_pages.shape[2], table.shape[1])
    interpreted = q.device == INTERPRETED
    BM = 16 if interpreted or T <= 4 * N or q.dtype == torch.float32 else 64 if D <= 128 else 32
    BM, u, *rest = first or (BM, None, None, None, None)
    a = q.new_empty(1, T, H, D).transpose(1, 2)
    BN = 16 if interpreted else 32 if q.dtype == torch.float32 or D > 128 else 64
    if BM == 16 and window is not None:
        BN = min(BN, max(16, triton.next_power_of_2(window)))
    longest = width * S
    if window is not None and longest >= window - 1:  # it may be a ring, whose first step begins before it
        longest = window - 1 + BN
    REST, least = (16, 16) if interpreted else (64, 256)
    blocks = N + triton.cdiv(T, REST) if first else T // BM + N
    pieces = 1 if first else _pieces(blocks * H, triton.cdiv(longest, least), T)
    span = triton.cdiv(triton.cdiv(longest, pieces), BN) * BN
    precision = "half"
    if q.dtype == torch.float32:
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    constants = _constants(q, k, u_pages) | {
        "BM": BM, "BN": BN, "WINDOW": window is not None, "WHOLE": S % BN == 0, "SOFTCAP": softcap is not None,
        "num_warps": 4 if BM * padded(D) > 2048 else 2,
    }  # fmt: skip
    pages, table_stride = (strides(k_pages), strides(u_pages)), strides(table)[0]
    part = lse = flags = None
    numbers = window or 0, span, S, max(width, 1)
    chain = not first and not is_softmax and BM < T
    with torch.cuda.device_of(q):
        if pieces > 1:
            part, lse = (q.new_empty(pieces, H, T, *size, dtype=torch.float32) for size in ((D,), ()))
            past_kernel[blocks, H, pieces](
                q, k_pages, u_pages, table, lengths, cu_seqlens, part, lse, strides(q), *pages, table_stride, scale,
                softcap or 0.0, N, T, *numbers, DOT="ieee" if precision == "half" else precision, **constants,
            )  # fmt: skip
        if chain:
            u = a if gate is None else q.new_empty(1, T, H, D).transpose(1, 2)
            flags = torch.zeros(2 * N * H, dtype=torch.int32, device=q.device)
        chunk_kernel[(blocks * H,)](
            q, k, v, gate, k_pages, u_pages, table, lengths, cu_seqlens, part, lse, flags, a, u, *rest, strides(q),
            strides(k), strides(v), strides(gate), *pages, strides(a), strides(u), table_stride, scale, softcap or 0.0,
            *bounds, H, N, T, *numbers, K_ROW=k.stride(2), V_ROW=v.stride(2), A_ROW=a.stride(2),
            U_ROW=0 if u is None else u.stride(2), REST=REST, STEPS=N.bit_length(), PIECES=pieces > 1,
            SOLVE=not is_softmax, CHAIN=chain, FIRST=first is not None, HAS_GATE=gate is not None, PRECISION=precision,
            **constants,
        )  # fmt: skip
    return a


def _pieces(programs: int, most: int, rows: int) -> int:
    """Into how many pieces the longest past falls: enough programs for a GPU where there are few, some in any case, as
    one past may be longer than all others together, and little memory between the kernels.
    """
    return max(1, min(most, max(512 // programs, min(16, 8192 // programs)), (1 << 17) // max(1, rows)))


def _after_first(
    packed: Callable[..., Tensor], reach: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, past: Past,
    cu_seqlens: Tensor, scale: float, window: int | None, softcap: float | None, is_softmax: bool,
    bounds: tuple[float, float],
) -> Tensor:  # fmt: skip
    """The first ``reach`` tokens of each sequence, which alone see its past, then the rest after them."""
    _, H, T, D = q.shape
    k2 = k if k.shape[1] == H else q.new_empty(1, H, T, D)
    v2, starts = q.new_empty(1, H, T, D), torch.empty(1, T, dtype=torch.int32, device=q.device)
    gate2 = None if gate is None else torch.empty(1, H, T, dtype=torch.float32, device=q.device)
    first = reach, v2, k2, gate2, starts
    a = _by_pages(q, k, v, gate, past, cu_seqlens, scale, window, softcap, is_softmax, bounds, first)
    return packed(q, k2, v2, gate2, starts, a)


def store(
    k: Tensor, v: Tensor, a: Tensor, gate: Tensor | None, past: Past, slots: Slots, is_softmax: bool,
    bounds: tuple[float, float],
) -> None:  # fmt: skip
    """K and U of new tokens into their slots of the pool; V in U's place where the gate is 0."""
    k_pages, u_pages = past[:2]
    T = k.shape[2]
    constants = {name: x for name, x in _constants(a, k, u_pages).items() if name in ("GROUP", "U_GROUP", "D", "BD")}
    with torch.cuda.device_of(a):
        store_kernel[triton.cdiv(T, 16), a.shape[1]](
            k, v, a, gate, slots.place, k_pages, u_pages, *map(strides, (k, v, a, gate, k_pages, u_pages)), *bounds, T,
            slots.stride, slots.nowhere, BM=16, SOLVE=not is_softmax, HAS_GATE=gate is not None, num_warps=1,
            **constants,
        )  # fmt: skip
