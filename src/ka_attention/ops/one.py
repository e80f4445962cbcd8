"""Attention of one new token, which is softmax attention to K and U of the past and its own K and V."""

import torch.nn.functional as F
from torch import Tensor

from ka_attention.ops import reference


def attend_one(
    q: Tensor, k: Tensor, u: Tensor, mask: Tensor | None, scale: float, window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """A of one new token, [B, Hq, 1, D]: softmax attention to k [B, Hkv, S, D] with the query heads' own values
    u [B, Hq, S, D], which are U of the past and, last, V. `mask` is bool, broadcastable to [B, Hq, 1, S].
    """
    if window is not None and window < k.shape[2]:
        k, u = k[:, :, -window:], u[:, :, -window:]
        mask = None if mask is None else mask[..., -window:]
    (B, Hq, _, D), (_, Hkv, S, _) = q.shape, k.shape
    if softcap is not None:
        w = reference.softmax(q, k, mask, scale, softcap)
        return (w @ u.to(w.dtype)).to(q.dtype)
    if Hkv == Hq:
        return F.scaled_dot_product_attention(q, k, u, attn_mask=mask, scale=scale)
    # Key heads become batch entries, so that query heads share a key head through a stride of 0.
    groups = Hq // Hkv
    q, u = q.reshape(B * Hkv, groups, 1, D), u.reshape(B * Hkv, groups, S, D)
    k = k.reshape(B * Hkv, 1, S, D).expand(-1, groups, -1, -1)
    mask = None if mask is None else mask.expand(B, Hq, 1, S).reshape(B * Hkv, groups, 1, S)
    return F.scaled_dot_product_attention(q, k, u, attn_mask=mask, scale=scale).view(B, Hq, 1, D)
