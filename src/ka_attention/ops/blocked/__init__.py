"""The backend in plain PyTorch, on any device: one sequence after the other, whole or in a band.

Without a window, or with a wide one, `full` solves by recursive forward substitution; a narrow window is a band of W,
for which `band` solves blocks in parallel and scans over them. Where gates of 0 leave nothing to solve any window is
narrow. Both compute half precision in float32.
"""

from itertools import pairwise
from types import ModuleType

from torch import Tensor, cat, contiguous_format, nan, zeros_like

from ka_attention.ops.blocked import band, finite, full
from ka_attention.ops.blocked.full import outputs
from ka_attention.ops.blocked.heads import softmax_alone
from ka_attention.ops.blocked.pages import steps, store

__all__ = ["backward", "forward", "outputs", "paged", "store"]


def forward(q, k, v, gate, k_past, u_past, mask, cu_seqlens, *, scale, window, softcap, save=False):
    _, _, saved = outputs(q, save)
    options = {"scale": scale, "window": window, "softcap": softcap}
    if cu_seqlens is not None:
        parts = [
            forward(q[:, :, s], k[:, :, s], v[:, :, s], _at(gate, s), None, None, None, None, **options)[:2]
            for s in _sequences(cu_seqlens)
        ]
        return *(cat(part, dim=2) for part in zip(*parts, strict=True)), saved
    tensors = [q, k, v, gate, k_past, u_past]
    solve, options["window"] = _way(q, gate, k_past, window)
    a, lse = solve.forward(*tensors, mask, saved, **options)
    if not finite.is_finite(a):
        a, lse = solve.forward(*finite.cleaned(*tensors), mask, saved, **options)
        a.masked_fill_(finite.reached(tensors, mask, window)[..., None], nan)
    return a.to(q.dtype), lse, saved


def backward(da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, saved, *, scale, window, softcap):
    options = {"scale": scale, "window": window, "softcap": softcap}
    if cu_seqlens is not None:
        parts = [
            backward(da[:, :, s], q[:, :, s], k[:, :, s], v[:, :, s], _at(gate, s), None, None, None, None,
                     a[:, :, s], lse[:, :, s], saved[:0], **options)
            for s in _sequences(cu_seqlens)
        ]  # fmt: skip
        return tuple(None if part[0] is None else cat(part, dim=2) for part in zip(*parts, strict=True))
    tensors = [q, k, v, gate, k_past, u_past]
    solve, options["window"] = _way(q, gate, k_past, window)
    grads = solve.backward(da, *tensors, mask, a, lse, saved, **options)
    if not all(finite.is_finite(grad) for grad in grads if grad is not None):
        # The gradient of an output that is not finite counts, unless it is 0.
        da = da.masked_fill(~a.isfinite().all(-1, keepdim=True) & (da != 0), nan)
        *tensors, a = finite.cleaned(*tensors, a)
        grads = solve.backward(da, *tensors, mask, a, lse, saved, **options)
    return grads


def paged(q, k, v, gate, past, cu_seqlens, scale, window, softcap, is_softmax, bounds) -> Tensor:
    """A of packed sequences after pasts in pages, each exact; tokens after the last end give 0."""
    a = zeros_like(q, memory_format=contiguous_format)
    gate = None if gate is None else gate.clamp(*bounds)
    single = (cu_seqlens.diff() == 1).nonzero()[:, 0]
    if len(single):
        at, found = steps(q, k, v, past, cu_seqlens, single, scale, window, softcap)
        a[0, :, at] = found
    options = {"scale": scale, "window": window, "softcap": softcap}
    for s, before in past.after(cu_seqlens, window, q.shape[1], least=2):
        new = q[:, :, s], k[:, :, s], v[:, :, s]
        a[:, :, s] = forward(*new, _at(gate, s), before[0], before[1], None, None, **options)[0]
    return a


def _way(q: Tensor, gate: Tensor | None, k_past: Tensor | None, window: int | None) -> tuple[ModuleType, int | None]:
    """The faster of the two ways, and the window if it hides anything."""
    length = q.shape[2] + (0 if k_past is None else k_past.shape[2])
    if window is None or window >= length:
        return full, None
    return band if window <= band.WIDEST or softmax_alone(gate) else full, window


def _sequences(cu_seqlens: Tensor) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(cu_seqlens.tolist()) if stop > start]


def _at(gate: Tensor | None, s: slice) -> Tensor | None:
    return None if gate is None else gate[:, :, s]
