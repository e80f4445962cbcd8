"""One sequence over several processes: each holds a contiguous share of the tokens, of equal length, in rank's order.

With a window w, what a share needs of everything before it are the keys and U of w − 1 tokens, and given the keys it is
affine in that state u [w − 1, D] (docs/maths.md):

    A  = A⁰ + F u,     A⁰: the share's own, with u = 0;     F: its answer to V = 0 and u = I
    u' = c  + M u,     c = U⁰ of its last w − 1 tokens;     M = g F of them

Keys go to the neighbour, (M, c) to everybody: H (w − 1)(w − 1 + D) numbers per rank however long the text is. Each rank
composes the maps before its own, in log2 of their number of steps. Backward goes the same way from the end, with

    λ = b + Mᵀ λ',     b = Fᵀ dA,     λ: the gradient of u, λ' that of u'

Kernels for narrow windows have M and c at hand in the middle of their work, and b without F (`open`, `state_gradient`
of a backend); others compute F, by columns. Without a window every output depends on all keys; ranks exchange heads for
tokens (all-to-all, as in DeepSpeed-Ulysses, arXiv 2309.14509) and each computes whole sequences of some heads. So do
windows for which F would have more columns than a head has dimensions, where heads can be shared out.

Every rank takes part in every message, also where it has no use for what it gets, or the others would wait for it.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ka_attention.ops import dispatch
from ka_attention.ops.inputs import Call, Options, repeat_heads

Operator = Callable[..., Tensor]  # ka_attention
Group = dist.ProcessGroup
Results = tuple[Tensor, Tensor, Tensor]  # of a backend's `forward`
Gradients = Sequence[Any]  # of q, k, v, gate, k_past, u_past: Tensor or None


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


@torch.compiler.disable
def by_tokens(group: Group, call: Call, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    """A of this rank's share with a window, [B, Hq, T / ranks, D]; cu_seqlens are those of the whole text."""
    q, k, v, gate, *_ = tensors = call.tensors
    rank, ranks, T = dist.get_rank(group), dist.get_world_size(group), q.shape[2]
    window = call.options["window"] or 1
    if window - 1 > T:
        raise ValueError(f"group: each rank's share must hold window − 1 = {window - 1} tokens at least, got {T}")
    ends = [0, ranks * T] if cu_seqlens is None else cu_seqlens.tolist()
    if ends[-1] != ranks * T:
        raise ValueError(f"cu_seqlens must end at {ranks * T}, the tokens of all {ranks} ranks, got {ends[-1]}")
    if window == 1 or ranks == 1:
        cu_seqlens = None if window == 1 else cu_seqlens
        return dispatch.attend(tensors._replace(cu_seqlens=cu_seqlens), call.options, backend)
    if backend == "reference":
        raise RuntimeError("backend 'reference' does not take a group with a window: use 'blocked'")
    part = _Part(group, share_of(rank, T, window, ends), call.options, backend, window - 1, tensors.may_train())
    with dispatch.without_autocast(q, backend):
        return _ByTokens.apply(q, k, v, gate, part)


