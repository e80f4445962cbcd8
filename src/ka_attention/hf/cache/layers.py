"""One layer of a KA cache: growing, with a window, of fixed size; and how U reaches it.

A cache layer is updated before attention runs, when only V is known. So ``update()`` returns ``(K, KAState)``: the
attention function reads the past and the new V from the state, computes A, and calls ``state.commit(U)``, which takes
the place of V. All other life of a cache (crop, reorder, repeat, select, reset, several turns) is that of transformers'
own cache layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from ka_attention.ops import private

# Slots are made by so many at a time, or by up to an eighth of those in use where that is more.
SPARE = 32


class KAState:
    """One layer's tokens on their way from the cache to the attention function.

    keys, values: ``[B, Hkv, S, D]`` and ``[B, H, S, D]``, all tokens in sight: U of the past and V of the new ones,
                  which are the last ``n``; a single new token may sit in any slot. ``H`` is ``Hq`` in a KA layer, but
                  ``Hkv`` while there is no past, else ``Hkv``.
    value:        V of the new tokens, ``[B, Hkv, n, D]``.
    is_step:      one new token after others, of which all are in its sight.
    """

    __slots__ = ("is_step", "keys", "layer", "value", "values")

    def __init__(self, layer: Any, keys: Tensor, values: Tensor, value: Tensor, is_step: bool = False) -> None:
        self.layer, self.keys, self.values, self.value, self.is_step = layer, keys, values, value, is_step

    def is_step_in(self, window: int | None) -> bool:
        """Whether this is one new token that attends to all of ``keys``, in a model with a window of its own too."""
        return self.is_step and (window is None or window >= self.keys.shape[2])

    def commit(self, u: Tensor | None = None) -> None:
        """Store ``u``, ``[B, Hq, n, D]``, in the slots of the new tokens; None leaves their V there."""
        self.layer.commit(u)

    @classmethod
    def __torch_function__(cls, *args: Any) -> Any:
        raise RuntimeError('a KA cache needs a model with attn_implementation="ka", as ka_attention.hf.attach makes it')

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__torch_function__()  # another attention function takes this for a tensor


class _KALayer:
    """What both kinds of KA cache layers share.

    groups: query heads that share a key head, 1 where V is stored.
    ka:     the settings of the model for which the cache was made.
    """

    keys: Any  # None before the first tokens
    values: Any
    ka: Any = None

    def __init__(self, groups: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.groups = groups
        self.pending: Any = None

    def _refuse_to_begin(self) -> None:
        raise RuntimeError("the last update of this KA cache was never committed: its forward pass did not finish")

    def reset(self) -> None:
        self.pending = None
        super().reset()  # type: ignore[misc]


class _Room:
    """Keys and values with spare slots behind them: a step writes its token instead of copying all others.

    Where they have as many heads, they take turns in one buffer, of which one call writes a step. What was handed out
    never changes: only the two tensors handed out last go on growing, any others move to a new buffer first.
    """

    shown: tuple[Any, Any] = (None, None)
    buffer: Tensor | None  # of both, or None
    keys: Tensor
    values: Tensor
    end: int  # slots in use
    slots: int
    is_inference: bool  # written in inference mode alone

    def start(self, keys: Tensor, values: Tensor) -> None:
        """Move keys and values to a new buffer."""
        self.shown = keys, values
        self.buffer = self.keys = self.values = None  # type: ignore[assignment]  # freed before more is taken
        B, H, self.end, D = keys.shape
        # Strides depend on T alone: cuDNN plans its kernels for each length and stride it meets.
        step = max(SPARE, 1 << self.end.bit_length() >> 4)
        self.slots = slots = (self.end // step + 1) * step
        if keys.shape == values.shape:
            self.buffer = keys.new_empty(B, H, 2 * slots, D)
            self.keys, self.values = self.buffer[:, :, ::2], self.buffer[:, :, 1::2]
        else:
            self.keys, self.values = (x.new_empty(B, x.shape[1], slots, x.shape[3]) for x in (keys, values))
        self.is_inference = self.keys.is_inference()
        self.keys[:, :, : self.end].copy_(keys)
        self.values[:, :, : self.end].copy_(values)

    def append(self, key: Tensor, value: Tensor, late: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values with those of one more token; ``late`` takes the place of the last value."""
        end = self.end
        self.end = T = end + 1
        B, H, _, D = key.shape
        # as_strided: narrow takes the processor half as long again
        if (buffer := self.buffer) is not None:
            row = self.slots * 2 * D
            step = [key, value] if late is None else [late, key, value]
            n = len(step)
            torch.cat(step, 2, out=buffer.as_strided((B, H, n, D), (H * row, row, D, 1), (2 * T - n) * D))
            size, stride = (B, H, T, D), (H * row, row, 2 * D, 1)
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
            self.shown = keys.as_strided((B, H, T, D), of_keys), values.as_strided((B, Hq, T, Dv), of_values)
        return self.shown


