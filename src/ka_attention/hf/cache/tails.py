"""Layers of KA caches that also keep what convolutions of later tokens read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ka_attention.hf.cache.layers import KADynamicLayer, KAWindowLayer
from ka_attention.hf.cache.static import KAStaticLayer
from ka_attention.nn import carried
from ka_attention.ops import private


class Convolved:
    """In front of a cache layer of a model with convolutions of N tokens (``KAConfig.convolution``).

    tails:  of queries, keys and values (0, 1, 2), ``[B, N - 1, C]`` each: what the projections gave of the last tokens,
            zeros for padding and before the first. Empty before the first tokens. With ``record_past`` of more tokens,
            which may be taken back.
    coming: the same with the tokens of a forward pass that this layer has not committed.
    """

    ka: Any
    tails: dict[int, Tensor] = {}  # noqa: RUF012 (never changed in place)
    coming: dict[int, Tensor] = {}  # noqa: RUF012
    record_past = False

    def past(self, part: int, x: Tensor) -> Tensor:
        """What was before x ``[B, n, C]``, ``[B, N - 1, C]``; x is kept with it."""
        count = self.ka.convolution - 1
        tail = self.tails[part] if self.tails else x.new_zeros(x.shape[0], count, x.shape[2])
        kept = torch.cat((tail, x), 1) if self.record_past else carried(tail, x, count + 1)
        self.coming = {**self.coming, part: kept}
        return tail[:, -count:]

    def column(self, n: int, columns: int) -> int | Tensor:
        """Where the first of ``n`` new tokens stands in a mask of so many columns."""
        return columns - n

    def commit(self, u: Tensor | None) -> None:
        if len(self.coming) < 3:
            raise RuntimeError("this KA cache got no queries, keys and values that were convolved, see KAConfig")
        super().commit(u)  # type: ignore[misc]
        self.keep()
        self.coming = {}

    def keep(self) -> None:
        self.tails = self.coming

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; RuntimeError for more than came since ``activate_past_recording``."""
        taken, count = max(0, -tokens_to_remove), self.ka.convolution - 1
        spare = self.tails[0].shape[1] - count if self.tails else taken
        if taken > spare:
            raise RuntimeError(
                f"crop: what convolutions read before them is kept for {spare} tokens, got {taken}; call "
                "activate_past_recording() of a KACache before the tokens that may be taken back"
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if spare:
            self.tails = {i: x[:, spare - taken :][:, :count].clone() for i, x in self.tails.items()}

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.tails = self.coming = {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.choose(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.choose(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.tails:
            self.batch_select_indices(torch.arange(self.tails[0].shape[0]).repeat_interleave(repeats))

    def choose(self, rows: Tensor) -> None:
        self.tails = {i: x[rows.to(x.device)] for i, x in self.tails.items()}


class ConvolvedLayer(Convolved, KADynamicLayer):
    def activate_past_recording(self) -> None:
        self.record_past = True


class ConvolvedWindowLayer(Convolved, KAWindowLayer):
    pass


class ConvolvedStaticLayer(Convolved, KAStaticLayer):
    """Its tails stay where they are, for graphs that were made with them."""

    def column(self, n: int, columns: int) -> Tensor:
        first = self.cumulative_length
        return first - (first + n - columns).clamp(min=0)

    def keep(self) -> None:
        if not self.tails:
            self.tails = {i: torch.zeros_like(x) for i, x in self.coming.items()}
            if not torch.compiler.is_compiling():
                for x in self.tails.values():
                    private.mark_static_address(x)
        for i, x in self.tails.items():
            x.copy_(self.coming[i])

    def reset(self) -> None:
        tails = self.tails
        super().reset()
        self.tails = tails
        for x in tails.values():
            x.zero_()
