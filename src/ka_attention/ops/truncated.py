"""KA-attention cut off after n hops of its walk: n calls of PyTorch's own attention, and no triangular system."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ka_attention.ops.api import normalise
from ka_attention.ops.inputs import Tensors, repeat_heads
from ka_attention.ops.reference import visible


def truncated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    hops: int,
    gate: float | Tensor = 1.0,
    scale: float | None = None,
    window: int | None = None,
    past: tuple[Tensor, Tensor] | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """The n-th sweep of the iteration whose limit, reached after at most T sweeps, is `ka_attention`.

        U⁽⁰⁾ = V,    A⁽ⁿ⁾ = W U⁽ⁿ⁻¹⁾ + diag(d) (V − U⁽ⁿ⁻¹⁾),    U⁽ⁿ⁾ = V + g (A⁽ⁿ⁾ − V)

    One hop is softmax attention; n hops follow walks of at most n steps. A hop costs one call of
    `scaled_dot_product_attention`, in linear memory where there is no window, past or attn_mask.

    Args: `hops` is n ≥ 1; the others, the result and the errors are those of `ka_attention`.
    """
    if isinstance(hops, bool) or not isinstance(hops, int) or hops < 1:
        raise ValueError(f"hops must be an int of at least 1, got {hops!r}")
    call = normalise(q, k, v, gate, scale, window, past, attn_mask, None, None)
    if q.numel() == 0:
        return q.clone()
    with torch.autocast(q.device.type, enabled=False):
        scale = call.options["scale"]
        # PyTorch's attention takes no negative scale with a causal mask.
        return _sweep(hops, call.tensors._replace(q=q if scale >= 0 else -q), abs(scale), window)


def _sweep(hops: int, tensors: Tensors, scale: float, window: int | None) -> Tensor:
    q, k, v, g, k_past, u_past, mask, _ = tensors
    T, D = q.shape[2:]
    k, v = repeat_heads(k, q), repeat_heads(v, q)

    # The same call yields d: one more key, in front, scores what a token scores with itself, and its value is 1 in a
    # column of its own, which thus holds p = d / (1 + d). Half precision takes that score in two parts.
    dtype = torch.promote_types(q.dtype, torch.float32)
    own = (q.to(dtype) * k.to(dtype)).sum(-1, keepdim=True)
    high = own.to(q.dtype)
    query = F.pad(torch.cat([q, high, (own - high).to(q.dtype)], dim=-1), (0, 6))
    front = F.one_hot(torch.tensor([D, D + 1], device=q.device), D + 8).to(q.dtype)
    key, value = front.sum(0).expand_as(query[:, :, :1]), front[0].expand_as(query[:, :, :1])
    if k_past is not None and u_past is not None:
        key = torch.cat([key, F.pad(repeat_heads(k_past, q), (0, 8))], dim=2)
        value = torch.cat([value, F.pad(u_past, (0, 8))], dim=2)
    key = torch.cat([key, F.pad(k, (0, 8))], dim=2)
    causal = window is None and k_past is None and mask is None
    if causal:  # a query for the extra key keeps the causal mask of the others in place
        seen, query = None, F.pad(query, (0, 0, 1, 0))
    else:
        seen = visible(T, key.shape[2] - 1, mask, None, window, q.device)
        seen = torch.cat([seen.diagonal(key.shape[2] - 1 - T, -2, -1)[..., None], seen], dim=-1)

    a = u = v
    for _ in range(hops):
        values = torch.cat([value, F.pad(u, (0, 8))], dim=2)
        out = F.scaled_dot_product_attention(query, key, values, seen, is_causal=causal, scale=scale)[:, :, -T:]
        p = out[..., D, None]
        a = (out[..., :D] + p * (v - u)) / (1 - p)
        u = a if g is None else (v + g[..., None] * (a - v)).to(a.dtype)
    return a
