"""Blocked forward substitution and its adjoint in plain PyTorch: any device, O(T · block) memory.

For a block b of rows, c being the columns before it (docs/maths.md):

    forward     X = W_c U_c + (L_b (I − G) + diag(d)) V_b          (I − L_b G) A_b = X
    backward    Y_b = dA_b + G (dU_b + L_bᵀ Y_b)                    dU_c += W_cᵀ Y_b       dS = W ∘ (Y Uᵀ − Y·A)

A block holds its rows of W whole, so the softmax is one call, in either direction, and nothing is rescaled later.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 128  # rows of a block, the size of its triangular system; half of it where there are few tokens
LEAF = 16  # rows of the systems inverted on its diagonal
SCORES = 1 << 20  # scores held at once, few enough for a processor's cache


def forward(q, k, v, gate, k_past, u_past, mask, cu_seqlens, *, scale, window, softcap):
    if cu_seqlens is not None:
        options = {"scale": scale, "window": window, "softcap": softcap}
        parts = [
            forward(q[:, :, s], k[:, :, s], v[:, :, s], _at(gate, s), None, None, None, None, **options)
            for s in _sequences(cu_seqlens)
        ]
        return tuple(torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    blocks = _Blocks(q, k, k_past, mask, scale, window, softcap)
    P, v, g = blocks.P, blocks.flat(v), None if gate is None else gate.flatten(0, 1)[..., None]
    u = torch.empty_like(blocks.k)
    if u_past is not None:
        u[:, :P] = u_past.flatten(0, 1)
    a = u[:, P:] if g is None else torch.empty_like(v)
    lse = v.new_empty(v.shape[:2])
    for n, b, c, w, d, lse_b, _ in blocks.in_order():
        L, v_b = w[:, :, c.stop - c.start :], v[n, b]
        x = torch.bmm(w[:, :, : c.stop - c.start], u[n, c]).addcmul_(d, v_b)
        if g is None:
            a[n, b] = _solve(L, x)
        else:
            x.baddbmm_(L, v_b - g[n, b] * v_b)
            a[n, b] = a_b = _solve(L * g[n, b].mT, x)
            torch.add(v_b, g[n, b] * (a_b - v_b), out=u[n, c.stop : P + b.stop])
        lse[n, b] = lse_b
    return a.reshape(q.shape).to(q.dtype), lse.view(q.shape[:3])


def backward(da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, *, scale, window, softcap):
    if cu_seqlens is not None:
        options = {"scale": scale, "window": window, "softcap": softcap}
        parts = [
            backward(da[:, :, s], q[:, :, s], k[:, :, s], v[:, :, s], _at(gate, s), None, None, None, None,
                     a[:, :, s], lse[:, :, s], **options)
            for s in _sequences(cu_seqlens)
        ]  # fmt: skip
        return tuple(None if part[0] is None else torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    blocks = _Blocks(q, k, k_past, mask, scale, window, softcap)
    P, da, a, v_ = blocks.P, blocks.flat(da), blocks.flat(a), blocks.flat(v)
    g = None if gate is None else gate.flatten(0, 1)[..., None]
    u = a if g is None else v_ + g * (a - v_)
    if u_past is not None:
        u = torch.cat([blocks.flat(u_past), u], dim=1)
    dq, dk, du = torch.empty_like(v_), torch.zeros_like(blocks.k), torch.zeros_like(blocks.k)
    dgate = v_.new_empty(v_.shape[:2])
    for n, b, c, w, d, _, slope in blocks.in_order(backwards=True):
        seen = slice(c.start, P + b.stop)
        v_b, a_b, du_b, L = v_[n, b], a[n, b], du[n, c.stop : seen.stop], w[:, :, c.stop - c.start :]
        if g is None:
            y = _solve(L.mT, da[n, b] + du_b, upper=True)
        else:
            y = _solve(g[n, b] * L.mT, da[n, b] + g[n, b] * du_b, upper=True)
        du[n, seen] += w.mT @ y
        delta = (y * a_b).sum(-1, keepdim=True)
        ds = torch.bmm(y, u[n, seen].mT, out=blocks.buffer(1, w.shape)).sub_(delta).mul_(w)
        ds_ii = d * ((y * v_b).sum(-1, keepdim=True) - delta)
        ds[:, :, c.stop - c.start :].diagonal(dim1=1, dim2=2).copy_(ds_ii[..., 0])
        if slope is not None:
            ds *= slope
        torch.mul(ds @ blocks.k[n, seen], scale, out=dq[n, b])
        dk[n, seen].add_(ds.mT @ blocks.q[n, b], alpha=scale)
        # Nobody reads this block's dU again: its place becomes dV.
        if g is None:
            torch.mul(d, y, out=du_b)
        else:
            dgate[n, b] = (du_b * (a_b - v_b)).sum(-1)
            du_b.mul_(1 - g[n, b]).addcmul_(d, y)
    past = (None, None) if k_past is None else (_sum_heads(dk[:, :P], k_past), _sum_heads(du[:, :P], u_past))
    present = None if gate is None else dgate.view(gate.shape)
    return _sum_heads(dq, q), _sum_heads(dk[:, P:], k), _sum_heads(du[:, P:], v), present, *past


class _Block(NamedTuple):
    n: slice  # heads, of all B · Hq
    b: slice  # rows, of T
    c: slice  # columns before the rows, of P + T
    w: Tensor  # [n, rows, c and rows] W with its diagonal set to zero
    d: Tensor  # [n, rows, 1] the diagonal
    lse: Tensor  # [n, rows]
    slope: Tensor | None  # [n, rows, c and rows] derivative of the soft cap


class _Blocks:
    """The blocks of W. Heads are flattened: [B · Hq, T, D]."""

    def __init__(self, q, k, k_past, mask, scale, window, softcap):
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.B, self.H, self.T, _ = q.shape
        self.P = 0 if k_past is None else k_past.shape[2]
        self.q, self.scale = self.flat(q), scale
        self.k = self.flat(k if k_past is None else torch.cat([k_past, k], dim=2))
        self.mask, self.window, self.softcap = mask, window, softcap
        self.rows = min(self.T, ROWS if self.T > 2 * ROWS else ROWS // 2)
        size = self.rows * min(self.P + self.T, self.P + self.T if window is None else self.rows + window - 1)
        self.heads = max(1, min(len(self.q), SCORES // size))
        self.buffers = q.new_empty(2, self.heads * size, dtype=self.dtype)
        self.ahead = torch.full((self.rows, self.rows), -torch.inf, dtype=self.dtype, device=q.device).triu(1)

    def flat(self, x: Tensor) -> Tensor:
        """[B, H, L, D] as [B · Hq, L, D] in the dtype of the computation."""
        x = x.to(self.dtype)
        return x[:, :, None].expand(-1, -1, self.H // x.shape[1], -1, -1).reshape(self.B * self.H, *x.shape[2:])

    def buffer(self, which: int, shape: torch.Size) -> Tensor:
        return self.buffers[which, : shape.numel()].view(shape)

    def in_order(self, backwards: bool = False) -> Iterator[_Block]:
        starts = range(0, self.T, self.rows)
        for n in range(0, len(self.q), self.heads):
            for start in reversed(starts) if backwards else starts:
                yield self._block(n, start)

    def _block(self, n0: int, r0: int) -> _Block:
        n, b = slice(n0, min(n0 + self.heads, len(self.q))), slice(r0, min(r0 + self.rows, self.T))
        first = self.P + r0
        c = slice(0 if self.window is None else max(0, first - self.window + 1), first)
        seen = slice(c.start, self.P + b.stop)
        q, k = self.q[n, b], self.k[n, seen]
        s = self.buffer(0, torch.Size((len(q), q.shape[1], k.shape[1])))
        torch.baddbmm(s, q, k.mT, beta=0, alpha=self.scale, out=s)
        slope = None
        if self.softcap is not None:
            s.div_(self.softcap).tanh_()
            slope = 1 - s * s
            s *= self.softcap
        s[:, :, first - c.start :] += self.ahead[: q.shape[1], : q.shape[1]]
        shown = self._shown(n, b, seen)
        if shown is not None:
            s.masked_fill_(~shown, torch.finfo(s.dtype).min)
        top = s.amax(-1)
        w = torch.softmax(s, -1, out=s)
        lse = top - w.amax(-1).log()
        if shown is not None:
            idle = top == torch.finfo(s.dtype).min
            w.masked_fill_(idle[..., None], 0)
            lse.masked_fill_(idle, -torch.inf)
        diagonal = w[:, :, first - c.start :].diagonal(dim1=1, dim2=2)
        d = diagonal.clone()[..., None]
        diagonal.zero_()
        return _Block(n, b, c, w, d, lse, slope)

    def _shown(self, n: slice, b: slice, seen: slice) -> Tensor | None:
        """What the window and the mask leave of a block: bool [n or 1, rows or 1, columns], or None for all of it."""
        shown = None
        if self.window is not None and self.window < self.P + b.stop:
            device = self.q.device
            i = torch.arange(self.P + b.start, self.P + b.stop, device=device)
            shown = (torch.arange(seen.start, seen.stop, device=device) > i[:, None] - self.window)[None]
        if self.mask is not None:
            mask = self.mask if self.mask.shape[2] == 1 else self.mask[:, :, b]
            mask = mask if self.mask.shape[3] == 1 else mask[..., seen]
            head = torch.arange(n.start, n.stop, device=mask.device)
            mask = mask.expand(self.B, self.H, -1, -1)[head // self.H, head % self.H]
            shown = mask if shown is None else shown & mask
        return shown


def _solve(N: Tensor, x: Tensor, upper: bool = False) -> Tensor:
    """(I − N)⁻¹ X for a strictly lower (or upper) N, by substitution of leaves. Changes x."""
    rows = x.shape[1]
    if rows % LEAF:
        pad = LEAF - rows % LEAF
        return _solve(F.pad(N, (0, pad, 0, pad)), F.pad(x, (0, 0, 0, pad)), upper)[:, :rows]
    leaves = [slice(i, i + LEAF) for i in range(0, rows, LEAF)]
    power = torch.stack([N[:, leaf, leaf] for leaf in leaves]).flatten(0, 1)
    inverse = power.clone()
    inverse.diagonal(dim1=1, dim2=2).add_(1)
    for _ in range(LEAF.bit_length() - 2):  # N is nilpotent: (I − N)⁻¹ = (I + N)(I + N²)(I + N⁴)…
        power = power @ power
        inverse = torch.baddbmm(inverse, inverse, power)
    inverse = inverse.unflatten(0, (len(leaves), -1))
    for i in reversed(range(len(leaves))) if upper else range(len(leaves)):
        leaf, solved = leaves[i], slice((i + 1) * LEAF, rows) if upper else slice(0, i * LEAF)
        x[:, leaf] = inverse[i] @ (x[:, leaf] + N[:, leaf, solved] @ x[:, solved])
    return x


def _sum_heads(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x [B, H, L, D] from that of its copies for query heads, [B · Hq, L, D]."""
    grad = grad.reshape(*x.shape[:2], -1, *x.shape[2:])
    return (grad[:, :, 0] if grad.shape[2] == 1 else grad.sum(2)).to(x.dtype)


def _sequences(cu_seqlens: Tensor) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(cu_seqlens.tolist()) if stop > start]


def _at(gate: Tensor | None, s: slice) -> Tensor | None:
    return None if gate is None else gate[:, :, s]