class _Part(NamedTuple):
    """What a share is computed with besides its tensors."""

    group: Group
    share: Share
    options: Options
    backend: str
    state: int  # w − 1
    save: bool

    def forward(self, q, k, v, gate, k_past=None, u_past=None, ends=None) -> Results:
        load = dispatch.load(self.backend)
        return load.forward(q, k, v, gate, k_past, u_past, None, ends, **self.options, save=self.save)

    def open(self, q, k, v, gate, k_past, u_past) -> tuple[Tensor | None, Tensor, Tensor, Callable[[], Results]]:
        """F, or None where the backend needs none, M, c, and `forward` for when u_past, now 0, holds its values."""
        new, load = (q, k, v, gate, k_past, u_past), dispatch.load(self.backend)
        opened = load.open(*new, **self.options, save=self.save) if hasattr(load, "open") else None
        if opened is not None:
            return None, *opened
        a, *others = self.forward(*new)
        (B, H, T, D), seen = q.shape, self.share.seen
        columns, zeros = [], k.new_zeros(()).expand(k.shape)
        for some in torch.eye(seen, device=q.device, dtype=q.dtype).split(D, dim=1):  # as many as a head has dimensions
            u = pad(some, (0, D - some.shape[1])).expand(B, H, seen, D)
            columns.append(self.forward(q, k, zeros, gate, k_past, u)[0][..., : some.shape[1]])
        F = torch.cat(columns, dim=-1)
        M = F[:, :, T - self.state :].to(torch.promote_types(q.dtype, torch.float32))
        M = pad(M if gate is None else gate[:, :, T - self.state :, None] * M, (self.state - seen, 0))
        return F, M, self.last_u(a, q, k, v, gate), lambda: (a + F @ u_past, *others)

    def last_u(self, a, q, k, v, gate) -> Tensor:
        """U of the last w − 1 tokens; zeros before them where they are fewer."""
        rows = min(self.state, a.shape[2])
        tail = slice(a.shape[2] - rows, None)
        u, v = (x[:, :, tail].to(torch.promote_types(q.dtype, torch.float32)) for x in (a, v))
        if gate is not None:
            u = torch.lerp(repeat_heads(v, q), u, gate[:, :, tail, None])
        return pad(u, (0, 0, self.state - rows, 0))

    def backward(self, last: Tensor | None, da, q, k, v, gate, k_past, u_past, ends, a, *others) -> Gradients:
        """`last` is what others give to U of the last w − 1 tokens, [B, Hq, w − 1, D]."""
        rows, load = min(self.state, a.shape[2]), dispatch.load(self.backend)
        tail = slice(a.shape[2] - rows, None)
        if last is not None:
            last, da = last[:, :, self.state - rows :], da.clone()
            read = last if gate is None else gate[:, :, tail, None] * last
            da[:, :, tail] += read
        inputs = q, k, v, gate, k_past, u_past, None, ends, a, *others
        grads = load.backward(da, *inputs, **self.options)
        if last is not None and gate is not None:
            grads[2][:, :, tail] += (last - read).unflatten(1, (v.shape[1], -1)).sum(2)
            grads[3][:, :, tail] += (last * (a[:, :, tail] - repeat_heads(v[:, :, tail], q))).sum(-1)
        return grads

    def answer(self, F: Tensor | None, da, *others) -> Tensor:
        """b = Fᵀ dA, the gradient of u_past where U of the last tokens has none from others."""
        if F is None:
            return dispatch.load(self.backend).state_gradient(da, *others, **self.options)
        return F.mT @ da


class _ByTokens(torch.autograd.Function):
    """A sequence that comes from the share before waits for its state; those that begin in this share wait for nobody,
    and where there are any, the next share depends on them alone.
    """

    @staticmethod
    def forward(ctx, q, k, v, gate, part: _Part):
        (seen, n, ends), state, T = part.share, part.state, q.shape[2]
        new = q, k, v, gate
        first, rest = _at(slice(0, n), *new), _at(slice(n, T), *new)
        k_past = _pass_on(part.group, k[:, :, T - state :], 1)[:, :, state - seen :]
        u_past = q.new_zeros(*q.shape[:2], seen, q.shape[3])
        F = packed = None
        own: Any = (None,) * 3
        if n == T:
            F, M, c, finish = part.open(*new, k_past, u_past)
        else:
            packed = None if len(ends) == 2 else torch.tensor(ends, dtype=torch.int32, device=q.device)
            own = part.forward(*rest, ends=packed)
            c = part.last_u(own[0], *rest)
            M, finish = c.new_zeros(*c.shape[:2], state, state), partial(part.forward, *first, k_past, u_past)
        maps = _gather(part.group, torch.cat([M, c], dim=-1))
        if n:
            u_past.copy_(_compose(maps[: dist.get_rank(part.group)])[:, :, state - seen :])
        carried = finish() if n else own
        ctx.part = part
        ctx.save_for_backward(maps[..., :state], *new, k_past, u_past, F, packed, *carried, *own)
        return carried[0] if n in (0, T) else torch.cat([carried[0], own[0]], dim=2)

    @staticmethod
    def backward(ctx, da):
        if torch.is_grad_enabled():
            raise RuntimeError("group: KA-attention over ranks has no second derivative")
        part, (M, q, k, v, gate, k_past, u_past, F, packed, *results) = ctx.part, ctx.saved_tensors
        (seen, n, _), state, T = part.share, part.state, q.shape[2]
        new = q, k, v, gate
        first, rest = _at(slice(0, n), *new), _at(slice(n, T), *new)
        carried, own = results[:3], results[3:]
        past = k_past, u_past, None
        grads: Gradients
        if n == T:
            b = part.answer(F, da, *new, k_past, u_past, carried[2])
        elif n:
            *grads, b = part.backward(None, da[:, :, :n], *first, *past, *carried)
        else:
            *grads, b = *(None,) * 4, torch.zeros_like(k_past), torch.zeros_like(u_past)
        b = _gather(part.group, pad(b.to(M.dtype), (0, 0, state - seen, 0)))
        after = slice(dist.get_rank(part.group) + 1, None)
        last = _compose(torch.cat([M[after].mT, b[after]], dim=-1).flip(0)) if len(M[after]) else None
        if n == T:
            grads = part.backward(last, da, *new, *past, *carried)
        else:
            others = part.backward(last, da[:, :, n:], *rest, None, None, packed, *own)
            grads = [*map(_join, grads[:4], others), *grads[4:]]
        dk, dk_past = grads[1], grads[4]
        dk[:, :, T - state :] += _pass_on(part.group, pad(dk_past, (0, 0, state - seen, 0)), -1)
        return *grads[:4], None


