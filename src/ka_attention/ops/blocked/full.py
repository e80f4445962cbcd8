"""Recursive forward substitution and its adjoint in plain PyTorch: any device, O(T · block) memory.

To solve for some rows: solve for their first half, let the second half attend to it, solve for the second half. So W
falls apart into rectangles, which are ordinary attention with the values U, and the rows of what is left, each a strip
that ends in a triangle on the diagonal:

    forward     X_b += W_bc U_c                     A_b = (I − L G)⁻¹ (X_b + (L (I − G) + diag(d)) V_b)
    backward    Y_b = (I − G Lᵀ)⁻¹ (dA_b + G dU_b)  dU_c += W_bcᵀ Y_b        dS = W ∘ (Y Uᵀ − Y·A)

What a row has gathered is kept normalised beside its log-sum-exp, as FlashAttention does between blocks. Heads are
computed some at a time, so that their tensors stay in the cache. On a CPU rectangles without mask, window and soft cap
are calls of PyTorch's fused attention, forward and backward. Where tokens are few, strips are most of W, and their
weights are saved for the backward pass.
"""

from collections.abc import Iterator
from copy import copy

import torch
from torch import Tensor

from ka_attention.ops import private
from ka_attention.ops.blocked.heads import flat, flat_gate, sum_heads
from ka_attention.ops.blocked.systems import solve, take_diagonal

ROWS = 128  # rows of a strip, the size of its triangle; half of it where there are few tokens
SCORES = 1 << 19  # scores held at once, few enough for a processor's cache


