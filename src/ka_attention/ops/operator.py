"""The operator pair `ka_attention::forward` and `ka_attention::backward`, which every backend but the reference serves.

As library operators they are opaque to torch.compile and to autocast: one node in a graph, computed in the dtype given.
"""

from types import ModuleType

import torch
from torch import Tensor


def _load(backend: str) -> ModuleType:
    match backend:
        case "blocked":
            from ka_attention.ops import blocked

            return blocked
        case "triton":
            from ka_attention.ops import triton

            return triton
    raise ValueError(f"no backend {backend!r}")


@torch.library.custom_op("ka_attention::forward", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    k_past: Tensor | None,
    u_past: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(A [B, Hq, T, D], log-sum-exp [B, Hq, T]) from a backend; tensors as docs/architecture.md describes them."""
    with torch.autocast(q.device.type, enabled=False):
        a, lse = _load(backend).forward(
            q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale=scale, window=window, softcap=softcap
        )
    return a.contiguous(), lse.contiguous()


@forward.register_fake
def _(q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale, window, softcap, backend):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("ka_attention::backward", mutates_args=())
def backward(
    da: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    k_past: Tensor | None,
    u_past: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    a: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> list[Tensor]:
    """Gradients of those of q, k, v, gate, k_past, u_past that are present, in this order."""
    with torch.autocast(q.device.type, enabled=False):
        grads = _load(backend).backward(
            da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, scale=scale, window=window, softcap=softcap
        )
    return [grad.contiguous() for grad in grads if grad is not None]


@backward.register_fake
def _(da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, scale, window, softcap, backend):
    return [x.new_empty(x.shape) for x in (q, k, v, gate, k_past, u_past) if x is not None]


def _setup(ctx, inputs, output):
    *tensors, ctx.scale, ctx.window, ctx.softcap, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, da, _):
    tensors = ctx.saved_tensors
    grads = iter(backward(da, *tensors, ctx.scale, ctx.window, ctx.softcap, ctx.backend))
    return *(None if x is None else next(grads) for x in tensors[:6]), *(None,) * 6


forward.register_autograd(_differentiate, setup_context=_setup)
