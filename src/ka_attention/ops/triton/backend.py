"""The Triton backend: what docs/architecture.md asks of a backend, checked and handed to a plan."""

from typing import Any

import torch
import triton
from torch import Tensor

from ka_attention.ops.triton import pasts
from ka_attention.ops.triton.narrow import Narrow
from ka_attention.ops.triton.tiles import band, choose, narrow_reach, narrow_width
from ka_attention.ops.triton.wide import Wide

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
MAX_PLANS = 1024


def outputs(q: Tensor, save: bool, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what `forward` returns, all contiguous: A [B, Hq, T, D], the log-sum-exp [B, Hq, T] and, with `save`, of
    each block what the backward would have to form again: the rows of S, where I + S = (I − L G)⁻¹, and of the tiles
    that the sweep of a window reads, or, for a narrow window, those of E and S.
    """
    before = narrow_reach(q, window)
    width = (1 + band(q, window)) * choose(q).forward.BM if before is None else narrow_width(before, True)
    return _outputs(q, width if save else 0)


def _outputs(q: Tensor, width: int, a: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, _ = q.shape
    a = torch.empty_like(q, memory_format=torch.contiguous_format) if a is None else a
    return a, q.new_empty(B, H, T, dtype=torch.float32), q.new_empty((B, H, T, width) if width else 0)


def forward(q, k, v, gate, k_past, u_past, mask, cu_seqlens, a=None, *, scale, window, softcap, save):
    """`outputs`, filled, with ``a`` as A for packed sequences given by their tokens' firsts (`Plan.starts`). Same
    input, same bits.
    """
    q, k, v, k_past, u_past = map(_unit_stride, (q, k, v, k_past, u_past))
    plan = _plan(None, q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale, window, softcap, save)
    results = _outputs(q, plan.width if save else 0, a)
    with torch.cuda.device_of(q):
        plan.forward(q, k, v, gate, k_past, u_past, mask, cu_seqlens, *results)
    return results


def backward(da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, saved, *, scale, window, softcap):
    """Gradients of q, k, v, gate, k_past, u_past; None for those that are absent. Same input, same bits."""
    da, q, k, v, k_past, u_past = map(_unit_stride, (da, q, k, v, k_past, u_past))
    plan = _plan(da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale, window, softcap, True)
    a, lse, saved = a.contiguous(), lse.contiguous(), saved.contiguous()
    with torch.cuda.device_of(q):
        return plan.backward(da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, saved)


def open(q, k, v, gate, k_past, u_past, *, scale, window, softcap, save):
    """M and c of a share over ranks (`ka_attention.ops.ranks`), and the rest of `forward` for when u_past, now 0, holds
    what was before. None for windows and lengths that do not come to a stop between kernels.
    """
    q, k, v, k_past = map(_unit_stride, (q, k, v, k_past))
    tensors = q, k, v, gate, k_past, u_past
    plan = _plan(None, *tensors, None, None, scale, window, softcap, save)
    if not isinstance(plan, Narrow) or plan.segments == 1 or plan.T % plan.before:
        return None
    with torch.cuda.device_of(q):
        return plan.open(*tensors, *_outputs(q, plan.width))


def state_gradient(da, q, k, v, gate, k_past, u_past, saved, *, scale, window, softcap) -> Tensor:
    """The gradient of u_past alone, in float32; after `open`."""
    da, q, k, v, k_past = map(_unit_stride, (da, q, k, v, k_past))
    plan = _plan(da, q, k, v, gate, k_past, u_past, None, None, scale, window, softcap, True)
    assert isinstance(plan, Narrow)
    with torch.cuda.device_of(q):
        return plan.state_gradient(da, gate, saved)


def paged(q, k, v, gate, past, cu_seqlens, scale, window, softcap, is_softmax, bounds) -> Tensor:
    """A of packed sequences after pasts in pages. Same input, same bits."""
    _check(q)
    q, k, v, *pages = map(_unit_stride, (q, k, v, past.k_pages, past.u_pages))
    past = past._replace(k_pages=pages[0], u_pages=pages[1])
    options: Any = {"scale": scale, "window": window, "softcap": softcap, "save": False}

    def packed(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, *ends: Tensor) -> Tensor:
        return forward(q, k, v, gate, None, None, None, *ends, **options)[0]

    return pasts.attend(
        packed, q, k, v, gate, past, cu_seqlens.contiguous(), scale, window, softcap, is_softmax, bounds
    )


def store(k, v, a, gate, past, slots, is_softmax, bounds) -> None:
    """K and U of new tokens into their slots of the pages."""
    pasts.store(k, v, a, gate, past, slots, is_softmax, bounds)


_plans: dict[tuple, Narrow | Wide] = {}


def _plan(*arguments) -> Narrow | Wide:
    """The plan for calls whose arguments differ in nothing but the tensors' contents."""
    *tensors, scale, window, softcap, save = arguments
    q = tensors[1]  # all are on its device, of dtypes that follow from its own
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    layout = [None if x is None else (x.shape, x.stride()) for x in tensors]
    key = (q.dtype, q.device, tf32, scale, window, softcap, save, *layout)
    plan = _plans.get(key)
    if plan is None:
        _check(q)
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        plan = Wide(*arguments) if narrow_reach(q, window) is None else Narrow(*arguments)
        _plans[key] = plan
    return plan


def _check(q: Tensor) -> None:
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        raise RuntimeError(f"backend 'triton' needs a CUDA device, got q on {q.device}")
    if q.dtype not in DTYPES:
        raise RuntimeError(f"backend 'triton' takes bfloat16, float16 or float32, got {q.dtype}")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise RuntimeError(f"backend 'triton' takes head dimensions up to {MAX_HEAD_DIM}, got {q.shape[-1]}")


def _unit_stride(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()
