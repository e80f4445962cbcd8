"""Attention over many requests at once: K and U in the blocks of transformers' paged cache.

A token takes ``Hkv + Hq`` heads of D numbers, K and U, which the cache is asked to hold as ``Hkv + Hq`` heads of D/2
"keys" and as many of D/2 "values": so a page has the room for both, and attention divides it by itself. Where U is in
layers with windows alone, a page has the room of K and V, and holds fewer tokens there. Which blocks belong to whom and
when they are free stays transformers' own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import PagedAttentionCache

from ka_attention.hf.cache.state import KAState
from ka_attention.hf.heads import Heads
from ka_attention.hf.layer import Layer, Options
from ka_attention.ops import paged
from ka_attention.ops.api import expand_gate, repeat_heads
from ka_attention.ops.inputs import Past, Slots

FULL, SLIDING = "full_attention", "sliding_attention"
ARGUMENTS = ("cu_seq_lens_q", "read_index", "write_index")
LIKE_FLASH = "like flash"  # an attention that makes no masks and copies no cache: transformers leaves room for neither
SMALLEST = 4  # tokens of a page: transformers takes no smaller ones


def page_name(settings: Any) -> str:
    """Under which of its names transformers is told how many tokens a page has."""
    return "page_size" if "page_size" in type(settings).__dataclass_fields__ else "block_size"


def cache_config(config: Any, layers: list[Layer], windows: list[int | None], page: int) -> Any:
    """The configuration that transformers sizes a paged cache by, from a decoder's, its layers and their windows.

    Layers with a window w keep a ring of w − 1 tokens, w the widest, in whole pages of ``page`` tokens; the others keep
    all tokens. Blocks are alike in all layers: each has room for K and U, or, where the layers that keep all tokens are
    softmax layers and G w fits a page, G = Hq / Hkv, for K and V; then a page of a ring is ``page // G`` tokens.
    ``places`` are the layer that stands for each of the decoder's, and the part of its pages: `_together` shares them.
    ValueError for an odd head dimension.
    """
    heads = Heads.of(config)
    if heads.dim % 2:
        raise ValueError(f"head_dim: continuous batching stores halves of heads, got the odd {heads.dim}")
    sized = copy.copy(config)
    sized.__class__ = type(type(config).__name__, (type(config),), {"_attn_implementation": LIKE_FLASH})
    sized.layer_types = [FULL if window is None else SLIDING for window in windows]
    kept = max((window - 1 for window in windows if window is not None), default=0)
    of_all = [layer.is_ka for layer, window in zip(layers, windows, strict=True) if window is None]
    shared = page // (heads.query // heads.key)
    if of_all and not any(of_all) and kept <= shared:
        values, sized.sliding_window = heads.key, max(1, shared)
    else:
        values, sized.sliding_window = heads.query, max(1, -(-kept // page)) * page
    sized.num_key_value_heads, sized.head_dim = heads.key + values, heads.dim // 2
    sized.places = [(i, 0) for i in range(len(windows))]
    if page_name(ContinuousBatchingConfig()) == "block_size":
        _together(sized, kept, page)
    return sized


def _together(sized: Any, kept: int, page: int) -> None:
    """Let rings of several layers lie in one page, if they fit, so that as many layers have rings as keep all tokens.

    transformers 5.17 divides layers into groups of as many each, and makes lists of places for every group and batch.
    """
    ring = [kind == SLIDING for kind in sized.layer_types]
    count = ring.count(False)
    parts = -(-sum(ring) // max(1, count))
    if not count or not parts or sized.sliding_window > page or max(1, kept) > sized.sliding_window // parts:
        return
    sized.sliding_window //= parts
    sized.layer_types = [FULL] * count + [SLIDING] * count
    before = [sum(kind == ring[i] for kind in ring[:i]) for i in range(len(ring))]
    sized.places = [(count + n % count, n // count) if ring[i] else (n, 0) for i, n in enumerate(before)]


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

    One call of the operator, whatever the requests: steps of decoding, chunks of prompts, with pasts of any length. A
    layer with an adapter instead lets ``attend`` attend to one `KAState` after another, token by token. ``arguments``
    are those that transformers gives beside a paged cache. RuntimeError for a cache that was made for other settings.
    """
    place = pages.find(layer, arguments)
    ends = arguments["cu_seq_lens_q"]
    pool = pages.cache.pool_of[layer.index]
    k, v = pages.key.to(pool[0].dtype), pages.value.to(pool[0].dtype)
    past = Past(pool[0], pool[1], place.block_table, place.cache_seqlens)
    backend = "triton" if q.is_cuda else "blocked"
    if layer.has_adapter:
        out, u = _each(attend, module, layer, q, k, v, past, ends, options)
        paged.store(k, v, u, None, past, place.slots, False, backend)
        return out
    if options.dropout:
        raise ValueError(f"attention_dropout must be 0 to serve, got {options.dropout}")
    query, is_softmax = q.to(k.dtype), not layer.is_ka
    numbers: Any = {"scale": options.scale, "window": options.window, "softcap": options.softcap}
    gate, bounds = _gates(module, layer, query, v) if layer.is_ka else (None, paged.UNBOUNDED)
    a = paged.run(query, k, v, gate, past, ends, numbers, is_softmax, backend, bounds)
    paged.store(k, v, a, gate, past, place.slots, is_softmax, backend, bounds)
    return a.to(q.dtype).transpose(1, 2).contiguous()


