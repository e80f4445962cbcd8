"""How U reaches a KA cache.

A cache layer is updated before attention runs, when only V is known. So ``update()`` returns ``(K, KAState)``: the
attention function reads the past and the new V from the state, computes A, and calls ``state.commit(U)``, which takes
the place of V. All other life of a cache (crop, reorder, repeat, select, reset, several turns) is that of transformers'
own cache layers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class KAState:
    """One layer's tokens on their way from the cache to the attention function.

    keys, values: ``[B, Hkv, S, D]`` and ``[B, H, S, D]``, all tokens in sight: U of the past and V of the new ones,
                  which are the last ``n``; a single new token may sit in any slot. ``H`` is ``Hq`` in a KA layer, but
                  ``Hkv`` while there is no past, else ``Hkv``.
    value:        V of the new tokens, ``[B, Hkv, n, D]``.
    is_step:      one new token after others, of which all are in its sight.
    is_ring_step: one new token, and ``keys`` and ``values`` are a ring that it is not in yet.
    """

    __slots__ = ("is_ring_step", "is_step", "keys", "layer", "value", "values")

    def __init__(
        self,
        layer: Any,
        keys: Tensor,
        values: Tensor,
        value: Tensor,
        is_step: bool = False,
        is_ring_step: bool = False,
    ) -> None:
        self.layer, self.keys, self.values, self.value = layer, keys, values, value
        self.is_step, self.is_ring_step = is_step, is_ring_step

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


class Progress:
    """What the layers of one cache share: whether a forward pass has begun that did not come to its end."""

    unfinished = False


class KALayer:
    """What all KA cache layers share.

    groups:  query heads that share a key head, 1 where V is stored.
    ka:      the settings of the model for which the cache was made.
    pending: what the attention function has not committed yet.
    """

    keys: Any  # None before the first tokens
    values: Any
    ka: Any = None

    def __init__(self, groups: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.groups = groups
        self.pending: Any = None
        self.progress, self.is_first, self.is_last = Progress(), True, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Take the keys and values of new tokens; RuntimeError if the forward pass before did not reach its end."""
        if not self.is_first:
            return self.take(key_states, value_states)
        if self.progress.unfinished:
            raise RuntimeError(
                "this KA cache was never committed: the forward pass that filled it last did not finish, and some "
                "layers hold more tokens than others; reset() it or make a new one"
            )
        taken = self.take(key_states, value_states)  # what fails here, a wrong batch size for one, changes nothing
        self.progress.unfinished = True
        return taken

    def take(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, KAState]:
        raise NotImplementedError

    def commit(self, u: Tensor | None) -> None:
        """Put ``u`` in the place of the values that were taken last; None leaves them."""
        self.put(u)
        self.pending = None
        if self.is_last:
            self.progress.unfinished = False

    def put(self, u: Tensor | None) -> None:
        raise NotImplementedError

    def reset(self) -> None:
        self.pending = None
        self.progress.unfinished = False
        super().reset()  # type: ignore[misc]
