"""What messages between processes cost and how large they are, also of groups of which there is one process only."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ka_attention import ka_attention

if TYPE_CHECKING:
    from benchmarks.ranks import Processes

Row = dict[str, Any]
WINDOW = 8


class OneOf:
    """A group of ``size`` processes of which there is one: messages go nowhere, and what it sends comes back."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = size // 2, size


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that this process sends to others for attention: all of it goes through ``all_to_all_single``.

    Within it groups may be `OneOf`.
    """
    total = [0]
    originals = {name: getattr(dist, name) for name in ("all_to_all_single", "get_rank", "get_world_size")}

    def counting(got: Tensor, x: Tensor, receive: list[int], send: list[int], group: Any) -> None:
        row = x[:1].nbytes if len(x) else 0
        total[0] += row * (sum(send) - send[dist.get_rank(group)])
        if not isinstance(group, OneOf):
            originals["all_to_all_single"](got, x, receive, send, group)
        elif len(got) == len(x):
            got.copy_(x)
        else:
            got.zero_()

    def of_group(name: str, attribute: str) -> Callable[..., int]:
        return lambda group=None: getattr(group, attribute) if isinstance(group, OneOf) else originals[name](group)

    changed = counting, of_group("get_rank", "rank"), of_group("get_world_size", "size")
    for name, function in zip(originals, changed, strict=True):
        setattr(dist, name, function)
    try:
        yield total
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def constants(own: Processes) -> Iterator[Row]:
    """What messages cost, and what a share costs an attention layer beside its own tokens."""
    size, many = own.size, 20
    for numbers in (256, 1 << (14 if own.tiny else 27)) if size > 1 else ():
        x = torch.ones(size, numbers // size, device=own.device, dtype=torch.bfloat16)
        got, ones = torch.empty_like(x), [1] * size

        def exchange(x: Tensor = x, got: Tensor = got, ones: list[int] = ones) -> None:
            for _ in range(many):
                dist.all_to_all_single(got, x, ones, ones, dist.group.WORLD)

        ms = statistics.median(own.timed(exchange, 3)) / many
        yield {"part": "messages", "ranks": size, "bytes": x[0].nbytes * (size - 1), "ms": ms}
    heads, D = (2, 16) if own.tiny else (8, 64)
    for tokens in (64, 128) if own.tiny else (16384, 65536, 524288):
        shape = 1, heads, tokens, D
        q, k, v = (torch.randn(shape, device=own.device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        gate = torch.full((heads,), 0.5, device=own.device, requires_grad=True)
        for ranks in (1, 2, 8):
            call = partial(_layer, q, k, v, gate, OneOf(ranks) if ranks > 1 else None)
            with counted() as sent:
                call()
            with counted():
                took = own.queued(call, 5)
            yield {"part": "a windowed layer", "ranks": ranks, "tokens": tokens, "ms": statistics.median(took),
                   "bytes_sent": sent[0]}  # fmt: skip


def _layer(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | float, group: Any, window: int | None = WINDOW) -> None:
    """Forward, the forward again that a recomputed layer takes, and backward."""
    with torch.no_grad():
        ka_attention(q, k, v, gate=gate, window=window, group=group)
    ka_attention(q, k, v, gate=gate, window=window, group=group).backward(torch.ones_like(q))


def bytes_sent(own: Processes) -> Iterator[Row]:
    """What one rank sends for a layer of the 47 M model in a step, counted; the same on every machine."""
    heads, D = (8, 4) if own.tiny else (8, 64)
    for ranks in (2, 8, 64):
        for share in (64, 1024):
            q, k, v = (torch.randn(1, heads, share, D, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
            row: Row = {"part": "bytes", "ranks": ranks, "tokens": ranks * share}
            for name, window in (("windowed", WINDOW), ("full", None)):
                if window or heads % ranks == 0:
                    with counted() as sent:
                        _layer(q, k, v, 0.5, OneOf(ranks), window)
                    row[name] = sent[0]
            yield row
