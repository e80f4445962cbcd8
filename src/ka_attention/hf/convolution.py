"""Short convolutions on the queries, keys and values of attention layers: ``y_t = Σ_i w_i · x_{t−i}``, i < N."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, StaticCache
from transformers import initialization as init  # leaves parameters alone that were loaded from a file

from ka_attention.hf.attention import refuse_split_tokens
from ka_attention.hf.cache.tails import Convolved
from ka_attention.hf.heads import Heads
from ka_attention.hf.masks import as_bool
from ka_attention.nn import in_own_sequence, short_convolution

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
Before = Callable[[int, Tensor], Tensor]  # of a part and x
CACHES = ("past_key_values", "cache")  # what modules call their cache: until transformers 5.23, and after


class KAConvolution(nn.Module):
    """The convolutions of one layer: ``weight`` ``[N, C]``, C the channels of queries, keys and values, in this order.

    They start as those of `ka_attention.nn.KAAttention` do, with which hybrids were measured; `identity_` lets a model
    that was trained without them compute what it did.
    """

    def __init__(self, tokens: int, channels: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.tokens, self.channels = tokens, channels
        self.weight = nn.Parameter(torch.empty(tokens, sum(channels), dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.uniform_(self.weight, -(self.tokens**-0.5), self.tokens**-0.5)

    @torch.no_grad()
    def identity_(self) -> None:
        """Let every token be itself, in place."""
        self.weight.zero_()
        self.weight[0] = 1.0

    def forward(self, x: Tensor, part: int, before: Before | None, ends: Tensor | None, seen: Tensor | None) -> Tensor:
        """What one projection gives, x ``[B, n, C]``, convolved; ``part`` 0, 1, 2 is queries, keys, values.

        before: gives what was before x, ``[B, N − 1, C]``; zeros by default.
        ends:   those of packed sequences, 0, …, n.
        seen:   ``[N, B, n]``, whether a token sees the one i before it; who does not see itself is padding, zeros here.
        """
        if x.ndim != 3:
            raise ValueError(f"convolution: expected what a projection gives as [B, n, C], got {list(x.shape)}")
        if seen is not None:
            x = torch.where(seen[0, :, :, None], x, 0)
        past = None if before is None else before(part, x)
        return short_convolution(x, self.weight.split(self.channels, 1)[part], past, ends, seen)


def make_convolution(module: Any, text: Any, tokens: int) -> KAConvolution:
    """The convolutions for an attention module of a model with the configuration ``text``, in the dtype of its weights.

    ValueError for a module without a projection for each of queries, keys and values, or that is called otherwise than
    is known here, and for a model with a window of its own narrower than a convolution.
    """
    heads, own = Heads.of(text), getattr(text, "sliding_window", None)
    channels = tuple(number * heads.dim for number in (heads.query, heads.key, heads.key))
    found = tuple(getattr(getattr(module, name, None), "out_features", None) for name in PROJECTIONS)
    if found != channels:
        raise ValueError(
            f"convolution: {type(module).__name__} needs {', '.join(PROJECTIONS)} of {channels} channels, has {found}"
        )
    names = inspect.signature(module.forward).parameters
    if not {"hidden_states", "attention_mask"} <= names.keys() or names.keys().isdisjoint(CACHES):
        raise ValueError(f"convolution: {type(module).__name__} takes its mask or cache by another name")
    if own is not None and own < tokens:
        raise ValueError(f"convolution: {tokens} tokens are more than the model's own window of {own}")
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    return KAConvolution(tokens, channels, dtype)


def hook_convolution(module: Any) -> None:
    """Let an attention module with convolutions, ``module.ka_convolution``, convolve what its projections give.

    That is what stands in their place, also later: the whole of a projection and an adapter around it.
    A hook before the module tells each projection what its convolution reads, as ``ka_reading``, which the hook after
    the projection takes away; one after the module does where the call failed in between.
    """
    module.register_forward_pre_hook(_tell, with_kwargs=True)
    module.register_forward_hook(_forget, always_call=True)
    for projection in _projections(module):
        projection.ka_reading = None
        projection.register_forward_hook(_convolve)


def remove_convolution(module: Any) -> None:
    """Take a module's convolutions away, and the hooks."""
    if "ka_convolution" not in module._modules:
        return
    del module.ka_convolution
    for each in module.modules():
        for hooks in (each._forward_pre_hooks, each._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_tell, _forget, _convolve)]:
                del hooks[key]
                for flags in (each._forward_pre_hooks_with_kwargs, each._forward_hooks_always_called):
                    flags.pop(key, None)
        each.__dict__.pop("ka_reading", None)


