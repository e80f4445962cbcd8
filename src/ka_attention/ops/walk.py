"""Where an output comes from: KA-attention as a random walk that steps back through the tokens until it is absorbed."""

from typing import NamedTuple

import torch
from torch import Tensor

from ka_attention.ops.api import normalise
from ka_attention.ops.reference import weights


class Walk(NamedTuple):
    """What `walk` returns, in float32 or, for float64 queries, float64."""

    matrix: Tensor  # R [B, Hq, T, P + T]: row i says from which tokens' values A_i is made; it sums to 1
    hops: Tensor  # [B, Hq, T]: expected number of steps until absorption
    first: Tensor  # [B, Hq, T]: mass absorbed at the first column, matrix[..., 0]


def walk(
    q: Tensor,
    k: Tensor,
    *,
    gate: float | Tensor = 1.0,
    scale: float | None = None,
    window: int | None = None,
    k_past: Tensor | None = None,
    attn_mask: Tensor | None = None,
    softcap: float | None = None,
) -> Walk:
    """The walk that, at token i, steps to j < i with probability W_ij and is absorbed with probability W_ii.

        R = (I − L G)⁻¹ [W_past, L (I − G) + diag(d)],    A = R [U_past; V],    hops = (I − L G)⁻¹ (W_past 1 + L 1)

    A token j that is stepped on absorbs with probability 1 − g_j before it attends itself; the past absorbs always.
    Builds T × T matrices, and is differentiable. A row that may attend nothing is zero. Arguments and errors are those
    of `ka_attention`, with k_past [B, Hkv, P, D] alone for a past.
    """
    past = None if k_past is None else (k_past, _values_of(q, k_past))
    call = normalise(q, k, k, gate, scale, window, past, attn_mask, None, softcap)
    q, k, _, g, k_past, _, mask, _ = call.tensors
    with torch.autocast(q.device.type, enabled=False):
        w = weights(q, k, k_past, mask, None, **call.options)
        P = w.shape[-1] - q.shape[2]
        L = w[..., P:].tril(-1)
        keep = torch.zeros_like(L[..., :1, :]) if g is None else 1 - g[:, :, None]
        absorbed = torch.cat([w[..., :P], L * keep + w[..., P:].diagonal(dim1=-2, dim2=-1).diag_embed()], dim=-1)
        steps = w[..., :P].sum(-1, keepdim=True) + L.sum(-1, keepdim=True)
        # One system: the diagonal of the left side is read as 1, so −L G stands for I − L G.
        solved = torch.linalg.solve_triangular(
            -L * (1 - keep), torch.cat([absorbed, steps], dim=-1), upper=False, unitriangular=True
        )
    return Walk(solved[..., :-1], solved[..., -1], solved[..., 0])


def _values_of(q: Tensor, k_past: Tensor) -> Tensor:
    """Stands for the past's values, which do not matter here; what `normalise` will refuse is passed on to it."""
    if not all(isinstance(x, Tensor) and x.ndim == 4 for x in (q, k_past)):
        return k_past
    return q.new_empty(*q.shape[:2], k_past.shape[2], q.shape[3])
