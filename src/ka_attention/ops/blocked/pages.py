"""Packed sequences after pasts in pages, in plain PyTorch: those with one new token as one batch."""

import torch
from torch import Tensor

from ka_attention.ops.inputs import Past, Slots, repeat_heads
from ka_attention.ops.one import attend_one


def steps(q, k, v, past: Past, ends: Tensor, n: Tensor, scale, window, softcap) -> tuple[Tensor, Tensor]:
    """Where the one new token of each sequence ``n`` [R] is, and its A [Hq, R, D]: a batch, pasts padded in front."""
    new, lengths = ends[n], past.cache_seqlens[n].long()
    longest = int(lengths.max())
    longest = longest if window is None else min(longest, window - 1)
    q, k, v = (x[0, :, new].transpose(0, 1)[:, :, None] for x in (q, k, v))  # [R, H, 1, D]
    u, mask = repeat_heads(v, past.u_pages), None
    if longest:
        p = lengths[:, None] + torch.arange(-longest, 1, device=q.device)  # [R, longest + 1], the new token last
        is_past, S = (p >= 0) & (p < lengths[:, None]), past.k_pages.shape[2]
        page = past.block_table[n[:, None], p.clamp(min=0) // S % past.block_table.shape[1]].where(is_past, 0)
        mask = None if (p >= 0).all() else (p >= 0)[:, None, None]
        k, u = (_joined(pages, page, p % S, mask, own) for pages, own in ((past.k_pages, k), (past.u_pages, u)))
    return new, attend_one(q, k, repeat_heads(u, q), mask, scale, softcap=softcap)[:, :, 0].transpose(0, 1)


def _joined(pages: Tensor, page: Tensor, slot: Tensor, mask: Tensor | None, own: Tensor) -> Tensor:
    """What lies in these places [R, L] of the pages, and the new token in the last: [R, H, L, D]."""
    x = pages[page[:, None], torch.arange(pages.shape[1], device=pages.device)[:, None], slot[:, None]]
    if mask is not None:
        x.masked_fill_(~mask[:, 0, :, :, None], 0)  # a page nobody wrote may hold NaN
    x[:, :, -1:] = own
    return x


def store(k, v, a, gate, past: Past, slots: Slots, is_softmax: bool, bounds) -> None:
    """K and U = V + g (A − V) of new tokens into their slots of the pages, if any; V where the gate is 0."""
    place, gate = slots.place, None if is_softmax else gate
    kept = place != slots.nowhere
    if not kept.all():  # of a chunk windows keep little
        place, k, v, a = place[kept], k[:, :, kept], v[:, :, kept], a[:, :, kept]
        gate = None if gate is None else gate[:, :, kept]
    u = v if is_softmax else a
    if gate is not None:
        v = repeat_heads(v, a)
        u = v + gate.clamp(*bounds)[..., None] * (a - v)
    for pages, new in ((past.k_pages, k), (past.u_pages, u)):
        pages[place // slots.stride, :, place % slots.stride] = new[0].transpose(0, 1).to(pages.dtype)
