"""One sequence over several processes: each holds a contiguous share of the tokens, of equal length, in rank's order.

With a window w, what a share needs of everything before it are the keys and U of w − 1 tokens, and given the keys it is
affine in that state u [w − 1, D] (docs/maths.md):

    A  = A⁰ + F u,     A⁰: the share's own, with u = 0;     F: its answer to V = 0 and u = I
    u' = c  + M u,     c = U⁰ of its last w − 1 tokens;     M = g F of them

Keys go to the neighbour, (M, c) to everybody: H (w − 1)(w − 1 + D) numbers a rank however long the text is. Each rank
composes the maps before its own, in log2 of their number of steps. Without a window every output depends on all keys;
ranks exchange heads for tokens (all-to-all, as in DeepSpeed-Ulysses, arXiv 2309.14509) and each computes whole
sequences of some heads.

Backward is autograd's: collectives are differentiable and stand in the graph of every rank, also where a rank has no
use for what it gets, or the others would wait for it.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

Operator = Callable[..., Tensor]  # ka_attention
Group = dist.ProcessGroup
ROWS, MIN_ROWS = 4096, 256  # of one product with F


def attend(
    group: Group,
    operator: Operator,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: float | Tensor,
    window: int | None,
    cu_seqlens: Tensor | None,
    options: dict,
) -> Tensor:
    """A of this rank's share, [B, Hq, T / ranks, D]; cu_seqlens are those of the whole text."""
    if window is None:
        return _by_heads(group, operator, q, k, v, gate, cu_seqlens, options)
    return _by_tokens(group, operator, q, k, v, gate, window, cu_seqlens, options)


class Share(NamedTuple):
    """How packed sequences lie in one rank's share of `length` tokens."""

    seen: int  # tokens of the first one, which began in a share before, that the first token may attend to there
    carried: int  # tokens of it in this share
    ends: list[int]  # of the sequences after it, from its end on: 0, …, length − carried


def share_of(rank: int, length: int, window: int, ends: list[int]) -> Share:
    """The share [rank · length, (rank + 1) · length) of packed sequences with these ends, 0 first."""
    start, stop = rank * length, (rank + 1) * length
    first = bisect_right(ends, start) - 1
    seen = min(window - 1, start - ends[first])
    carried = min(ends[first + 1], stop) - start if seen else 0
    inner = [end for end in ends if start + carried < end < stop]
    rest = [0, *(end - start - carried for end in inner), length - carried]
    return Share(seen, carried, sorted(set(rest)))


def _by_tokens(group, operator, q, k, v, gate, window, cu_seqlens, options) -> Tensor:
    rank, ranks, T = dist.get_rank(group), dist.get_world_size(group), q.shape[2]
    state = window - 1
    if state > T:
        raise ValueError(f"group: each rank's share must hold window − 1 = {state} tokens at least, got {T}")
    ends = [0, ranks * T] if cu_seqlens is None else cu_seqlens.tolist()
    if ends[-1] != ranks * T:
        raise ValueError(f"cu_seqlens must end at {ranks * T}, the tokens of all {ranks} ranks, got {ends[-1]}")
    share = share_of(rank, T, window, ends)

    (k, k_tail), (v, v_tail) = _Tail.apply(k, state), _Tail.apply(v, state)
    before = _from_previous(group, k_tail)[:, :, state - share.seen :] if state else k_tail
    call = _Call(operator, q, k, gate, {**options, "window": window}, share)
    own = call(v, before, q.new_zeros(*q.shape[:2], share.seen, q.shape[3]))
    if not share.seen:
        own = _Also.apply(own, before)
    if not state or ranks == 1:
        return own
    own, a_tail = _Tail.apply(own, state)
    parts = [_Tail.apply(F, state) for F in call.responses(before, state)]
    tails = [tail for _, tail in parts] or [q.new_zeros(*q.shape[:2], state, state)]
    g = _tail_of_gate(gate, q, slice(T - state, T))
    values = v_tail.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    c = values + g * (a_tail - values)
    M = g * torch.cat(tails, dim=-1)[..., :state]
    u = _compose(group, torch.cat([M, c], dim=-1).to(torch.promote_types(q.dtype, torch.float32)), state).to(q.dtype)
    if not parts:
        return _Also.apply(own, u)
    D = q.shape[3]
    for (F, _), rows in zip(parts, u.split(D, dim=2), strict=True):
        own = _add_product(own, F, pad(rows, (0, 0, 0, D - rows.shape[2])))
    return own


