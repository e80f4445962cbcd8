"""Attention over many requests at once: K and U in the blocks of transformers' paged cache.

A token takes ``Hkv + Hq`` heads of D numbers, ``[K | U]``, which the cache is asked to hold as ``Hkv + Hq`` heads of
D/2 "keys" and as many of D/2 "values". Which blocks belong to whom, what is read and what is written stays
transformers' own.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching import PagedAttentionCache

from ka_attention.hf.cache.state import KAState
from ka_attention.hf.heads import Heads
from ka_attention.hf.layer import Layer, Options
from ka_attention.ops.api import repeat_heads

FULL, SLIDING = "full_attention", "sliding_attention"
ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "read_index", "write_index")
# From transformers 5.19 on the cache picks what it needs from the arguments of the attention function.
_TAKES_ARGUMENTS = "kwargs" in inspect.signature(PagedAttentionCache.update).parameters


def cache_config(config: Any, windows: list[int | None]) -> Any:
    """The configuration that transformers sizes a paged cache by, from a decoder's and the windows of its layers.

    Layers with a window keep a ring of the widest window, in whole pages; the others keep all tokens. Every layer has
    room for U, softmax layers too, as blocks are alike. ValueError for an odd head dimension.
    """
    heads = Heads.of(config)
    if heads.dim % 2:
        raise ValueError(f"head_dim: continuous batching stores halves of heads, got the odd {heads.dim}")
    sized = copy.copy(config)
    sized.num_key_value_heads, sized.head_dim = heads.key + heads.query, heads.dim // 2
    sized.layer_types = [FULL if window is None else SLIDING for window in windows]
    sized.sliding_window = max((2, *(w for w in windows if w is not None)))  # transformers 5.17 reads 1 as no window
    return sized


def attend_paged(
    attend: Callable[..., Tensor],
    module: nn.Module,
    layer: Layer,
    q: Tensor,
    pages: Pages,
    options: Options,
    arguments: dict[str, Any],
) -> Tensor:
    """Attention ``[1, N, Hq, D]`` of the new tokens of many requests, packed one after another, and U into the cache.

    ``attend`` attends to one `KAState`. Where no request has a past it is called once, for packed sequences. Else it
    is called once for all requests with one new token, as a batch whose past is padded on the left, and once for each
    longer chunk. ``arguments`` are those that transformers gives beside a paged cache. RuntimeError for a cache that
    was made for other settings.
    """
    pages.find(layer, arguments)
    k, v = pages.key, pages.value
    if pages.is_empty:
        out, u = _run(attend, module, layer, q, k, v, v, None, options._replace(ends=pages.ends))
        pages.write(u)
        return out
    options = options._replace(ends=None)
    stored = repeat_heads(v, q) if layer.is_ka else v
    keys, values = pages.read(stored)
    out, u = torch.empty_like(q.transpose(1, 2)), torch.empty_like(stored)
    plan = pages.plan()
    if plan.steps is not None:
        new, slots, mask = plan.steps
        batch = _rows(q, new), _rows(keys, slots), _rows(values, slots), _rows(v, new)
        out[0, new], step = _run(attend, module, layer, *batch, mask, options)
        u[0][:, new] = step.transpose(0, 1)
    for own, sight in plan.chunks:
        n, length = own.stop - own.start, sight.stop - sight.start
        # Without a mask a softmax layer takes more keys than queries for a static cache.
        mask = None if layer.is_ka or n == length else _causal(n, length, q.device)
        chunk = q[:, :, own], keys[:, :, sight], values[:, :, sight], v[:, :, own]
        out[:, own], u[:, :, own] = _run(attend, module, layer, *chunk, mask, options)
    pages.write(u)
    return out


class Plan:
    """Which calls of attention the requests of one forward pass take, from where they begin and end.

    steps:  of the requests with one new token, where it is, ``[R, 1]``, where the keys in its sight are, ``[R, S]``,
            padded on the left with the first, and a mask that leaves that out; None where there is no such request.
    chunks: (new tokens, keys in their sight) of each of the others.
    """

    def __init__(self, ends: Tensor, key_ends: Tensor) -> None:
        bounds = (pairwise(x) for x in (ends.tolist(), key_ends.tolist()))
        requests = [(slice(*own), slice(*sight)) for own, sight in zip(*bounds, strict=True)]
        self.chunks = [each for each in requests if each[0].stop - each[0].start > 1]
        self.steps: tuple[Tensor, Tensor, Tensor | None] | None = None
        places = [(own.start, sight.start, sight.stop) for own, sight in requests if own.stop - own.start == 1]
        if places:
            new, first, after = torch.tensor(places, device=ends.device).T[:, :, None]  # [R, 1] each
            lengths = [stop - start for _, start, stop in places]
            slots = after + torch.arange(-max(lengths), 0, device=ends.device)
            mask = None if min(lengths) == max(lengths) else (slots >= first)[:, None, None]
            self.steps = new, torch.maximum(slots, first), mask


class Pages:
    """What a paged cache gives attention in V's place: one layer's new tokens, and where those before them lie.

    key, value:     K and V of the new tokens of all requests, ``[1, Hkv, N, D]``.
    ends, key_ends: where each request's new tokens, and all that are in its sight, begin and end: 0, …, N and 0, …, S.
    is_empty:       no request has a past.
    """

    def __init__(self, cache: Any, key: Tensor, value: Tensor, index: int) -> None:
        self.cache, self.key, self.value, self.index = cache, key, value, index

    def find(self, layer: Layer, arguments: dict[str, Any]) -> None:
        """Look up in ``arguments``, those of the attention function, where the layer reads and writes."""
        if missing := [name for name in ARGUMENTS if arguments.get(name) is None]:
            raise TypeError(f"layer {layer.index}: the model did not hand {', '.join(missing)} on to its attention")
        if self.cache.ka is not layer.ka:
            raise RuntimeError(f"layer {layer.index}: ka_config was changed while requests are served, stop that first")
        self.arguments, cache = arguments, self.cache
        if layer.is_first:
            cache.plans = {}
        if places := getattr(cache, "layer_to_allocator", None):
            self.group, kind = places[self.index].index, places[self.index].layer_type
        else:  # transformers 5.17
            self.group, _ = cache.layer_index_to_group_indices[self.index]
            kind = FULL if cache.sliding_windows[self.index] == 1 else SLIDING
        self.slots = arguments["read_index"][self.group]
        self.is_empty = self.slots.numel() == 0
        key_ends = arguments["cu_seq_lens_k"]
        self.ends = arguments["cu_seq_lens_q"]
        self.key_ends = key_ends if isinstance(key_ends, Tensor) else key_ends[kind]  # layers of one kind, or of two
        self.kind = kind

    def plan(self) -> Plan:
        """What all layers of one kind do in this forward pass; made once, as it waits for the device."""
        if self.kind not in self.cache.plans:
            self.cache.plans[self.kind] = Plan(self.ends, self.key_ends)
        return self.cache.plans[self.kind]

    def read(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """K ``[1, Hkv, S, D]`` and U ``[1, H, S, D]`` of all requests, v ``[1, H, N, D]`` where they are new."""
        held, heads = self._exchange(v, self.slots), self.key.shape[1]
        return held[:, :heads].to(self.key.dtype), held[:, heads : heads + v.shape[1]].to(v.dtype)

    def write(self, u: Tensor) -> None:
        """Put K and U ``[1, H, N, D]`` of the new tokens (V in a softmax layer) into their slots."""
        self._exchange(u, self.slots[:0])

    def _exchange(self, u: Tensor, slots: Tensor) -> Tensor:
        k, cache = self.key, self.cache
        if room := cache.ka_heads - k.shape[1] - u.shape[1]:  # a softmax layer has fewer values
            u = torch.cat((u, u.new_zeros(()).expand(1, room, *u.shape[2:])), dim=1)
        first, second = torch.cat((k, u), dim=1).to(cache.dtype).chunk(2, dim=-1)
        where = {
            "read_index": [slots if i == self.group else x for i, x in enumerate(self.arguments["read_index"])],
            "write_index": self.arguments["write_index"],
        }
        if _TAKES_ARGUMENTS:
            where |= {name: self.arguments[name] for name in ("cu_seq_lens_k", "max_length_k")}
            first, second = cache.exchange(first, second, self.index, kwargs=where)
        else:
            found = cache.exchange(first, second, self.index, **where)
            first, second = (x.transpose(0, 1)[None] for x in found)  # it gives [S, H, D/2]
        return torch.cat((first, second), dim=-1)

    @classmethod
    def __torch_function__(cls, *args: Any) -> Any:
        raise RuntimeError('a KA cache needs a model with attn_implementation="ka", as ka_attention.hf.attach makes it')


class KAPagedCache(PagedAttentionCache):
    """transformers' paged cache, made of `cache_config`, for a model with the settings ``ka``."""

    ka: Any
    ka_heads: int
    plans: dict[str, Plan]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Nothing yet: the attention function reads and writes, as U is known after it alone."""
        return key_states, Pages(self, key_states, value_states, layer_idx)

    exchange = PagedAttentionCache.update


class _Slots:
    """What a `KAState` commits U of the new tokens to."""

    u: Tensor | None = None

    def __init__(self, layer: Layer) -> None:
        self.ka = layer.ka

    def align(self, mask: Tensor | None, window: int | None, length: int) -> tuple[Tensor | None, int | None]:
        return mask, window

    def commit(self, u: Tensor | None) -> None:
        self.u = u


def _run(
    attend: Callable[..., Tensor],
    module: nn.Module,
    layer: Layer,
    q: Tensor,
    k: Tensor,
    values: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """(A ``[B, n, Hq, D]``, U, which is V in a softmax layer)."""
    slots = _Slots(layer)
    out = attend(module, layer, q, k, KAState(slots, k, values, v), mask, options, None)
    return out, v if slots.u is None else slots.u


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """x ``[1, H, N, D]`` at tokens ``[R, S]`` as a batch, ``[R, H, S, D]``."""
    return x[0][:, at].transpose(0, 1)


def _causal(n: int, length: int, device: torch.device) -> Tensor:
    return torch.ones(1, 1, n, length, dtype=torch.bool, device=device).tril(length - n)