def _gates(module: nn.Module, layer: Layer, q: Tensor, v: Tensor) -> tuple[Tensor | None, tuple[float, float]]:
    """The gates ``[1, Hq, N]`` of new tokens, None for 1, and the bounds that they are to be clamped to."""
    gate = layer.gate_of(module, v, in_bounds=False)
    learned: Any = module
    bounds = paged.UNBOUNDED if layer.gate is not None else learned.ka_gate.bounds
    if not isinstance(gate, Tensor):
        return expand_gate(gate, q), bounds
    return (gate.view(1, -1, 1).expand(q.shape[:3]) if gate.ndim == 1 else gate), bounds


def _each(
    attend: Callable[..., Tensor],
    module: nn.Module,
    layer: Layer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Past,
    ends: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """(A ``[1, N, Hq, D]``, U) of one request after the other."""
    out, u = torch.zeros_like(q.transpose(1, 2)), torch.zeros_like(repeat_heads(v, q))
    for own, (k_past, u_past) in past.after(ends, options.window, q.shape[1]):
        keys, values, slots = k[:, :, own], repeat_heads(v[:, :, own], q), _Slots(layer)
        if k_past is not None and u_past is not None:
            keys, values = torch.cat((k_past, keys), dim=2), torch.cat((u_past, values), dim=2)
        state = KAState(slots, keys, values, v[:, :, own])
        out[:, own] = attend(module, layer, q[:, :, own], keys, state, None, options._replace(ends=None), None)
        if slots.u is not None:
            u[:, :, own] = slots.u
    return out, u


class Place(NamedTuple):
    """Where a layer's tokens lie in this forward pass: pasts, as the operator takes them, and the new ones."""

    block_table: Tensor
    cache_seqlens: Tensor
    slots: Slots

    @classmethod
    def read(cls, group: Group, read: Tensor, write: Tensor, count: int, longest: int) -> Place:
        """From ``read``, the rows of `Group.row` one after another and padding, and transformers' places to ``write``.

        Shapes follow from shapes, and no number is looked at: so it may be part of a CUDA graph.
        """
        slots = Slots(write, group.stride, group.trash)
        if read.numel() == 0:  # no request has a past
            nothing = write.new_zeros(count, 0, dtype=torch.int32)
            return cls(nothing, nothing.sum(1, dtype=torch.int32), slots)
        if group.ring is not None:
            missing = count * (1 + group.ring) - len(read)
            read = F.pad(read, (0, missing)) if missing > 0 else read
            rows = read[: count * (1 + group.ring)].view(count, -1).int()
        else:
            begins = (read < 0).cumsum(0)
            first = torch.searchsorted(begins, torch.arange(1, count + 1, device=read.device))[:, None]
            # One request after the last begins beyond the end.
            at = first + torch.arange(1 - longest // -group.page, device=read.device)
            rows = read[at.clamp(max=len(read) - 1)].masked_fill(first >= len(read), 0).int()
        return cls(rows[:, 1:], (-1 - rows[:, 0]).clamp(min=0), slots)  # padding is positive


@dataclass(frozen=True)
class Group:
    """Layers whose tokens lie in the same blocks.

    index:  which of transformers' lists of places is theirs.
    tables: the blocks of each request.
    page:   tokens of a page.
    stride: transformers counts places, so many to a block, of which the first ``page`` are used here.
    ring:   pages of a ring, None where all tokens are kept.
    trash:  the place where transformers has tokens written that nobody will read.
    """

    index: int
    tables: dict[str, list[int]]
    page: int
    stride: int
    ring: int | None
    trash: int = -1

    def row(self, request: str, past: int) -> list[int]:
        """−1 − past, a mark that no block has, and the blocks where the past of a request lies; of rings always as many
        numbers.
        """
        table = self.tables.get(request, [])
        if self.ring is None:
            return [-1 - past, *table[: -(-past // self.page)]]
        return [-1 - past, *table, *[0] * (self.ring - len(table))]

    def longest(self, requests: int, tokens: int) -> int:
        """The length that rows of so many requests with pasts of so many tokens together have at most."""
        return requests * (1 + self.ring) if self.ring else 2 * requests + tokens // self.page


class Pages:
    """What a paged cache gives attention in V's place: K and V of all new tokens, ``[1, Hkv, N, D]``."""

    def __init__(self, cache: Any, key: Tensor, value: Tensor) -> None:
        self.cache, self.key, self.value = cache, key, value

    def find(self, layer: Layer, arguments: dict[str, Any]) -> Place:
        """Where the layer reads and writes, from the ``arguments`` of the attention function; once for each group."""
        if missing := [name for name in ARGUMENTS if arguments.get(name) is None]:
            raise TypeError(f"layer {layer.index}: the model did not hand {', '.join(missing)} on to its attention")
        if self.cache.ka is not layer.ka:
            raise RuntimeError(f"layer {layer.index}: ka_config was changed while requests are served, stop that first")
        cache = self.cache
        if layer.is_first:
            cache.places = {}
        group = cache.group_of[layer.index]
        if group.index not in cache.places:
            longest: Any = arguments.get("max_length_k", arguments.get("max_seqlen_k"))  # the latter before 5.18
            longest = max(longest.values()) if isinstance(longest, dict) else longest
            index, count = group.index, len(arguments["cu_seq_lens_q"]) - 1
            read, write = arguments["read_index"][index], arguments["write_index"][index]
            cache.places[index] = Place.read(group, read, write, count, longest)
        return cache.places[group.index]

    @classmethod
    def __torch_function__(cls, *args: Any) -> Any:
        raise RuntimeError('a KA cache needs a model with attn_implementation="ka", as ka_attention.hf.attach makes it')


class KAPagedCache(PagedAttentionCache):
    """transformers' paged cache, made of `cache_config`, for a model with the settings ``ka``.

    pool_of:  pages of K ``[blocks, Hkv, page, D]`` and of U ``[blocks, Hq, page, D]`` of each layer, in a softmax layer
              of V with Hkv heads.
    group_of: the group of each layer; groups are all of them.
    """

    ka: Any
    pool_of: dict[int, tuple[Tensor, Tensor]]
    group_of: dict[int, Group]
    groups: dict[int, Group]
    places: dict[int, Place]
    key_cache: list[Any]  # of transformers 5.17
    value_cache: list[Any]

    @classmethod
    def adopt(cls, cache: Any, layers: list[Layer], heads: Heads) -> None:
        """Make a cache of transformers one of these."""
        cache.__class__, cache.ka = cls, layers[0].ka
        cache.pool_of, cache.group_of, cache.groups = {}, {}, {}
        room, kept = cache.config.num_key_value_heads, cache.config.sliding_window
        for layer, (i, part) in zip(layers, cache.config.places, strict=True):
            if (owners := getattr(cache, "layer_to_allocator", None)) is not None:
                owner, index, page = owners[i], owners[i].index, owners[i].tokens_per_page
                stride = owner.block_physical_stride
                held = _divided(
                    owner.cache_tensor, owner.layer_indices.index(i), len(owner.layer_indices), heads, room, page
                )
            else:  # transformers 5.17
                index, j = cache.layer_index_to_group_indices[i]
                owner, page, stride = cache.group_cache_managers[index], cache.block_size, cache.block_size
                held = _replaced(cache, j, heads, room)
            ring = -(-kept // page) if cache.config.layer_types[i] == SLIDING else None
            tokens = page if ring is None else kept // ring
            cache.pool_of[layer.index] = pages_of(held, heads, layer.is_ka, tokens, part)
            trash = (owner if hasattr(owner, "write_trash_index") else cache).write_trash_index
            group = Group(index, owner.block_table, tokens, stride, ring, trash)
            cache.group_of[layer.index] = cache.groups.setdefault(index, group)

    def extend_read_and_write_indices(
        self, request_id: str, past_length: int, query_length: int, read_index: Any, write_index: Any
    ) -> None:
        """The places to write as transformers has them; to read, blocks in place of tokens."""
        super().extend_read_and_write_indices(request_id, past_length, query_length, None, write_index)
        if read_index is not None:
            for group in self.groups.values():
                read_index[group.index].extend(group.row(request_id, past_length))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Nothing yet: the attention function reads and writes, as U is known after it alone."""
        return key_states, Pages(self, key_states, value_states)

    def copy_cache(self, list_source_blocks: list[int], list_forked_blocks: list[int]) -> None:
        """Copy blocks of all layers; transformers 5.17 alone asks for it here."""
        for x in (*self.key_cache, *self.value_cache):
            x[list_forked_blocks] = x[list_source_blocks]


def pages_of(held: Any, heads: Heads, is_ka: bool, tokens: int, part: int = 0) -> tuple[Tensor, Tensor]:
    """Pages [blocks, Hkv, tokens, D] of K and [blocks, Hq, tokens, D] of U, or as K's of V, in a part of the room for
    them, [blocks, numbers].
    """
    size = tokens * heads.dim
    k, u = (x[:, part * size * count :] for x, count in zip(held, (heads.key, heads.query), strict=True))
    counts = heads.key, heads.query if is_ka else heads.key
    k, u = (x[:, : size * n].unflatten(1, (n, tokens, heads.dim)) for x, n in zip((k, u), counts, strict=True))
    return k, u


def _divided(held: Tensor, which: int, count: int, heads: Heads, room: int, page: int) -> tuple[Tensor, Tensor]:
    """Of every block the room for K and that for values of one layer, [blocks, numbers]; it holds ``count`` layers."""
    flat, size = held.view(-1), page * heads.dim
    of_layer = size * room
    blocks, first = len(flat) // (of_layer * count), flat.storage_offset() + which * of_layer
    k = flat.as_strided((blocks, heads.key * size), (of_layer * count, 1), first)
    return k, flat.as_strided((blocks, of_layer - heads.key * size), (of_layer * count, 1), first + heads.key * size)


def _replaced(cache: Any, j: int, heads: Heads, room: int) -> tuple[Tensor, Tensor]:
    """The same, in tensors of their own, in the place of two that are as large together."""
    for lists, count in ((cache.key_cache, heads.key), (cache.value_cache, room - heads.key)):
        if lists[j].ndim == 3:
            blocks, lists[j] = len(lists[j]) // cache.block_size, None  # its memory is needed
            size = count * cache.block_size * heads.dim
            lists[j] = torch.empty(blocks, size, dtype=cache.dtype, device=cache.device)
    return cache.key_cache[j], cache.value_cache[j]


class _Slots:
    """What a `KAState` commits U of the new tokens to."""

    u: Tensor | None = None

    def __init__(self, layer: Layer) -> None:
        self.ka = layer.ka

    def align(self, mask: Tensor | None, window: int | None, length: int) -> tuple[Tensor | None, int | None]:
        return mask, window

    def commit(self, u: Tensor | None) -> None:
        self.u = u
