"""One layer of a KA cache of fixed size."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from ka_attention.hf.cache.state import KALayer, KAState
from ka_attention.ops import private


class KAStaticLayer(KALayer, StaticLayer):
    """A buffer of fixed size for ``torch.compile``; with a window it is a ring of ``window`` slots.

    Position p lives in slot ``p mod slots``. Masks cover ``total`` positions or more, the last ones of all, and are
    read at the slots' positions. A ring goes on for ever; a layer without one has room for ``total`` tokens.
    """

    def __init__(self, groups: int, max_cache_len: int, window: int | None) -> None:
        super().__init__(groups, max_cache_len=min(window or max_cache_len, max_cache_len))
        self.total = max_cache_len
        self.is_ring = window is not None and window <= self.total
        self.is_bound = False  # the first layer without a ring, which looks for all of them

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if self.groups > 1:  # the parent gives the values the keys' number of heads
            self.values = self.values.new_zeros(
                self.batch_size, self.num_heads * self.groups, self.max_cache_len, self.v_head_dim
            )
            if not torch.compiler.is_compiling():
                private.mark_static_address(self.values)

    def take(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, KAState]:
        value = value_states.to(key_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value)
        n = key_states.shape[2]
        if n == 1 and self.is_ring:  # attention and the store are one step (ops/ring.py)
            if (key_states.shape[0], key_states.dtype) != (self.keys.shape[0], self.keys.dtype):
                raise RuntimeError(
                    f"this KA cache holds {self.keys.shape[0]} texts in {self.keys.dtype}, got {key_states.shape[0]} "
                    f"in {key_states.dtype}"
                )
            self.cumulative_length.add_(1)
            self.pending = key_states, value, self.cumulative_length
            return self.keys, KAState(self, self.keys, self.values, value, is_ring_step=True)
        stored = value if self.groups == 1 else value.repeat_interleave(self.groups, dim=1)
        positions = torch.arange(n, device=self.device) + self.cumulative_length
        if self.is_bound:
            positions = self._bounded(positions)
        self.pending = (key_states, stored, positions)
        if n == 1:
            self._write(self.keys, key_states, positions)
            self._write(self.values, stored, positions)
            keys, values = self.keys, self.values
        elif self._starts(positions):
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
        if n == 1 and mask is not None:
            return mask, None
        last = positions[0] if n == 1 else positions[0] - 1
        slots = torch.arange(self.max_cache_len, device=self.device)
        seen = last - (last - slots) % self.max_cache_len  # the position in each slot, negative where there is none yet
        if n > 1:
            seen = torch.cat([seen, positions])
        distance = positions[:, None] - seen
        allowed = seen >= 0
        if mask is None:  # a mask is causal by itself, or means what it lets through
            allowed = allowed & (distance >= 0)
        if window is not None:
            allowed = allowed & (distance < window)
        allowed = allowed.expand(1, 1, n, -1)
        if mask is None:
            return allowed, None
        column = (seen - (positions[-1] + 1 - mask.shape[-1]).clamp(min=0)).clamp(min=0)
        return allowed & mask.index_select(-1, column), None

    def put(self, u: Tensor | None) -> None:
        keys, stored, positions = self.pending
        if positions is self.cumulative_length:  # a step in a ring, which has stored all but what an adapter made
            if u is not None:
                self._write(self.values, u.to(self.values.dtype), positions.view(1) - 1)
            return
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

    def _bounded(self, positions: Tensor) -> Tensor:
        """The positions, with an error for those beyond the buffer: on the device where looking would wait for it."""
        wrong = f"max_cache_len: this KA cache has room for {self.total} tokens, and not all layers have a window"
        if torch.compiler.is_compiling() or positions.is_cuda:
            return private.checked(positions, positions[-1] < self.total, wrong)
        if (length := int(positions[-1]) + 1) > self.total:
            raise ValueError(f"{wrong}, got {length}")
        return positions

    def _starts(self, positions: Tensor) -> bool:
        # Looking at the position waits for the device. A compiled prefill does not look: the general way is right too.
        return not torch.compiler.is_compiling() and int(positions[0]) == 0
