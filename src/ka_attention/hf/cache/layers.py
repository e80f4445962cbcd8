"""One layer of a growing KA cache, and one with a window."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ka_attention.hf.cache.room import Room
from ka_attention.hf.cache.state import KALayer, KAState

# What transformers' own layer with a window keeps and this one reads.
_OF_TRANSFORMERS = ("cumulative_length", "record_past", "sliding_window")


def _is_writable(x: Tensor) -> bool:
    return torch.is_inference_mode_enabled() or not x.is_inference()


class KADynamicLayer(KALayer, DynamicLayer):
    """Grows token by token in spare slots; by concatenation where tokens come in chunks or gradients are recorded.

    U of the last token takes V's place with the next token, or when somebody reads ``values``.
    """

    has_room = True
    keys: Any
    _values: Any
    _late: Any  # U that is not in its place yet

    def __init__(self, groups: int, **kwargs: Any) -> None:
        super().__init__(groups, **kwargs)
        self.room = Room()

    @property
    def values(self) -> Any:
        if (late := self._late) is not None:
            self._late, n = None, late.shape[2]
            if late.requires_grad or not _is_writable(self._values):  # autograd still needs the tensor that holds V
                self._values = torch.cat((self._values[:, :, :-n], late), dim=2)
            else:
                self._values[:, :, -n:].copy_(late)
        return self._values

    @values.setter
    def values(self, values: Any) -> None:
        self._values, self._late = values, None

    def take(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, KAState]:
        dtype, keys = key_states.dtype, self.keys
        # Under autocast rotary keys are float32 and values are not. A conversion to the same dtype is not free.
        value = value_states if value_states.dtype is dtype else value_states.to(dtype)
        n = key_states.shape[2]
        if not self.is_initialized or keys.numel() == 0:
            self.dtype, self.device, self.is_initialized = dtype, key_states.device, True
            self.keys, self.values = key_states.contiguous(), value
            self.pending = n
            return self.keys, KAState(self, self.keys, value, value)
        if self.has_room and self.is_step(key_states, keys):
            if not self.room.holds(keys, self._values):
                self.room.start(keys, self.values)
            self.keys, self._values = self.room.append(key_states, value, self._late)
            self._late = None
        else:
            stored = value if self.groups == 1 else value.repeat_interleave(self.groups, dim=1)
            late = self._late
            past = (self._values,) if late is None else (self._values[:, :, : -late.shape[2]], late)
            self.keys, self.values = torch.cat((keys, key_states), dim=2), torch.cat((*past, stored), dim=2)
        self.pending = n
        return self.keys, KAState(self, self.keys, self._values, value, is_step=n == 1)

    def is_step(self, key_states: Tensor, keys: Tensor) -> bool:
        """Whether one token comes to keys of its kind, and nobody asks for gradients or a graph."""
        return (
            key_states.shape[2] == 1
            and not torch.is_grad_enabled()
            and key_states.shape[0] == keys.shape[0]
            and key_states.dtype is keys.dtype
            and not is_dynamo_compiling()
        )

    def align(self, mask: Tensor | None, window: int | None, length: int) -> tuple[Tensor | None, int | None]:
        # The mask is made for the layer that sees most; every layer's keys end at the same token.
        return None if mask is None else mask[..., -length:], window

    def put(self, u: Tensor | None) -> None:
        past = self._values.shape[2] - self.pending
        if u is not None and u.dtype != self._values.dtype:
            u = u.to(self._values.dtype)
        if past <= 0:  # negative: a window is shorter than what is new. The memory is to be the cache's own.
            self.values = (self._values if u is None else u[:, :, -past:]).contiguous()
        else:
            self._late = u

    def reset(self) -> None:
        self.is_initialized = False  # dropped, not zeroed: transformers before 5.23 keeps the length of window layers
        self.room = Room(self.room.ring)
        super().reset()


class KAWindowLayer(KADynamicLayer, DynamicSlidingWindowLayer):
    """Keeps the last ``window - 1`` tokens, which decode in a ring; more, out of sight, while tokens may be taken back.

    Whoever reads ``keys`` or ``values`` finds the tokens in their order.
    """

    has_room = False  # a ring in its place
    _keys: Any = None
    _in_ring = False

    def __init__(self, groups: int, sliding_window: int) -> None:
        super().__init__(groups, sliding_window=sliding_window)
        if missing := [name for name in _OF_TRANSFORMERS if not hasattr(self, name)]:
            raise RuntimeError(
                f"transformers {transformers.__version__}: its window layers have no {', '.join(missing)}; "
                "they are unknown to this ka_attention"
            )
        self.kept = sliding_window - 1
        self.room = Room(sliding_window)

    @property
    def keys(self) -> Any:
        self._leave_ring()
        return self._keys

    @keys.setter
    def keys(self, keys: Any) -> None:
        self._leave_ring()
        self._keys = keys

    @property
    def values(self) -> Any:
        self._leave_ring()
        return KADynamicLayer.values.fget(self)  # type: ignore[attr-defined]

    @values.setter
    def values(self, values: Any) -> None:
        self._leave_ring()
        self._values, self._late = values, None

    def take(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, KAState]:
        n, keys = key_states.shape[2], self._keys
        if self.cumulative_length and not self.record_past and keys is not None and self.is_step(key_states, keys):
            room, value = self.room, value_states
            if value.dtype is not key_states.dtype:
                value = value.to(key_states.dtype)
            if not (self._in_ring and room.holds(keys, self._values)):
                self._leave_ring()
                room.start(last(self._keys, self.kept), last(self.values, self.kept))
                self._late = None
            self._keys, self._values = room.append(key_states, value, self._late)
            self._in_ring, self._late = True, None
            self.pending = n
            state = KAState(self, self._keys, self._values, value, is_step=True)
        else:
            _, state = super().take(key_states, value_states)
            if self.record_past:
                sight = self.kept + n
                state.keys, state.values = last(self._keys, sight), last(self._values, sight)
            else:
                state.keys, state.values = self._keys, self._values
                self._keys, self._values = last(self._keys, self.kept), last(self._values, self.kept)
                if n > self.kept:
                    self._keys = self._keys.contiguous()  # no view of more, which would stay until the next token
        self.cumulative_length += n
        return state.keys, state

    def align(self, mask: Tensor | None, window: int | None, length: int) -> tuple[Tensor | None, int | None]:
        mask, window = super().align(mask, window, length)
        if self._in_ring and (oldest := self.room.oldest()):
            if window is not None and window < length:  # narrower than the cache was made for
                seen = torch.arange(length, device=self._keys.device) >= length - window
                mask, window = (seen if mask is None else mask & seen).expand(1, 1, 1, -1), None
            mask = None if mask is None else mask.roll(oldest, -1)
        return mask, window

    def put(self, u: Tensor | None) -> None:
        if self._in_ring:
            self._late = u if u is None or u.dtype == self._values.dtype else u.to(self._values.dtype)
        else:
            super().put(u)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.kept == 0 and self.is_initialized:  # transformers' slices do not know a window of 1
            self.keys, self.values = last(self.keys, 0), last(self.values, 0)

    def reset(self) -> None:
        self._leave_ring()
        super().reset()

    def _leave_ring(self) -> None:
        """Put the last ``window - 1`` tokens in order again."""
        if self._in_ring:
            self._in_ring = False
            shown: Any = self._keys, self._values
            if oldest := self.room.oldest():
                shown = tuple(torch.cat((x[:, :, oldest:], x[:, :, :oldest]), 2) for x in shown)
            self._keys, self._values = (last(x, self.kept) for x in shown)


def last(x: Tensor, count: int) -> Tensor:
    """The last ``count`` tokens of x ``[B, H, T, D]``, or all where there are fewer."""
    return x[:, :, max(0, x.shape[2] - count) :]