def _is_writable(x: Tensor) -> bool:
    return torch.is_inference_mode_enabled() or not x.is_inference()


class KADynamicLayer(_KALayer, DynamicLayer):
    """Grows token by token in spare slots; by concatenation where tokens come in chunks or gradients are recorded.

    U of the last token takes V's place with the next token, or when somebody reads ``values``.
    """

    has_room = True
    keys: Any
    _values: Any
    _late: Any  # U that is not in its place yet

    def __init__(self, groups: int, **kwargs: Any) -> None:
        super().__init__(groups, **kwargs)
        self.room = _Room()

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

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        if self.pending is not None:
            self._refuse_to_begin()
        dtype, keys = key_states.dtype, self.keys
        # Under autocast rotary keys are float32 and values are not. A conversion to the same dtype is not free.
        value = value_states if value_states.dtype is dtype else value_states.to(dtype)
        batch, _, n, _ = key_states.shape
        self.pending = n
        if not self.is_initialized or keys.numel() == 0:
            self.dtype, self.device, self.is_initialized = dtype, key_states.device, True
            self.keys, self.values = key_states.contiguous(), value
            return self.keys, KAState(self, self.keys, value, value)
        if (
            n > 1
            or not self.has_room
            or torch.is_grad_enabled()
            or batch != keys.shape[0]
            or dtype is not keys.dtype
            or is_dynamo_compiling()
        ):
            stored = value if self.groups == 1 else value.repeat_interleave(self.groups, dim=1)
            late = self._late
            past = (self._values,) if late is None else (self._values[:, :, : -late.shape[2]], late)
            self.keys, self.values = torch.cat((keys, key_states), dim=2), torch.cat((*past, stored), dim=2)
        else:
            room, shown = self.room, self.room.shown
            if (
                keys is not shown[0]
                or self._values is not shown[1]
                or room.end == room.slots
                or (room.is_inference and not torch.is_inference_mode_enabled())
            ):
                room.start(keys, self.values)
            self.keys, self._values = room.append(key_states, value, self._late)
            self._late = None
        return self.keys, KAState(self, self.keys, self._values, value, is_step=n == 1 and self.has_room)

    def align(self, mask: Tensor | None, window: int | None, length: int) -> tuple[Tensor | None, int | None]:
        # The mask is made for the layer that sees most; every layer's keys end at the same token.
        return None if mask is None else mask[..., -length:], window

    def commit(self, u: Tensor | None) -> None:
        past, self.pending = self._values.shape[2] - self.pending, None
        if u is not None and u.dtype != self._values.dtype:
            u = u.to(self._values.dtype)
        if past <= 0:  # negative: a window is shorter than what is new. The memory is to be the cache's own.
            self.values = (self._values if u is None else u[:, :, -past:]).contiguous()
        else:
            self._late = u

    def reset(self) -> None:
        self.is_initialized = False  # dropped, not zeroed: transformers before 5.23 keeps the length of window layers
        self.room = _Room()
        super().reset()


class KAWindowLayer(KADynamicLayer, DynamicSlidingWindowLayer):
    """Keeps the last ``window - 1`` tokens; more of them, out of sight, while decoding may take tokens back."""

    has_room = False  # spare slots would take more than a short window does

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        keys, state = super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += key_states.shape[2]
        kept = self.sliding_window - 1
        if self.record_past:
            sight = kept + key_states.shape[2]
            state.keys, state.values = keys[:, :, -sight:], state.values[:, :, -sight:]
        else:
            self.keys, self.values = keys[:, :, -kept:], state.values[:, :, -kept:]
            if self.pending > kept:
                self.keys = self.keys.contiguous()  # not a view of more, which would stay until the next token
        return keys, state


