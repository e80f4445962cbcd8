"""The KA cache: keys and, in the values' place, U = V + g (A − V), which later tokens read (docs/maths.md §4)."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ka_attention.hf.cache.layers import KADynamicLayer, KAWindowLayer
from ka_attention.hf.cache.state import Progress
from ka_attention.hf.cache.static import KAStaticLayer
from ka_attention.hf.cache.tails import ConvolvedLayer, ConvolvedStaticLayer, ConvolvedWindowLayer
from ka_attention.hf.config import KAConfig
from ka_attention.hf.heads import Heads


def layer_plan(config: Any) -> list[tuple[int, int | None]]:
    """For each layer of a model: (value heads stored per key head, window of tokens in sight or None for all).

    Raises ValueError for a model whose layers keep another kind of state.
    """
    text = config.get_text_config(decoder=True)
    ka = KAConfig.of(text)
    heads = Heads.of(text)
    groups = heads.query // heads.key
    plan = []
    for i, layer in enumerate(DynamicCache(config=text).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"model type {text.model_type!r}: layer {i} keeps a {type(layer).__name__}, no KA cache exists for it"
            )
        window = ka.window_of(i, getattr(layer, "sliding_window", None))
        plan.append((groups if ka.caches_outputs(i) else 1, window))
    return plan


class KACache(DynamicCache):
    """A growing cache of K and U for a model with attention "ka"; layers with a window keep ``window - 1`` tokens.

    ``KACache(model.config)``; layers that are not KA layers keep V. Per token and KA layer it holds ``Hkv + Hq`` heads.
    """

    def __init__(self, config: Any, offloading: bool = False) -> None:
        _refuse_offloading(offloading)
        full, narrow = (ConvolvedLayer, ConvolvedWindowLayer) if _convolves(config) else (KADynamicLayer, KAWindowLayer)
        layers: list[Any] = [
            full(groups) if window is None else narrow(groups, window) for groups, window in layer_plan(config)
        ]
        _join(layers, config)
        Cache.__init__(self, layers=layers)
        self.widest = max(layers, key=lambda layer: getattr(layer, "sliding_window", math.inf))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Sizes for the layer that sees most: layers may differ in their windows, a model makes one mask for all."""
        return self.widest.get_mask_sizes(query_length)


class KAStaticCache(StaticCache):
    """The KA cache in buffers of fixed size, for ``torch.compile``: ``KAStaticCache(model.config, max_cache_len)``.

    Where all layers have a window of ``max_cache_len`` at most it goes on without end. Otherwise more than
    ``max_cache_len`` tokens raise ValueError (on a GPU and in compiled code the device says so).
    """

    def __init__(self, config: Any, max_cache_len: int, offloading: bool = False) -> None:
        _refuse_offloading(offloading)
        if max_cache_len < 1:
            raise ValueError(f"max_cache_len: expected at least 1, got {max_cache_len}")
        kind = ConvolvedStaticLayer if _convolves(config) else KAStaticLayer
        layers: list[Any] = [kind(groups, max_cache_len, w) for groups, w in layer_plan(config)]
        _join(layers, config)
        bound = [layer for layer in layers if not layer.is_ring]
        for layer in bound[:1]:
            layer.is_bound = True
        self.total, self.widest = max_cache_len, 0 if bound else max(layer.max_cache_len for layer in layers)
        Cache.__init__(self, layers=layers)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Sizes for all layers: of rings that go on, a chunk may see more than there are slots."""
        return max(self.total, self.widest + query_length - 1 if self.widest else 0), 0


def _convolves(config: Any) -> bool:
    return KAConfig.of(config.get_text_config(decoder=True)).convolution is not None


def _join(layers: list[Any], config: Any) -> None:
    """Make new layers those of one cache, which knows its settings and whether a forward pass came to its end."""
    ka, progress = KAConfig.of(config.get_text_config(decoder=True)), Progress()
    for i, layer in enumerate(layers):
        layer.ka, layer.progress, layer.is_first, layer.is_last = ka, progress, i == 0, i == len(layers) - 1


def _refuse_offloading(offloading: bool) -> None:
    if offloading:
        raise ValueError("offloading: a KA cache cannot be offloaded, it would leave the device before U is stored")


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values, and of what convolutions read, that a cache holds now, measured from its tensors.

    A KACache that decodes has spare slots besides: at most for 32 tokens or for an eighth more, whichever is more, and
    in layers with a window for one token.
    """
    layers: list[Any] = cache.layers
    tensors = [
        t
        for layer in layers
        for t in (layer.keys, layer.values, *getattr(layer, "tails", {}).values())
        if t is not None
    ]
    return sum(t.numel() * t.element_size() for t in tensors)


def bytes_per_token(config: Any, kind: str = "ka", dtype: torch.dtype | None = None) -> int:
    """Bytes that one cached token takes over all layers: 2 Hkv heads a layer for "kv", Hkv + Hq in KA layers for "ka".

    ``dtype`` is that of the configuration by default. A layer with a window keeps ``window - 1`` tokens, others all.
    """
    if kind not in ("kv", "ka"):
        raise ValueError(f"kind: expected 'kv' or 'ka', got {kind!r}")
    text = config.get_text_config(decoder=True)
    heads = Heads.of(text)
    size = (dtype or getattr(text, "dtype", None) or torch.float32).itemsize
    stored = sum(heads.key * (1 + (groups if kind == "ka" else 1)) for groups, _ in layer_plan(config))
    return stored * heads.dim * size
