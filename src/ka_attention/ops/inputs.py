"""What a backend computes with, by name: eight tensors and three options (docs/architecture.md describes them)."""

from collections.abc import Iterator
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor


def repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    """x [B, Hkv, …] for every query head of q, [B, Hq, …]."""
    groups = q.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


class Tensors(NamedTuple):
    """The tensors of a call, in the order of a backend's arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    k_past: Tensor | None
    u_past: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Those that may have a gradient."""
        return self.q, self.k, self.v, self.gate, self.k_past, self.u_past

    def may_train(self) -> bool:
        """Whether a gradient may be asked for."""
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self.differentiable())


class Options(TypedDict):
    """The options of a call, keyword arguments of a backend."""

    scale: float
    window: int | None
    softcap: float | None


class Call(NamedTuple):
    """A call whose arguments are checked and complete."""

    tensors: Tensors
    options: Options


class Slots(NamedTuple):
    """Where new tokens go: to slot ``place % stride`` of page ``place // stride``, or, for ``nowhere``, nowhere."""

    place: Tensor  # int64 [T]
    stride: int
    nowhere: int


class Past(NamedTuple):
    """The pasts of N sequences, in pages of a pool (`ka_attention.ops.paged`)."""

    k_pages: Tensor
    u_pages: Tensor
    block_table: Tensor  # int32 [N, width]
    cache_seqlens: Tensor  # int32 [N]: tokens of each past

    def after(
        self, cu_seqlens: Tensor, window: int | None, heads: int, least: int = 1
    ) -> Iterator[tuple[slice, tuple[Tensor, Tensor] | tuple[None, None]]]:
        """Each sequence with at least so many new tokens: where they are, and what they see of its past, K
        [1, Hkv, L, D] and U [1, heads, L, D].
        """
        ends, S = cu_seqlens.tolist(), self.k_pages.shape[2]
        for n, (start, stop, length) in enumerate(zip(ends, ends[1:], self.cache_seqlens.tolist(), strict=False)):
            if stop - start < least:
                continue
            first = 0 if window is None else max(0, length - window + 1)
            if first == length:
                yield slice(start, stop), (None, None)
                continue
            p = torch.arange(first, length, device=self.k_pages.device)
            page = self.block_table[n, p // S % self.block_table.shape[1]]
            k, u = (x[page, :, p % S].transpose(0, 1)[None] for x in (self.k_pages, self.u_pages))
            yield slice(start, stop), (k, u.repeat_interleave(heads // u.shape[1], dim=1))
