"""A window as a band of W: blocks solved in parallel and a scan over them, O(T · window) time.

With a window w, a block of R ≥ w − 1 rows needs of everything before it the *state* u, which is U of the last w − 1
tokens, and is affine in it. With the columns of W before the block in W_prev:

    A  = A⁰ + F u            A⁰ = (I − L G)⁻¹ (L (I − G) + diag(d)) V        F = (I − L G)⁻¹ W_prev
    u' = c + M u             c = V + G (A⁰ − V) and M = G F of the block's last w − 1 rows

The adjoint runs from the end. Its state μ is what dU of the last w − 1 tokens before a block gets from there on:

    Y⁰ = (I − L G)⁻ᵀ dA      μ = W_prevᵀ Y⁰ + Mᵀ μ'                          Y  = Y⁰ + (I − L G)⁻ᵀ G μ'

Where every gate is 0 the values U are V, and blocks are independent. Nothing is saved, since a band is cheap to compute
again. Some heads and blocks are computed at a time, so that their tensors stay in the cache.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ka_attention.ops.blocked.heads import flat, flat_gate, softmax_alone, sum_heads
from ka_attention.ops.blocked.systems import LEAF, inverse, take_diagonal

NUMBERS = 1 << 19  # scores, and numbers of a tensor of the rows, held at once: few enough for a processor cache
WIDEST = 65  # window for which this is the faster way with systems to solve; maps of the state grow with its square


def forward(q, k, v, gate, k_past, u_past, mask, saved, *, scale, window, softcap) -> tuple[Tensor, Tensor]:
    """A of one sequence in the dtype of the computation, and zeros: no log-sum-exp is needed."""
    band = _Band(q, k, gate, k_past, mask, scale, window, softcap)
    v, state = band.rows(v), band.before(u_past)
    u = None if band.system else band.columns(v, state)
    a = torch.empty_like(v)
    for n, b in band.segments():
        w, _ = band.weights(band.at(band.q, n, b), band.seen(band.k, n, b), n, b)
        if u is not None:
            a_b = w @ band.seen(u, n, b)
        else:
            v_b, g = band.at(v, n, b), band.gate_at(n, b)
            prev, L, d = band.parts(w)
            x = d * v_b
            if g is not None:
                x.baddbmm_(L, v_b - g * v_b)
            inverted = inverse(L if g is None else L * g.mT)
            a_b, f = inverted @ x, inverted @ prev
            states = state[n]
            if band.blocks > 1:
                last = slice(band.R - band.p, band.R)
                c, M = a_b[:, last], f[:, last]
                if g is not None:
                    c, M = v_b[:, last] + g[:, last] * (c - v_b[:, last]), g[:, last] * M
                states = _scan(c, M, state[n])
            a_b.baddbmm_(f, states)
        band.put(a, n, b, a_b)
    a = band.tokens(a).reshape(q.shape).contiguous()
    return a, a.new_zeros(q.shape[:3])


def backward(da, q, k, v, gate, k_past, u_past, mask, a, lse, saved, *, scale, window, softcap):
    """Gradients of q, k, v, gate, k_past and u_past."""
    band = _Band(q, k, gate, k_past, mask, scale, window, softcap)
    p, last = band.p, slice(band.R - band.p, band.R)
    da, v_all, a = (band.rows(x) for x in (da, v, a))
    u = v_all
    if band.system:
        u = a if band.g is None else v_all + band.g * (a - v_all)
    u = band.columns(u, band.before(u_past))
    dq, dv, dgate = torch.empty_like(da), torch.empty_like(da), None if band.g is None else torch.empty_like(band.g)
    dk, state = torch.zeros_like(band.k), band.before(None)
    for n, b in reversed(list(band.segments())):
        q_b, k_b = band.at(band.q, n, b), band.seen(band.k, n, b)
        w, slope = band.weights(q_b, k_b, n, b)
        y, v_b, a_b, g = band.at(da, n, b), band.at(v_all, n, b), band.at(a, n, b), band.gate_at(n, b)
        prev, L, d = band.parts(w)
        if band.system:
            inverted = inverse(L if g is None else L * g.mT)
            y = inverted.mT @ y
            e = prev.mT @ y
            if band.blocks > 1:
                M = inverted[:, last] @ prev
                states = _scan(e, (M if g is None else g[:, last] * M).mT, state[n], reverse=True)
                y = y.baddbmm_(inverted[:, last].mT, states if g is None else g[:, last] * states)
            else:
                state[n] = e
        else:
            e = prev.mT @ y
            e = e.unflatten(0, (n.stop - n.start, b.stop - b.start))
            states = torch.cat([e[:, 1:], state[n, None]], dim=1).flatten(0, 1)
            state[n] = e[:, 0]
        dv_b = d * y
        if g is not None and dgate is not None:
            du = L.mT @ y
            if band.blocks > 1:
                du[:, last] += states
            band.put(dgate, n, b, (du * (a_b - v_b)).sum(-1, keepdim=True))
            dv_b += du - g * du
        band.put(dv, n, b, dv_b)
        delta = (y * a_b).sum(-1, keepdim=True)
        ds = torch.bmm(y, band.seen(u, n, b).mT).sub_(delta).mul_(w)
        ds[:, :, p:].diagonal(dim1=1, dim2=2).copy_((d * ((y * v_b).sum(-1, keepdim=True) - delta))[..., 0])
        if slope is not None:
            ds *= slope
        band.put(dq, n, b, (ds @ k_b).mul_(scale))
        band.add(dk, n, b, (ds.mT @ q_b).mul_(scale))
    grads = sum_heads(band.tokens(dq), q), sum_heads(band.tokens(dk[:, p:].unflatten(1, (band.blocks, band.R))), k)
    dgate = None if dgate is None else band.tokens(dgate).view(q.shape[:3])
    past = (None, None) if k_past is None else (band.past(dk[:, :p], k_past), band.past(state, u_past))
    return *grads, sum_heads(band.tokens(dv), v), dgate, *past


class _Band:
    """Blocks of W. Heads are flattened, tokens padded to whole blocks: [B · Hq, blocks, R, D]."""

    def __init__(self, q, k, gate, k_past, mask, scale, window, softcap):
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.nothing = torch.finfo(self.dtype).min  # score of what the mask hides: finite, so that nothing is NaN
        self.B, self.H, self.T, self.D = q.shape
        self.P = 0 if k_past is None else k_past.shape[2]
        self.mask, self.window, self.scale, self.softcap = mask, window, scale, softcap
        self.R = LEAF
        while min(window - 1, self.T) > self.R:
            self.R *= 2
        self.blocks = -(-self.T // self.R)
        self.p = window - 1 if self.blocks > 1 else min(window - 1, self.P)
        self.q = self.rows(q)
        self.k = self.columns(self.rows(k), self.before(k_past))
        self.system = not softmax_alone(gate)
        g = flat_gate(gate)
        self.g = None if g is None else self._blocks(g)
        i = torch.arange(self.R, device=q.device)[:, None]
        j = torch.arange(-self.p, self.R, device=q.device)
        outside = (j > i) | (j <= i - window)
        self.outside = torch.zeros(outside.shape, dtype=self.dtype, device=q.device).masked_fill_(outside, -torch.inf)

    def _blocks(self, x: Tensor) -> Tensor:
        short = self.blocks * self.R - self.T
        return (F.pad(x, (0, 0, 0, short)) if short else x).unflatten(1, (self.blocks, self.R))

    def rows(self, x: Tensor) -> Tensor:
        """[B, H, T, D] as [B · Hq, blocks, R, D]."""
        return self._blocks(flat(x, self.H, self.dtype))

    def tokens(self, x: Tensor) -> Tensor:
        """[B · Hq, blocks, R, D] as [B · Hq, T, D]."""
        return x.flatten(1, 2)[:, : self.T]

    def before(self, past: Tensor | None) -> Tensor:
        """The last p tokens before the first, zeros where there are none: [B · Hq, p, D]."""
        x = self.q.new_zeros(self.B * self.H, self.p, self.D)
        if past is not None and self.p:
            near = flat(past[:, :, -self.p :], self.H, self.dtype)
            x[:, self.p - near.shape[1] :] = near
        return x

    def past(self, grad: Tensor, past: Tensor) -> Tensor:
        """The gradient of the past from that of the last p tokens before the first."""
        near = min(self.p, self.P)
        return sum_heads(F.pad(grad[:, self.p - near :], (0, 0, self.P - near, 0)), past)

    def columns(self, x: Tensor, before: Tensor) -> Tensor:
        """Rows and what is before them, [B · Hq, p + blocks · R, D]."""
        return torch.cat([before, x.flatten(1, 2)], dim=1)

    def segments(self) -> Iterator[tuple[slice, slice]]:
        """Heads and blocks that are computed at once, in the order of the forward pass."""
        size = max(1, NUMBERS // (self.R * (self.R + self.p + self.D)))
        heads = min(size, len(self.q))
        for n in range(0, len(self.q), heads):
            for b in range(0, self.blocks, max(1, size // heads)):
                yield slice(n, min(n + heads, len(self.q))), slice(b, min(b + max(1, size // heads), self.blocks))

    def at(self, x: Tensor, n: slice, b: slice) -> Tensor:
        return x[n, b].flatten(0, 1)

    def gate_at(self, n: slice, b: slice) -> Tensor | None:
        return None if self.g is None else self.at(self.g, n, b)

    def put(self, x: Tensor, n: slice, b: slice, value: Tensor) -> None:
        x[n, b] = value.view(x[n, b].shape)

    def seen(self, x: Tensor, n: slice, b: slice) -> Tensor:
        """What the blocks see of columns x, [heads · blocks, p + R, D]."""
        x = x[n, b.start * self.R : b.stop * self.R + self.p]
        return x.unfold(1, self.p + self.R, self.R).mT.flatten(0, 1)

    def add(self, x: Tensor, n: slice, b: slice, value: Tensor) -> None:
        """The adjoint of `seen`."""
        value = value.unflatten(0, (-1, b.stop - b.start))
        x[n, self.p :].unflatten(1, (self.blocks, self.R))[:, b] += value[:, :, self.p :]
        if self.p <= self.R:
            x[n, : self.blocks * self.R].unflatten(1, (self.blocks, self.R))[:, b, : self.p] += value[:, :, : self.p]
        else:
            x[n, : self.p] += value[:, 0, : self.p]

    def parts(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W_prev, L and d. Changes w, whose diagonal becomes 0."""
        L = w[:, :, self.p :]
        d = take_diagonal(L)
        return w[:, :, : self.p], L, d

    def weights(self, q: Tensor, k: Tensor, n: slice, b: slice) -> tuple[Tensor, Tensor | None]:
        """Softmax of the blocks' rows, [heads · blocks, R, p + R], and the slope of the soft cap."""
        s = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=self.scale)
        slope = None
        if self.softcap is not None:
            s.div_(self.softcap).tanh_()
            slope = 1 - s * s
            s *= self.softcap
        hidden = self._hidden(n, b)
        if hidden is not None:
            s.masked_fill_(hidden, self.nothing)
        s += self.outside
        if b.start == 0 and self.p > self.P:
            s.unflatten(0, (-1, b.stop))[:, 0, :, : self.p - self.P] = -torch.inf
        w = torch.softmax(s, -1, out=s)
        return (w if hidden is None else w.masked_fill_(hidden, 0)), slope

    def _hidden(self, n: slice, b: slice) -> Tensor | None:
        """What the mask hides, [heads · blocks, R, p + R]; anything where there is no token."""
        if self.mask is None:
            return None
        device = self.mask.device
        start = self.R * torch.arange(b.start, b.stop, device=device)[:, None]
        i = (start + torch.arange(self.R, device=device)).clamp_(max=self.T - 1)
        j = (start + torch.arange(self.P - self.p, self.P + self.R, device=device)).clamp_(0, self.P + self.T - 1)
        i, j = (x if size > 1 else torch.zeros_like(x) for x, size in zip((i, j), self.mask.shape[2:], strict=True))
        head = torch.arange(n.start, n.stop, device=device)[:, None, None, None]
        mask = self.mask.expand(self.B, self.H, -1, -1)
        return ~mask[head // self.H, head % self.H, i[:, :, None], j[:, None, :]].flatten(0, 1)


def _scan(c: Tensor, M: Tensor, state: Tensor, reverse: bool = False) -> Tensor:
    """The state x before each block, x' = c + M x, [heads · blocks, p, D]; `state` becomes the last."""
    c, M = (x.unflatten(0, (len(state), len(x) // len(state))).transpose(0, 1) for x in (c, M))
    states = torch.cat([c, state[None]] if reverse else [state[None], c])
    order = slice(None, None, -1 if reverse else 1)
    x = states.unbind()[order]
    for before, after, m in zip(x, x[1:], M.unbind()[order], strict=False):
        after.baddbmm_(m, before)
    state.copy_(x[-1])
    return states[1:].transpose(0, 1).flatten(0, 1) if reverse else states[:-1].transpose(0, 1).flatten(0, 1)