class _Call(NamedTuple):
    """The operator on one share: the sequence that comes from before with its past, then those that begin here."""

    operator: Operator
    q: Tensor
    k: Tensor
    gate: float | Tensor
    options: dict
    share: Share

    def __call__(self, v: Tensor, k_past: Tensor, u_past: Tensor) -> Tensor:
        n, T = self.share.carried, self.q.shape[2]
        parts = []
        if n:
            parts.append(self._run(slice(0, n), v, past=(k_past, u_past)))
        if n < T:
            ends = self.share.ends
            packed = None if len(ends) == 2 else torch.tensor(ends, dtype=torch.int32, device=v.device)
            parts.append(self._run(slice(n, T), v, cu_seqlens=packed))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _run(self, s: slice, v: Tensor, **how) -> Tensor:
        q, k, gate = self.q, self.k, self.gate
        if (s.start, s.stop) != (0, q.shape[2]):  # the gradient of a part is a tensor of zeros around it
            q, k, v = q[:, :, s], k[:, :, s], v[:, :, s]
            gate = gate[:, :, s] if isinstance(gate, Tensor) and gate.ndim == 3 else gate
        return self.operator(q, k, v, gate=gate, **how, **self.options)

    def responses(self, k_past: Tensor, state: int) -> Iterator[Tensor]:
        """F for V = 0 and the unit states, [B, Hq, T, D]: as many columns at once as a head has dimensions."""
        (B, H, T, D), (seen, n, _) = self.q.shape, self.share
        if not n:
            return
        zeros = self.k.new_zeros(()).expand(self.k.shape)
        for some in torch.eye(state, device=zeros.device, dtype=zeros.dtype)[state - seen :].split(D, dim=1):
            u = pad(some, (0, D - some.shape[1])).expand(B, H, seen, D)
            F = self._run(slice(0, n), zeros, past=(k_past, u))
            yield F if n == T else pad(F, (0, 0, 0, T - n))


class _Tail(torch.autograd.Function):
    """x and its last n tokens, whose gradient is added to that of x in place of a tensor of zeros of its size."""

    @staticmethod
    def forward(ctx, x, n):
        ctx.n = n
        return x.view_as(x), x[:, :, x.shape[2] - n :].clone()

    @staticmethod
    def backward(ctx, grad, tail):
        grad = grad.clone()
        grad[:, :, grad.shape[2] - ctx.n :] += tail
        return grad, None


