"""One decode step of one layer as a user has it: the cache takes the new token, attention reads it, KA stores U."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GPTNeoXConfig, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

from ka_attention.hf import KACache, KAConfig, KAStaticCache
from ka_attention.hf.attention import attention_forward


def step(kind: str, static: bool, past: Sequence[Tensor], new: Sequence[Tensor]) -> Callable[[], Tensor]:
    """A call that decodes one token after ``past`` = (keys, values or U), and can be repeated.

    kind:   "KV", softmax attention over keys and values, or "KA".
    static: a buffer of fixed size, with the mask that transformers makes for one, instead of a growing cache.
    past:   ``[B, H, P, D]`` each; new = (q, k, v), ``[B, H, 1, D]`` each. The result is ``[B, 1, H, D]``.
    """
    q, k, v = new
    _, H, P, D = past[0].shape
    config: Any = GPTNeoXConfig(hidden_size=H * D, num_attention_heads=H, num_hidden_layers=1, dtype=q.dtype)
    config.ka_config = KAConfig().to_dict()
    config._attn_implementation = "sdpa" if kind == "KV" else "ka"
    with torch.device("meta"):
        module = GPTNeoXAttention(config, layer_idx=0).eval()
    growing, fixed = (DynamicCache, StaticCache) if kind == "KV" else (KACache, KAStaticCache)
    cache: Any = fixed(config=config, max_cache_len=P + 1) if static else growing(config=config)
    mask = torch.ones(1, 1, 1, P + 1, dtype=torch.bool, device=q.device) if static else None
    attend: Any = sdpa_attention_forward if kind == "KV" else attention_forward
    for tokens in (slice(P - 1), slice(P - 1, P)):
        _, state = cache.update(*(x[:, :, tokens] for x in past), 0)
        if kind == "KA":
            state.commit(past[1][:, :, tokens])
    layer = cache.layers[0]
    parts = [layer]
    if kind == "KA" and not static:  # the next step writes U of the last token too; there nearly always is room
        layer.room.start(layer.keys, layer._values)
        parts.append(layer.room)
    before = [dict(vars(part)) for part in parts]

    def call() -> Tensor:
        if static:
            layer.cumulative_length.fill_(P)
        else:
            for part, state in zip(parts, before, strict=True):
                vars(part).update(state)
        keys_seen, values_seen = cache.update(k, v, 0)
        return attend(module, q, keys_seen, values_seen, mask, scaling=D**-0.5)[0]

    return call
