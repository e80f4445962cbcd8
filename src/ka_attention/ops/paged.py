"""KA-attention of packed sequences, each after a past of its own that lies in pages of a pool. For inference.

Pages hold S tokens each: ``k_pages`` [M, Hkv, S, D] and ``u_pages`` [M, Hq, S, D], or [M, Hkv, S, D] of V where the
gate is 0. Token p of the past of sequence n is number p mod S of page ``block_table[n, (p // S) mod width]``, with a
table [N, width]: under a window it may be a ring of the last window − 1 tokens or more. What is out of sight is not
read.
"""

import math

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ka_attention.ops import dispatch, private
from ka_attention.ops.checks import check_tensor, kind_of
from ka_attention.ops.inputs import Call, Options, Past, Slots

UNBOUNDED = -math.inf, math.inf
_checked = WeakTensorKeyDictionary()  # of each block_table that was right: what it was looked at with, and the lengths


def attend(
    call: Call, gate: float | Tensor, past: tuple[Tensor, Tensor], cu_seqlens: Tensor, block_table: Tensor,
    cache_seqlens: Tensor, backend: str | None,
) -> Tensor:  # fmt: skip
    """`ka_attention` of a checked call with ``gate`` after pasts in pages, which are checked here."""
    q, k, v, gates = call.tensors[:4]
    window, is_softmax = call.options["window"], isinstance(gate, (int, float)) and gate == 0
    (_, H, _, D), heads = q.shape, k.shape[1]
    if not isinstance(past, (tuple, list)) or len(past) != 2:
        raise TypeError("past must be the pair (k_pages, u_pages)")
    k_pages, u_pages = past
    check_tensor("past[0] (k_pages)", k_pages, q, (None, heads, None, D))
    values = heads if is_softmax and isinstance(u_pages, Tensor) and u_pages.shape[1:2] == (heads,) else H
    check_tensor("past[1] (u_pages)", u_pages, q, (k_pages.shape[0], values, k_pages.shape[2], D))
    N = len(cu_seqlens) - 1
    for name, x, shape in (("block_table", block_table, (N, None)), ("cache_seqlens", cache_seqlens, (N,))):
        if not isinstance(x, Tensor) or x.dtype != torch.int32:
            raise TypeError(f"{name} must be an int32 tensor, got {kind_of(x)}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
        if x.ndim != len(shape) or any(want not in (None, size) for size, want in zip(x.shape, shape, strict=True)):
            wanted = "[N, width]" if name == "block_table" else "[N]"
            raise ValueError(f"{name} must be {wanted} with N = {N} as in cu_seqlens, got {list(x.shape)}")
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (*call.tensors.differentiable(), *past)
    ):
        raise RuntimeError("block_table is for inference: no gradient flows through it, call it under torch.no_grad()")
    places = Past(k_pages, u_pages, block_table, cache_seqlens)
    _check_places(places, window)
    if q.numel() == 0:
        return q.clone()
    if backend is None:
        backend = "triton" if q.device.type == "cuda" else "blocked"
    return run(q, k, v, gates, places, cu_seqlens.contiguous(), call.options, is_softmax, backend)


def _check_places(past: Past, window: int | None) -> None:
    """ValueError where a table does not name a page of the pool for every token in sight. It waits for the device, once
    for every table, and does not look under torch.compile and in CUDA graphs.
    """
    k_pages, _, table, lengths = past
    if dispatch.traced(table) or (table.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    seen = private.version(table), private.version(lengths), k_pages.shape, window
    before, with_lengths = _checked.get(table, (None, None))
    if None not in seen[:2] and before == seen and with_lengths is lengths:
        return
    (M, _, S, _), width = k_pages.shape, table.shape[1]
    first = 0 * lengths if window is None else (lengths - window + 1).clamp(min=0)
    if bool((lengths < 0).any()) or bool(((lengths - first) > width * S).any()):
        raise ValueError(
            f"cache_seqlens must be between 0 and the {width * S} tokens that a row of block_table holds (with a "
            f"window, window − 1 of them must fit), got {lengths.tolist()}"
        )
    number = (first // max(S, 1))[:, None] + torch.arange(width, device=table.device)
    page = table.gather(1, number % max(width, 1)) if width else number
    needed = (number * S < lengths[:, None]) & (first < lengths)[:, None]
    if bool((((page < 0) | (page >= M)) & needed).any()):
        raise ValueError(f"block_table must name pages of the pool, 0 to {M - 1}, for all tokens in sight")
    _checked[table] = seen, lengths


def run(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, past: Past, cu_seqlens: Tensor, options: Options,
    is_softmax: bool, backend: str, bounds: tuple[float, float] = UNBOUNDED,
) -> Tensor:  # fmt: skip
    """A [1, Hq, T, D] of checked arguments, with ``gate`` [1, Hq, T] of any float dtype clamped to ``bounds``;
    ``is_softmax``: every gate is 0, whatever it says. Tokens after the last end are padding, whose A is anything.
    """
    call = forward if dispatch.traced(q, k, v, gate) else _forward
    return call(
        q, k, v, gate, *past, cu_seqlens, options["scale"], options["window"], options["softcap"], is_softmax,
        *bounds, backend, dispatch.REVISION,
    )  # fmt: skip


def store(
    k: Tensor, v: Tensor, a: Tensor, gate: Tensor | None, past: Past, slots: Slots, is_softmax: bool, backend: str,
    bounds: tuple[float, float] = UNBOUNDED,
) -> None:  # fmt: skip
    """Write K and U of the new tokens of `run` into their ``slots`` of the pool."""
    dispatch.load(backend).store(k, v, a, gate, past, slots, is_softmax, bounds)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, k_pages: Tensor, u_pages: Tensor, block_table: Tensor,
    cache_seqlens: Tensor, cu_seqlens: Tensor, scale: float, window: int | None, softcap: float | None,
    is_softmax: bool, low: float, high: float, backend: str, revision: str,
) -> Tensor:  # fmt: skip
    past, options = Past(k_pages, u_pages, block_table, cache_seqlens), (scale, window, softcap)
    if is_softmax and backend != "triton":  # which has kernels for it
        gate = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    with dispatch.without_autocast(q, backend):
        return dispatch.load(backend).paged(q, k, v, gate, past, cu_seqlens, *options, is_softmax, (low, high))


forward = torch.library.custom_op("ka_attention::paged", _forward, mutates_args=())


@forward.register_fake
def _(q, *others):
    return torch.empty_like(q, memory_format=torch.contiguous_format)