def _projections(module: Any) -> list[Any]:
    return [getattr(module, name) for name in PROJECTIONS]


def _tell(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    layer = module.__dict__.get("ka_layer")
    if layer is None or layer.ka.convolution is None:
        return
    _refuse(module, args)
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    reading = (_of_share if layer.group is not None else _of_text)(module, layer, x, kwargs)
    for part, projection in enumerate(_projections(module)):
        if _convolve not in projection._forward_hooks.values():  # it took another's place since, as adapters of PEFT do
            projection.register_forward_hook(_convolve)
        projection.ka_reading = partial(module.ka_convolution, part=part, **reading)


def _of_text(module: Any, layer: Any, x: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `KAConvolution` reads beside x: a cache, and what the mask lets a token see."""
    cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
    n, tails = x.shape[1], _tails(module, cache)
    mask, seen = kwargs.get("attention_mask"), None
    if mask is not None:
        if mask.ndim != 4 or mask.shape[1:3] != (1, n):
            raise ValueError(f"attention_mask: convolutions of {n} tokens need [B, 1, {n}, S], got {list(mask.shape)}")
        first = mask.shape[3] - n if tails is None else tails.column(n, mask.shape[3])
        seen = seen_before(as_bool(mask)[:, 0], first, layer.ka.convolution)
    return {"before": None if tails is None else tails.past, "ends": kwargs.get("cu_seq_lens_q"), "seen": seen}


def _of_share(module: Any, layer: Any, x: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same for a share of a text: the end of the share before, and the ends of sequences in the whole text."""
    from ka_attention.ops import ranks  # a PyTorch may be built without collectives

    count, n, ends = layer.ka.convolution, x.shape[1], kwargs.get("cu_seq_lens_q")
    first = n * ranks.dist.get_rank(layer.group)
    seen = None if ends is None else in_own_sequence(ends, first, n, count)
    return {"before": lambda _, y: ranks.rows_before(layer.group, y, count - 1), "ends": None, "seen": seen}


def _convolve(projection: Any, args: tuple[Any, ...], x: Tensor) -> Tensor:
    reading, projection.ka_reading = projection.ka_reading, None
    return x if reading is None else reading(x)


def _forget(module: Any, *_: Any) -> None:
    for projection in _projections(module):
        projection.ka_reading = None


def _refuse(module: Any, args: tuple[Any, ...]) -> None:
    if len(args) > 1:
        raise ValueError(f"convolution: {type(module).__name__} was given its mask or cache by position, not by name")
    refuse_split_tokens()


def _tails(module: Any, cache: Any) -> Convolved | None:
    """The layer of a KA cache that keeps what is convolved; an empty cache of another kind may be filled once."""
    if cache is None:
        return None
    if not isinstance(cache, Cache):
        raise ValueError("cache: continuous batching does not hold what convolutions read, use generate")
    i = module.layer_idx
    layer = cache.layers[i] if i < len(cache.layers) else None
    if isinstance(layer, Convolved):
        return layer
    if isinstance(cache, StaticCache) or cache.get_seq_length(i):
        raise RuntimeError(
            f"past_key_values: layer {i} got a {type(cache).__name__} that does not hold what convolutions read: pass "
            "past_key_values=KACache(model.config), or generate with a model from ka_attention.hf.attach"
        )
    return None


def seen_before(mask: Tensor, first: int | Tensor, count: int) -> Tensor:
    """Whether new tokens see the one i before them, i < ``count``: ``[count, B, n]`` of a mask ``[B, n, S]``.

    ``first`` is the column of the first new token. What lies before all columns counts as seen: a cache has zeros for
    padding there.
    """
    n = mask.shape[1]
    tokens, back = torch.arange(n, device=mask.device), torch.arange(count, device=mask.device)
    columns = tokens[:, None] + first - back
    seen = mask.gather(2, columns.clamp(min=0).expand(mask.shape[0], -1, -1)) | (columns < 0)
    return seen.permute(2, 0, 1)
