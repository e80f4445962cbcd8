"""Buffers in which a KA cache decodes: a step writes its token there and copies no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Slots are made by so many at a time, or by up to an eighth of those in use where that is more.
SPARE = 32


class Room:
    """Keys and values of one layer with slots for more: growing, or a ring of as many slots as a window has tokens.

    Where keys and values have as many heads, they take turns in one buffer, of which one call writes a step. What a
    growing room handed out never changes: only the two tensors handed out last go on growing, any others move to a new
    buffer first. In a ring a token takes the slot of the one that leaves the window, so no mask is needed and nothing
    moves; what it hands out lasts until the next step.

    ring: the number of its slots; None for a growing room.
    """

    shown: tuple[Any, Any] = (None, None)
    buffer: Tensor | None  # of both, or None
    keys: Tensor
    values: Tensor
    at: int  # slot of the next token
    used: int
    slots: int
    is_inference: bool  # written in inference mode alone

    def __init__(self, ring: int | None = None) -> None:
        self.ring = ring

    def start(self, keys: Tensor, values: Tensor) -> None:
        """Move keys and values to a new buffer. A ring has a slot more than these are tokens."""
        self.shown = keys, values
        self.buffer = self.keys = self.values = None  # type: ignore[assignment]  # freed before more is taken
        B, H, end, D = keys.shape
        self.at = self.used = end
        # Strides depend on T alone: cuDNN plans its kernels for each length and stride it meets.
        step = max(SPARE, 1 << end.bit_length() >> 4)
        self.slots = slots = self.ring or (end // step + 1) * step
        if keys.shape == values.shape:
            self.buffer = keys.new_empty(B, H, 2 * slots, D)
            self.keys, self.values = self.buffer[:, :, ::2], self.buffer[:, :, 1::2]
        else:
            self.keys, self.values = (x.new_empty(B, x.shape[1], slots, x.shape[3]) for x in (keys, values))
        self.is_inference = self.keys.is_inference()
        self.keys[:, :, :end].copy_(keys)
        self.values[:, :, :end].copy_(values)

    def holds(self, keys: Any, values: Any) -> bool:
        """Whether these were handed out last and one more token can be written behind them."""
        return (
            keys is self.shown[0]
            and values is self.shown[1]
            and (self.ring is not None or self.at < self.slots)
            and not (self.is_inference and not torch.is_inference_mode_enabled())
        )

    def append(self, key: Tensor, value: Tensor, late: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values with those of one more token; ``late`` takes the place of the last value."""
        if self.at == self.slots:  # of a ring: on from its first slot
            self.at = 0
            if late is not None:
                self.values[:, :, -1:].copy_(late)
                late = None
        end = self.at
        self.at = T = end + 1
        self.used = used = max(self.used, T)
        B, H, _, D = key.shape
        # as_strided: narrow takes the processor half as long again
        if (buffer := self.buffer) is not None:
            row = self.slots * 2 * D
            step = [key, value] if late is None else [late, key, value]
            n = len(step)
            torch.cat(step, 2, out=buffer.as_strided((B, H, n, D), (H * row, row, D, 1), (2 * T - n) * D))
            size, stride = (B, H, used, D), (H * row, row, 2 * D, 1)
            self.shown = buffer.as_strided(size, stride, 0), buffer.as_strided(size, stride, D)
        else:
            keys, values = self.keys, self.values
            _, Hq, _, Dv = values.shape
            G, of_keys, of_values = Hq // H, keys.stride(), values.stride()
            keys.as_strided((B, H, 1, D), of_keys, end * D).copy_(key)
            value = value.expand(B, H, G, Dv)  # for each query head; tokens side by side are one longer line
            step = [value] if late is None else [late.view(B, H, G, Dv), value]
            n = len(step)
            batch, row, _, _ = of_values
            torch.cat(step, 3, out=values.as_strided((B, H, G, n * Dv), (batch, G * row, row, 1), (T - n) * Dv))
            self.shown = keys.as_strided((B, H, used, D), of_keys), values.as_strided((B, Hq, used, Dv), of_values)
        return self.shown

    def oldest(self) -> int:
        """The slot of the oldest token in sight: the tokens lie in order from there, and on from the first slot."""
        return self.at % self.slots if self.used == self.slots else 0