class KAStaticLayer(_KALayer, StaticLayer):
    """A buffer of fixed size for ``torch.compile``; with a window it is a ring of ``window`` slots.

    Position p lives in slot ``p mod slots``. Masks cover all ``total`` positions and are read at the slots' positions.
    """

    def __init__(self, groups: int, max_cache_len: int, window: int | None) -> None:
        super().__init__(groups, max_cache_len=min(window or max_cache_len, max_cache_len))
        self.total = max_cache_len
        self.is_ring = self.max_cache_len < self.total

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if self.groups > 1:  # the parent gives the values the keys' number of heads
            self.values = self.values.new_zeros(
                self.batch_size, self.num_heads * self.groups, self.max_cache_len, self.v_head_dim
            )
            if not torch.compiler.is_compiling():
                private.mark_static_address(self.values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        if self.pending is not None:
            self._refuse_to_begin()
        value = value_states.to(key_states.dtype)
        stored = value if self.groups == 1 else value.repeat_interleave(self.groups, dim=1)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value)
        n = key_states.shape[2]
        positions = torch.arange(n, device=self.device) + self.cumulative_length
        self.pending = (key_states, stored, positions)
        if n == 1:
            self._write(self.keys, key_states, positions)
            self._write(self.values, stored, positions)
            keys, values = self.keys, self.values
        elif self._is_first(positions):
            keys, values = key_states, stored
        else:  # new tokens may overwrite slots that the first of them still read, so they are written on commit
            keys, values = torch.cat([self.keys, key_states], 2), torch.cat([self.values, stored], 2)
        self.cumulative_length.add_(n)
        return keys, KAState(self, keys, values, value)

    def align(self, mask: Tensor | None, window: int | None, length: int) -> tuple[Tensor | None, int | None]:
        positions = self.pending[2]
        n = positions.shape[0]
        if length == n > 1:  # nothing cached yet: an ordinary prefill
            return None if mask is None else mask[..., :n], window
        if n == 1 and mask is not None and not self.is_ring:
            return mask, None
        last = positions[0] if n == 1 else positions[0] - 1
        slots = torch.arange(self.max_cache_len, device=self.device)
        seen = last - (last - slots) % self.max_cache_len  # the position in each slot, negative where there is none yet
        if n > 1:
            seen = torch.cat([seen, positions])
        distance = positions[:, None] - seen
        allowed = (seen >= 0) & (distance >= 0)
        if window is not None:
            allowed = allowed & (distance < window)
        allowed = allowed[None, None]
        return (allowed if mask is None else allowed & mask.index_select(-1, seen.clamp(min=0))), None

    def commit(self, u: Tensor | None) -> None:
        (keys, stored, positions), self.pending = self.pending, None
        if keys.shape[2] > 1:
            self._write(self.keys, keys, positions)
        if keys.shape[2] > 1 or u is not None:
            self._write(self.values, stored if u is None else u.to(stored.dtype), positions)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.total, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, whose number comes negative as in transformers; nobody sees slots beyond."""
        if tokens_to_remove > 0 or (self.is_ring and tokens_to_remove):
            raise ValueError(
                f"crop: expected a negative number of tokens and no window, whose slots are overwritten (see KACache), "
                f"got {tokens_to_remove}"
            )
        self.cumulative_length.add_(tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]
            self.batch_size = self.keys.shape[0]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def _write(self, buffer: Tensor, new: Tensor, positions: Tensor) -> None:
        if self.is_ring:
            positions = positions[-self.max_cache_len :] % self.max_cache_len
            new = new[:, :, -self.max_cache_len :]
        buffer.index_copy_(2, positions, new)

    def _is_first(self, positions: Tensor) -> bool:
        # Looking at the position waits for the device. A compiled prefill does not look: the general way is right too.
        return not torch.compiler.is_compiling() and int(positions[0]) == 0