class _Also(torch.autograd.Function):
    """x, with y in its graph: somebody waits for the message of y's gradient."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(y)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.zeros_like(ctx.saved_tensors[0])


def _add_product(a: Tensor, F: Tensor, u: Tensor) -> Tensor:
    """a + F u, some rows at a time: the gradient of u is a sum over all rows, too long for one product."""
    (B, H, T, D), rows = a.shape, math.gcd(a.shape[2], ROWS)
    rows = T if rows < MIN_ROWS else rows
    u = u[:, :, None].expand(B, H, T // rows, D, D).reshape(-1, D, D)
    return torch.baddbmm(a.reshape(-1, rows, D), F.reshape(-1, rows, D), u).view(B, H, T, D)


def _tail_of_gate(gate: float | Tensor, q: Tensor, tail: slice) -> float | Tensor:
    if not isinstance(gate, Tensor):
        return gate
    gate = gate[:, :, tail, None] if gate.ndim == 3 else gate.view(1, -1, 1, 1)
    return gate.to(torch.promote_types(q.dtype, torch.float32))


def _compose(group: Group, own: Tensor, state: int) -> Tensor:
    """The state before this rank's share, [B, Hq, state, D], from the maps (M | c) of all shares."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    maps = _exchange(group, own.expand(ranks, *own.shape))
    before = (torch.arange(ranks, device=own.device) < rank).view(-1, *[1] * own.ndim)
    identity = torch.eye(state, own.shape[-1], device=own.device, dtype=own.dtype)  # (1 | 0)
    maps = torch.where(before, maps, identity)
    while len(maps) > 1:  # neighbours become one map, (M₂ | c₂) ∘ (M₁ | c₁) = (M₂ M₁ | M₂ c₁ + c₂)
        if len(maps) % 2:
            maps = torch.cat([maps, identity.expand(1, *own.shape)])
        first, second = maps[::2], maps[1::2]
        M = second[..., :state]
        maps = torch.cat([M @ first[..., :state], M @ first[..., state:] + second[..., state:]], dim=-1)
    return maps[0, ..., state:]


def _from_previous(group: Group, x: Tensor) -> Tensor:
    """What the rank before gave as `x`, of the same shape; the first rank gets zeros."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    rows = x.movedim(2, 0).contiguous()  # sent along the first dimension
    send = [len(rows) if other == rank + 1 else 0 for other in range(ranks)]
    receive = [len(rows) if other == rank - 1 else 0 for other in range(ranks)]
    if rank + 1 == ranks:
        rows = rows[:0]
    got = _AllToAll.apply(rows, receive, send, group)
    return torch.cat([got.movedim(0, 2), torch.zeros_like(x[:, :, : x.shape[2] - len(got)])], dim=2)


def _by_heads(group, operator, q, k, v, gate, cu_seqlens, options) -> Tensor:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for name, heads in (("query", q.shape[1]), ("key", k.shape[1])):
        if heads % ranks:
            raise ValueError(f"group: without a window the {name} heads are shared out, got {heads} for {ranks} ranks")
    if isinstance(gate, Tensor):
        if gate.ndim == 3:
            gate = _heads_for_tokens(group, gate[..., None])[..., 0]
        else:
            gate = gate.chunk(ranks)[rank]
    q, k, v = (_heads_for_tokens(group, x) for x in (q, k, v))
    return _tokens_for_heads(group, operator(q, k, v, gate=gate, cu_seqlens=cu_seqlens, **options))


def _heads_for_tokens(group: Group, x: Tensor) -> Tensor:
    """[B, H, T / ranks, D] of this rank's tokens → [B, H / ranks, T, D] of this rank's heads."""
    ranks = dist.get_world_size(group)
    x = _exchange(group, x.unflatten(1, (ranks, -1)).movedim(1, 0))  # [ranks, B, H / ranks, T / ranks, D]
    return x.movedim(0, 2).flatten(2, 3)


def _tokens_for_heads(group: Group, x: Tensor) -> Tensor:
    """The way back."""
    ranks = dist.get_world_size(group)
    x = _exchange(group, x.unflatten(2, (ranks, -1)).movedim(2, 0))
    return x.movedim(0, 1).flatten(1, 2)


def _exchange(group: Group, x: Tensor) -> Tensor:
    """Entry r of x [ranks, …] goes to rank r, and comes back as the entry of who sent it."""
    ones = [1] * len(x)
    return _AllToAll.apply(x, ones, ones, group)


class _AllToAll(torch.autograd.Function):
    """The first send[0] entries of x go to rank 0, …; receive[0] come first, from rank 0, …"""

    @staticmethod
    def forward(ctx, x, receive, send, group):
        ctx.way_back = send, receive, group
        got = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(got, x.contiguous(), receive, send, group)
        return got

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, *ctx.way_back), None, None, None
