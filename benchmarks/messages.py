"""Messages between processes, counted, and groups of which there is one process only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor


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