def _at(s: slice, q, k, v, gate) -> tuple[Any, Any, Any, Any]:
    return q[:, :, s], k[:, :, s], v[:, :, s], gate if gate is None else gate[:, :, s]


def _join(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None or y is None else torch.cat([x, y], dim=2)


def _compose(maps: Tensor) -> Tensor:
    """What maps (M | c), [n, …, state, state + D], make of a state of zeros, the first one first."""
    state = maps.shape[-2]
    while len(maps) > 1:  # neighbours become one map, (M₂ | c₂) ∘ (M₁ | c₁) = (M₂ M₁ | M₂ c₁ + c₂)
        paired, last = maps[: len(maps) // 2 * 2], maps[len(maps) // 2 * 2 :]
        both = paired[1::2, ..., :state] @ paired[::2]
        both[..., state:] += paired[1::2, ..., state:]
        maps = torch.cat([both, last]) if len(last) else both
    return maps[0, ..., state:]


def _gather(group: Group, x: Tensor) -> Tensor:
    """Everybody's x, [ranks, …]."""
    return _AllToAll.apply(x.expand(dist.get_world_size(group), *x.shape), group)


def _pass_on(group: Group, x: Tensor, by: int) -> Tensor:
    """x goes to the rank `by` further on; the like comes from the other side, or zeros."""
    rank, ranks, x = dist.get_rank(group), dist.get_world_size(group), x.contiguous()
    send, receive = ([x.numel() * (other == rank + way) for other in range(ranks)] for way in (by, -by))
    got = torch.empty_like(x) if any(receive) else torch.zeros_like(x)
    dist.all_to_all_single(got.view(-1)[: sum(receive)], x.view(-1)[: sum(send)], receive, send, group)
    return got


@torch.compiler.disable
def rows_before(group: Group, x: Tensor, count: int) -> Tensor:
    """The last `count` rows of x [B, T, C] in the share before, [B, count, C]; zeros where there is none."""
    if x.shape[1] < count:
        raise ValueError(f"group: each rank's share must hold {count} tokens at least, got {x.shape[1]}")
    return _PassOn.apply(x[:, x.shape[1] - count :], group, 1)


class _PassOn(torch.autograd.Function):
    """`_pass_on`; its gradient goes the other way."""

    @staticmethod
    def forward(ctx, x, group, by):
        ctx.group, ctx.by = group, by
        return _pass_on(group, x, by)

    @staticmethod
    def backward(ctx, grad):
        return _PassOn.apply(grad, ctx.group, -ctx.by), None, None


def share_heads(group: Group, q: Tensor, k: Tensor, window: int | None) -> bool:
    """Whether ranks exchange heads for tokens."""
    ranks = dist.get_world_size(group)
    return window is None or (window > q.shape[3] + 1 and q.shape[1] % ranks == k.shape[1] % ranks == 0)


def by_heads(group: Group, operator: Operator, q, k, v, gate=0.0, cu_seqlens=None) -> Tensor:
    """The same for calls that need all tokens, by processes that hold whole sequences of some heads."""
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
    return _tokens_for_heads(group, operator(q, k, v, gate=gate, cu_seqlens=cu_seqlens))


def _heads_for_tokens(group: Group, x: Tensor) -> Tensor:
    """[B, H, T / ranks, D] of this rank's tokens → [B, H / ranks, T, D] of this rank's heads."""
    ranks = dist.get_world_size(group)
    x = _AllToAll.apply(x.unflatten(1, (ranks, -1)).movedim(1, 0), group)  # [ranks, B, H / ranks, T / ranks, D]
    return x.movedim(0, 2).flatten(2, 3)


def _tokens_for_heads(group: Group, x: Tensor) -> Tensor:
    """The way back."""
    ranks = dist.get_world_size(group)
    x = _AllToAll.apply(x.unflatten(2, (ranks, -1)).movedim(2, 0), group)
    return x.movedim(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """Entry r of x [ranks, …] goes to rank r, and comes back as the entry of who sent it."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, got, ones = group, torch.empty_like(x, memory_format=torch.contiguous_format), [1] * len(x)
        dist.all_to_all_single(got, x.contiguous(), ones, ones, group)
        return got

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, ctx.group), None
