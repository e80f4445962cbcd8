"""The specification of KA-attention: the token loop and the dense triangular solve, in plain differentiable PyTorch.

Arguments are those of a backend (docs/architecture.md). Half precision is computed in float32, all else as it comes.
Both build T × T matrices: they are for tests and for short sequences.
"""

import torch
from torch import Tensor

from ka_attention.ops import private
from ka_attention.ops.inputs import Tensors, repeat_heads


def visible(
    q_len: int, k_len: int, mask: Tensor | None, cu_seqlens: Tensor | None, window: int | None, device: torch.device
) -> Tensor:
    """Which of `k_len` keys the last `q_len` positions may attend: bool, broadcastable to [B, Hq, q_len, k_len]."""
    j = torch.arange(k_len, device=device)
    i = j[k_len - q_len :, None]
    seen = j <= i
    if window is not None:
        seen = seen & (j > i - window)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens[1:], j.to(cu_seqlens.dtype), right=True)
        seen = seen & (sequence == sequence[:, None])
    return seen[None, None] if mask is None else seen & mask


def weights(
    q: Tensor,
    k: Tensor,
    k_past: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale,
    window,
    softcap,
) -> Tensor:
    """The causal softmax W, [B, Hq, T, P + T], float32 or float64. A row that may attend nothing is zero."""
    if k_past is not None:
        k = torch.cat([k_past, k], dim=2)
    seen = visible(q.shape[2], k.shape[2], mask, cu_seqlens, window, q.device)
    return softmax(q, k, seen, scale, softcap)


def softmax(q: Tensor, k: Tensor, seen: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """The softmax of the scores of what is `seen`, [B, Hq, n, S], float32 or better. A row that sees nothing is 0."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = scale * (q.to(dtype) @ repeat_heads(k, q).to(dtype).mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if seen is None:
        return scores.softmax(-1)
    # A finite fill and a second masking keep rows that attend nothing, and their gradients, at zero instead of NaN.
    return scores.masked_fill(~seen, torch.finfo(dtype).min).softmax(-1).masked_fill(~seen, 0)


def dense(q, k, v, gate, k_past, u_past, mask, cu_seqlens, *, scale, window, softcap) -> Tensor:
    """A = (I − L G)⁻¹ (W_past U_past + (L (I − G) + diag(d)) V), by one triangular solve per head.

    Products with a weight of 0 spread what is not finite. So where an input is not, those rows are NaN that are not
    finite in the token loop; who traces the call cannot branch on its numbers and has the products.
    """
    inputs, options = Tensors(q, k, v, gate, k_past, u_past, mask, cu_seqlens), (scale, window, softcap)
    traced = torch.compiler.is_compiling() or private.observed() or q.is_meta
    if traced or all(x is None or x.isfinite().all() for x in inputs.differentiable()):
        return _solve(inputs, options)
    with torch.no_grad():
        loop = token_loop(*inputs, scale=scale, window=window, softcap=softcap)
    floats = {name: x for name, x in inputs._asdict().items() if x is not None and x.is_floating_point()}
    a = _solve(inputs._replace(**{name: x.nan_to_num(0, 0, 0) for name, x in floats.items()}), options)
    return _Spoilt.apply(a, ~loop.isfinite().all(-1, keepdim=True))


def _solve(inputs: Tensors, options) -> Tensor:
    past, L, d, u_past, v, g = _parts(*inputs, *options)
    g = g[:, :, None]
    x = past @ u_past + (L * (1 - g)) @ v + d * v
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    return torch.linalg.solve_triangular(eye - L * g, x, upper=False, unitriangular=True).to(inputs.q.dtype)


def paged(q, k, v, gate, past, cu_seqlens, scale, window, softcap, is_softmax, bounds) -> Tensor:
    """`dense` of each packed sequence after its own past. Tokens after the last end give 0."""
    a = torch.zeros_like(q, memory_format=torch.contiguous_format)
    gate = None if gate is None else gate.clamp(*bounds)
    for s, before in past.after(cu_seqlens, window, q.shape[1]):
        g = None if gate is None else gate[:, :, s]
        tensors = Tensors(q[:, :, s], k[:, :, s], v[:, :, s], g, before[0], before[1], None, None)
        a[:, :, s] = dense(*tensors, scale=scale, window=window, softcap=softcap)
    return a


class _Spoilt(torch.autograd.Function):
    """NaN in some rows; their gradient is NaN too, unless it is 0."""

    @staticmethod
    def forward(ctx, a, rows):
        ctx.save_for_backward(rows)
        return a.masked_fill(rows, torch.nan)

    @staticmethod
    def backward(ctx, da):
        (rows,) = ctx.saved_tensors
        return da.masked_fill(rows & (da != 0), torch.nan), None


def token_loop(q, k, v, gate, k_past, u_past, mask, cu_seqlens, *, scale, window, softcap) -> Tensor:
    """A_i = Σ_{j<i} W_ij U_j + W_ii V_i with U_j = V_j + g_j (A_j − V_j), one token after the other.

    A weight of 0 reads nothing, and a gate of 0 reads no A, finite or not.
    """
    past, L, d, u_past, v, g = _parts(q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale, window, softcap)
    a: list[Tensor] = []
    u: list[Tensor] = []
    for i in range(q.shape[2]):
        row = torch.cat([past[:, :, i], L[:, :, i, :i], d[:, :, i]], dim=-1)[..., None]
        a_i = _product(row, torch.cat([u_past, *u, v[:, :, i, None]], dim=2)).sum(2, keepdim=True)
        a.append(a_i)
        u.append(v[:, :, i, None] + _product(g[:, :, i, None, None], a_i - v[:, :, i, None]))
    return torch.cat(a, dim=2).to(q.dtype)


def _product(weight: Tensor, x: Tensor) -> Tensor:
    return torch.where((weight == 0) & ~x.isfinite(), 0, weight * x)


def _parts(q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale, window, softcap):
    """W as (past, L, d), and u_past, v, gate for every query head in W's dtype."""
    w = weights(q, k, k_past, mask, cu_seqlens, scale=scale, window=window, softcap=softcap)
    past, new = w[..., : w.shape[-1] - q.shape[2]], w[..., w.shape[-1] - q.shape[2] :]
    v = repeat_heads(v, q).to(w.dtype)
    u_past = v[:, :, :0] if u_past is None else u_past.to(w.dtype)
    gate = torch.ones_like(q[..., 0], dtype=w.dtype) if gate is None else gate
    return past, new.tril(-1), new.diagonal(dim1=-2, dim2=-1)[..., None], u_past, v, gate
