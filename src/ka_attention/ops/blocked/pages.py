"""Packed sequences after pasts in pages, in plain PyTorch: those with one new token as one batch."""

import torch
from torch import Tensor

from ka_attention.ops.inputs import Past
from ka_attention.ops.one import attend_one, repeat_heads


def steps(q, k, v, past: Past, ends: Tensor, n: Tensor, scale, window, softcap) -> tuple[Tensor, Tensor]:
    """Where the one new token of each sequence ``n`` [R] is, and its A [Hq, R, D]: a batch, pasts padded in front."""
    new, lengths = ends[n], past.cache_seqlens[n].long()
    longest = int(lengths.max())
    longest = longest if window is None else min(longest, window - 1)
    p = lengths[:, None] + torch.arange(-longest, 0, device=q.device)  # [R, longest]
    is_real, S = p >= 0, past.k_pages.shape[2]
    page = past.block_table[n[:, None], p.clamp(min=0) // S % max(1, past.block_table.shape[1])]
    page = page.where(is_real, 0)
    q, k, v = (x[0, :, new].transpose(0, 1)[:, :, None] for x in (q, k, v))  # [R, H, 1, D]
    before = [x[page, :, p % S].transpose(1, 2) for x in (past.k_pages, past.u_pages)]
    mask = None
    if not is_real.all():
        before = [x.masked_fill(~is_real[:, None, :, None], 0) for x in before]  # a page nobody wrote may hold NaN
        mask = torch.cat([is_real, is_real.new_ones(len(n), 1)], dim=1)[:, None, None]
    k = torch.cat([before[0], k], dim=2)
    u = torch.cat([before[1], repeat_heads(v, before[1])], dim=2)
    return new, attend_one(q, k, repeat_heads(u, q), mask, scale, softcap=softcap)[:, :, 0].transpose(0, 1)


def store(k, v, a, gate, past: Past, page: Tensor, slot: Tensor, is_softmax: bool, bounds) -> None:
    """K and U = V + g (A − V) of new tokens into their places of the pages; V where the gate is 0."""
    u = v if is_softmax else a
    if gate is not None and not is_softmax:
        v = repeat_heads(v, a)
        u = v + gate.clamp(*bounds)[..., None] * (a - v)
    for pages, new in ((past.k_pages, k), (past.u_pages, u)):
        pages[page, :, slot] = new[0].transpose(0, 1).to(pages.dtype)