def outputs(q: Tensor, save: bool, window: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like those that `forward` returns."""
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse, _saved(q, save)


def _saved(q: Tensor, save: bool) -> Tensor:
    """Room for the weights of the strips, [B, Hq, T, 2 · rows], in the dtype of the computation; where tokens are many,
    no columns. T is not asked, or a graph of few tokens might be found on disk for many: the cache of torch.compile
    tells graphs apart by their operators, not by the shapes that these return.
    """
    if not save or q.dtype not in (torch.float32, torch.float64):
        return q.new_empty(0)
    T = q.shape[2]
    few = torch.sym_min(1, 2 * ROWS // torch.sym_max(T, 1))
    return q.new_empty(*q.shape[:3], few * torch.sym_min(2 * T, ROWS))


def forward(q, k, v, gate, k_past, u_past, mask, saved: Tensor, *, scale, window, softcap) -> tuple[Tensor, Tensor]:
    """(A, log-sum-exp) of one sequence in the dtype of the computation; fills `saved`."""
    blocks = _Blocks(q, k, k_past, mask, scale, window, softcap)
    past = None if u_past is None else blocks.flat(u_past)
    given = (blocks.flat(v), flat_gate(gate), past, blocks.kept(saved))
    a = torch.empty_like(blocks.q)
    lse = torch.empty_like(a[..., 0])
    for part, heads in blocks.parts():
        _forward(part, *(None if x is None else x[heads] for x in (*given, a, lse)))
    return a.view(q.shape), lse.view(q.shape[:3])


def _forward(blocks: "_Blocks", v, g, u_past, saved, a, lse) -> None:
    """Fill saved, a and lse of some heads."""
    P = blocks.P
    a.zero_()
    lse.fill_(blocks.nothing)
    u = a
    if g is not None or u_past is not None:
        u = torch.empty_like(blocks.k)
    if u_past is not None:
        u[:, :P] = u_past
    for b, c in blocks.order():
        if c.stop <= P + b.start:
            for n, r, x, lse_x in blocks.attend(b, c, u):
                both = torch.logaddexp(lse[n, r], lse_x)
                a[n, r] *= (lse[n, r] - both).exp_()[..., None]
                a[n, r] += x.mul_((lse_x - both).exp_()[..., None])
                lse[n, r] = both
            continue
        before, own = slice(c.start, P + b.start), slice(P + b.start, c.stop)
        for n in blocks.heads(b, c):
            w, lse_b, _ = blocks.weights(n, b, c)
            gathered = None
            if c.start > 0:  # rectangles cover the columns before the strip
                both = torch.logaddexp(lse[n, b], lse_b)
                w *= (lse_b - both).exp_()[..., None]
                gathered = a[n, b] * (lse[n, b] - both).exp_()[..., None]
                lse_b = both
            lse[n, b] = lse_b if blocks.mask is None else lse_b.masked_fill(lse_b <= blocks.nothing / 2, -torch.inf)
            if saved is not None:
                saved[n, b, : w.shape[2]] = w
            v_b, L = v[n, b], w[:, :, own.start - c.start :]
            x = take_diagonal(L) * v_b
            if gathered is not None:
                x += gathered
            if before.start < before.stop:
                x.baddbmm_(w[:, :, : before.stop - c.start], u[n, before])
            if g is not None:
                x.baddbmm_(L, v_b - g[n, b] * v_b)
                L = L * g[n, b].mT
            a[n, b] = a_b = solve(L, x)
            if u is not a:
                u[n, own] = a_b if g is None else v_b + g[n, b] * (a_b - v_b)


def backward(da, q, k, v, gate, k_past, u_past, mask, a, lse, saved, *, scale, window, softcap):
    """Gradients of q, k, v, gate, k_past and u_past."""
    blocks = _Blocks(q, k, k_past, mask, scale, window, softcap)
    g = flat_gate(gate)
    lse = lse.flatten(0, 1)
    if mask is not None:
        lse = lse.masked_fill(lse == -torch.inf, 0)  # rows that attend nothing: exp(score − lse) is 0 then
    dq, dk, du = (torch.empty_like(x) for x in (blocks.q, blocks.k, blocks.k))
    dgate = None if g is None else torch.empty_like(lse)
    past = None if u_past is None else blocks.flat(u_past)
    given = (blocks.flat(da), blocks.flat(v), g, past, blocks.flat(a), lse, blocks.kept(saved))
    for part, heads in blocks.parts():
        _backward(part, *(None if x is None else x[heads] for x in (*given, dq, dk, du, dgate)))
    P = blocks.P
    before = (None, None) if k_past is None else (sum_heads(dk[:, :P], k_past), sum_heads(du[:, :P], u_past))
    present = None if dgate is None else dgate.view(q.shape[:3])
    return sum_heads(dq, q), sum_heads(dk[:, P:], k), sum_heads(du[:, P:], v), present, *before


def _backward(blocks: "_Blocks", da, v, g, u_past, a, lse, saved, dq, dk, du, dgate) -> None:
    """Fill dq, dk, du, which becomes dV where the tokens are new, and dgate of some heads."""
    P = blocks.P
    dk.zero_()
    du.zero_()
    u = a if g is None else v + g * (a - v)
    if u_past is not None:
        u = torch.cat([u_past, u], dim=1)
    y, delta = torch.empty_like(a), torch.empty_like(lse)
    for b, c in reversed(list(blocks.order())):
        if c.stop <= P + b.start:
            blocks.attend_backward(b, c, y, u, a, lse, delta, dq, dk, du)
            continue
        before, own = slice(c.start, P + b.start), slice(P + b.start, c.stop)
        for n in blocks.heads(b, c):
            w, slope = blocks.weights_of_rows(n, b, c, lse, saved)
            L = w[:, :, own.start - c.start :]
            v_b, a_b, du_b, d = v[n, b], a[n, b], du[n, own], take_diagonal(L)
            # Nobody reads this block's dU again: its place becomes dV.
            if g is None:
                y[n, b] = y_b = solve(L, da[n, b] + du_b, upper=True)
                torch.mul(d, y_b, out=du_b)
            else:
                g_b = g[n, b]
                y[n, b] = y_b = solve(L * g_b.mT, da[n, b] + g_b * du_b, upper=True)
                du_b += L.mT @ y_b
                dgate[n, b] = (du_b * (a_b - v_b)).sum(-1)
                du_b.mul_(1 - g_b).addcmul_(d, y_b)
            if before.start < before.stop:
                du[n, before] += w[:, :, : before.stop - c.start].mT @ y_b
            delta_b = (y_b * a_b).sum(-1, keepdim=True)
            delta[n, b] = delta_b[..., 0]
            ds = torch.bmm(y_b, u[n, c].mT, out=blocks.buffer(1, w.shape)).sub_(delta_b).mul_(w)
            ds_ii = d * ((y_b * v_b).sum(-1, keepdim=True) - delta_b)
            ds[:, :, own.start - c.start :].diagonal(dim1=1, dim2=2).copy_(ds_ii[..., 0])
            if slope is not None:
                ds *= slope
            torch.mul(ds @ blocks.k[n, c], blocks.scale, out=dq[n, b])
            dk[n, c].add_(ds.mT @ blocks.q[n, b], alpha=blocks.scale)


class _Blocks:
    """Rectangles and strips of W and what they do. Heads are flattened: [B · Hq, T, D]."""

    def __init__(self, q, k, k_past, mask, scale, window, softcap):
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.nothing = torch.finfo(self.dtype).min  # score of what may not be attended: finite, so that nothing is NaN
        self.B, self.H, self.T, _ = q.shape
        self.P = 0 if k_past is None else k_past.shape[2]
        self.q, self.scale = self.flat(q), scale
        self.k = self.flat(k if k_past is None else torch.cat([k_past, k], dim=2))
        self.mask, self.window, self.softcap = mask, window, softcap
        self.fused = q.device.type == "cpu" and mask is None and window is None and softcap is None
        self.fused = self.fused and private.flash is not None
        self.rows = _rows(self.T)
        self.buffers: dict[int, Tensor] = {}
        self.first = 0  # head
        self.ahead = torch.full((self.rows, self.rows), -torch.inf, dtype=self.dtype, device=q.device).triu(1)

    def flat(self, x: Tensor) -> Tensor:
        return flat(x, self.H, self.dtype)

    def buffer(self, which: int, shape: torch.Size) -> Tensor:
        size = shape.numel()
        if which not in self.buffers or self.buffers[which].numel() < size:
            self.buffers[which] = self.q.new_empty(size)
        return self.buffers[which][:size].view(shape)

    def parts(self) -> Iterator[tuple["_Blocks", slice]]:
        """The blocks of some heads at a time, few enough for the cache, and these heads."""
        step = max(torch.get_num_threads(), SCORES // (2 * self.rows**2))
        for start in range(0, len(self.q), step):
            heads = slice(start, start + step)
            part = copy(self)
            part.q, part.k, part.first = self.q[heads], self.k[heads], start
            yield part, heads

    def order(self) -> Iterator[tuple[slice, slice]]:
        """(rows, columns) of the rectangles and strips in the order of the forward pass; a strip ends at its rows."""
        if self.P:
            yield from self._rectangle(0, self.T, 0, self.P)
        yield from self._order(0, self.T)

    def _order(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        if stop - start <= 2 * self.rows:
            for r in range(start, stop, self.rows):
                first = start if self.window is None else max(start, r - self.window + 1)
                end = min(r + self.rows, stop)
                yield slice(r, end), slice(self.P + first, self.P + end)
            return
        half = self.rows
        while 2 * half < stop - start:
            half *= 2
        yield from self._order(start, start + half)
        yield from self._rectangle(start + half, stop, self.P + start, self.P + start + half)
        yield from self._order(start + half, stop)

    def _rectangle(self, start: int, stop: int, first: int, last: int) -> Iterator[tuple[slice, slice]]:
        """Rows start … stop and columns first … last, or the corner of them that the window leaves, if any."""
        if self.window is not None:
            first = max(first, self.P + start - self.window + 1)
            stop = min(stop, last - self.P + self.window - 1)
        if start < stop and first < last:
            yield slice(start, stop), slice(first, last)

    def heads(self, b: slice, c: slice) -> Iterator[slice]:
        """Heads whose scores of rows b against columns c are held at once."""
        step = max(1, SCORES // ((b.stop - b.start) * (c.stop - c.start)))
        for start in range(0, len(self.q), step):
            yield slice(start, min(start + step, len(self.q)))

    def chunks(self, b: slice, c: slice) -> Iterator[tuple[slice, slice]]:
        """Heads and rows whose scores against columns c are held at once."""
        step = max(1, SCORES // (c.stop - c.start))
        for start in range(b.start, b.stop, step):
            r = slice(start, min(start + step, b.stop))
            for n in self.heads(r, c):
                yield n, r

    def weights(self, n: slice, b: slice, c: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Softmax of rows b over columns c alone, 0 where hidden, its log-sum-exp, and the slope of the soft cap."""
        q, k = self.q[n, b], self.k[n, c]
        s = self.buffer(0, torch.Size((len(q), q.shape[1], k.shape[1])))
        torch.baddbmm(s, q, k.mT, beta=0, alpha=self.scale, out=s)
        slope = None
        if self.softcap is not None:
            s.div_(self.softcap).tanh_()
            slope = 1 - s * s
            s *= self.softcap
        hidden = self._hidden(n, b, c)
        if hidden is not None:
            s.masked_fill_(hidden, self.nothing)
        if c.stop > self.P + b.start:
            s[:, :, self.P + b.start - c.start :] += self.ahead[: q.shape[1], : q.shape[1]]
        top = s.amax(-1)
        w = torch.softmax(s, -1, out=s)
        lse = top - w.amax(-1).log_()
        return w if hidden is None else w.masked_fill_(hidden, 0), lse, slope

    def weights_of_rows(self, n, b, c, lse, saved=None) -> tuple[Tensor, Tensor | None]:
        """These columns of the softmax of whole rows, of known log-sum-exp or saved, and the slope of the soft cap."""
        if saved is not None:
            w = saved[n, b, : c.stop - c.start]
            return self.buffer(0, w.shape).copy_(w), None
        w, lse_c, slope = self.weights(n, b, c)
        return w.mul_((lse_c - lse[n, b]).exp_()[..., None]), slope

    def kept(self, saved: Tensor | None) -> Tensor | None:
        """The strips' weights, [B · Hq, T, 2 · rows], or None where nothing is saved: a window widens strips."""
        plain = self.window is None and self.softcap is None
        return saved.flatten(0, 1) if plain and saved is not None and saved.numel() else None

    def _hidden(self, n: slice, b: slice, c: slice) -> Tensor | None:
        """What the window and the mask hide: bool [n or 1, rows or 1, columns], or None if nothing."""
        hidden = None
        if self.window is not None and c.start <= self.P + b.stop - 1 - self.window:
            i = torch.arange(self.P + b.start, self.P + b.stop, device=self.q.device)
            hidden = (torch.arange(c.start, c.stop, device=i.device) <= i[:, None] - self.window)[None]
        if self.mask is not None:
            mask = self.mask if self.mask.shape[2] == 1 else self.mask[:, :, b]
            mask = mask if self.mask.shape[3] == 1 else mask[..., c]
            head = self.first + torch.arange(n.start, n.stop, device=mask.device)
            masked = ~mask.expand(self.B, self.H, -1, -1)[head // self.H, head % self.H]
            hidden = masked if hidden is None else hidden | masked
        return hidden

    def attend(self, b: slice, c: slice, u: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Softmax attention of rows b to columns c with values u: heads, rows, outputs and their log-sum-exp."""
        if self.fused:
            q, k, u = self.q[None, :, b], self.k[None, :, c], u[None, :, c]
            x, lse = private.flash(q, k, u, scale=self.scale)
            yield slice(0, len(self.q)), b, x[0], lse[0]
            return
        for n, r in self.chunks(b, c):
            w, lse, _ = self.weights(n, r, c)
            yield n, r, w @ u[n, c], lse

    def attend_backward(self, b, c, y, u, a, lse, delta, dq, dk, du) -> None:
        """Add what rows b against columns c contribute to the gradients of q, k and u."""
        if self.fused:
            y, q, k, u, a, lse = y[:, b], self.q[:, b], self.k[:, c], u[:, c], a[:, b], lse[:, b]
            # With the log-sum-exp and the output of whole rows this is the rectangle's part of their gradient.
            grads = private.flash_backward(
                y[None], q[None], k[None], u[None], a[None], lse[None], 0.0, False, scale=self.scale
            )
            for total, part in zip((dq[:, b], dk[:, c], du[:, c]), grads, strict=True):
                total += part[0]
            return
        for n, r in self.chunks(b, c):
            w, slope = self.weights_of_rows(n, r, c, lse)
            du[n, c] += w.mT @ y[n, r]
            ds = torch.bmm(y[n, r], u[n, c].mT, out=self.buffer(1, w.shape)).sub_(delta[n, r, None]).mul_(w)
            if slope is not None:
                ds *= slope
            dq[n, r].add_(ds @ self.k[n, c], alpha=self.scale)
            dk[n, c].add_(ds.mT @ self.q[n, r], alpha=self.scale)


def _rows(T: int) -> int:
    """Rows of a strip of T tokens."""
    return min(T, ROWS if T > 2 * ROWS else ROWS // 2)
