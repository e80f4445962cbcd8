"""The operator pair `ka_attention::forward` and `ka_attention::backward`, which every backend but the reference serves.

As library operators they are opaque to torch.compile and to autocast: one node in a graph, computed in the dtype given.
They are registered through `torch.library.Library` because `torch.library.custom_op` costs 100 µs a call on top.
"""

from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _load(backend: str) -> ModuleType:
    match backend:
        case "blocked":
            from ka_attention.ops import blocked

            return blocked
        case "triton":
            from ka_attention.ops import triton

            return triton
    raise ValueError(f"no backend {backend!r}")


def _without_autocast(q: Tensor):
    device = q.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _forward(
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
    with _without_autocast(q):
        a, lse = _load(backend).forward(
            q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale=scale, window=window, softcap=softcap
        )
    return a.contiguous(), lse.contiguous()


def _backward(
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
    with _without_autocast(q):
        grads = _load(backend).backward(
            da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, scale=scale, window=window, softcap=softcap
        )
    return [grad.contiguous() for grad in grads if grad is not None]


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            a, lse = forward(*inputs)
        *tensors, ctx.scale, ctx.window, ctx.softcap, ctx.backend = inputs
        ctx.save_for_backward(*tensors, a, lse)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # the gradient of lse would be a tensor of zeros
        return a, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, da, _):
        if da is None:
            return (None,) * 12
        tensors = ctx.saved_tensors
        grads = iter(backward(da, *tensors, ctx.scale, ctx.window, ctx.softcap, ctx.backend))
        return *(None if x is None else next(grads) for x in tensors[:6]), *(None,) * 6


_library = torch.library.Library("ka_attention", "DEF")
_functions: dict[str, Callable] = {"forward": _forward, "backward": _backward}
for _name, _function in _functions.items():
    _schema = torch.library.infer_schema(_function, mutates_args=())
    _library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(_name, _function, "CompositeExplicitAutograd")
_library.impl("forward", _Differentiable.apply, "Autograd")
forward = torch.ops.ka_attention.forward.default
backward = torch.ops.ka_attention.backward.default


@torch.library.register_fake("ka_attention::forward", lib=_library)
def _(q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale, window, softcap, backend):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.register_fake("ka_attention::backward", lib=_library)
def _(da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, scale, window, softcap, backend):
    return [x.new_empty(x.shape) for x in (q, k, v, gate, k_past, u_past) if x is not None]
