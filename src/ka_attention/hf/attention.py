"""The attention function "ka" for transformers, its mask, and their registration."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ka_attention.hf.cache.layers import KADynamicLayer, KAState
from ka_attention.hf.config import KAConfig
from ka_attention.ops import cache_values, ka_attention, private
from ka_attention.ops.api import attend_one, repeat_heads

NAME = "ka"
_AS_IT_IS = nullcontext()

# Arguments with which some models change what attention computes. None of them has a meaning for KA-attention here.
_UNSUPPORTED = frozenset(
    {
        "s_aux",
        "sinks",
        "position_bias",
        "head_mask",
        "alibi",
        "cache",
        "indices",
        "block_indices",
        "score_mod",
        "output_attentions",
    }
)


def register_attention() -> None:
    """Make ``attn_implementation="ka"`` known to transformers. May be called again."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without a mask function every mask would be None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer of a transformers model, KA-attention where ``module.config.ka_config`` says so.

    Layers that are not KA layers, those with the fixed gate 0 and modules that are not causal (vision towers) run
    PyTorch's scaled_dot_product_attention. A KA layer with an adapter (``module.ka_adapter``: U = V + g (adapter(A) −
    V)) and several new tokens runs token by token, as the adapter stands inside the recurrence: exact, differentiable,
    slow.

    query ``[B, Hq, n, D]``, key and value ``[B, Hkv, S, D]`` (or the KAState of a KA cache) give ``[B, n, Hq, D]``.
    ValueError: an argument that KA-attention does not have. RuntimeError: a cache that does not fit, or a missing gate.
    """
    if not _UNSUPPORTED.isdisjoint(kwargs):
        _refuse_unsupported(module, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = None if attention_mask is None else _as_bool(attention_mask)
    layer_idx: Any = module.layer_idx
    ka = KAConfig.of(module.config)
    (_, heads, n, _), (_, key_heads, length, _) = query.shape, key.shape
    if (  # most steps of decoding, which take the processor longer to ask about than to compute: they skip the rest
        n == 1 < length
        and ka.is_plain
        and type(value) is KAState
        and type(layer := value.layer) is KADynamicLayer
        and layer.groups * key_heads == heads
        and mask is softcap is sliding_window is None
        and not dropout
        and "cu_seq_lens_q" not in kwargs
        and "ka_adapter" not in module._modules
        and not private.any_autocast()
    ):
        out = attend_one(query, key, value.values, None, scale)
        layer.commit(out)
        return out.transpose(1, 2).contiguous(), None
    is_ka = ka.caches_outputs(layer_idx)
    # A softmax layer's own window is in its mask; the operator is told too, because it can skip what lies beyond.
    window = ka.window_of(layer_idx, sliding_window if is_ka else None)

    # To ask about one kind of device takes the processor longer than all else here.
    autocast = private.any_autocast() and torch.is_autocast_enabled(query.device.type)
    state = value if isinstance(value, KAState) else None
    adapter = module._modules.get("ka_adapter")
    # The operator does not heed autocast, modules and PyTorch's own attention do.
    plain = not autocast or (is_ka and ka.gate == "fixed" and adapter is None and state is None)
    with _AS_IT_IS if plain else torch.autocast(query.device.type, enabled=False):
        if state is not None:
            key, value = state.keys, state.values
            length = key.shape[2]
            if state.layer.groups != (heads // key_heads if is_ka else 1):
                raise RuntimeError(f"layer {layer_idx}: this KA cache was made for another ka_config, make a new one")
            mask, window = state.layer.align(mask, window, length)
        else:
            if autocast:  # rotary embeddings leave queries and keys in float32; a cache has one dtype by itself
                dtype = torch.get_autocast_dtype(query.device.type)
                query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            if length != n and (is_ka or window is not None):
                raise RuntimeError(
                    f"layer {layer_idx} got {length} keys for {n} queries from a plain cache, which "
                    "does not hold what KA-attention reads: pass past_key_values=KACache(model.config), or generate "
                    "with a model from ka_attention.hf.attach"
                )
        packed = kwargs.get("cu_seq_lens_q")
        if packed is not None and length != n:
            raise ValueError(f"cu_seq_lens_q: packed sequences cannot continue a cache, got one of {length - n} tokens")
        if packed is not None and not (is_ka and adapter is None):  # the operator alone takes their ends
            mask = _band(_in_one_sequence(mask, packed, n), n, n, window, query.device)
        if not is_ka:
            if state is not None:
                state.commit()
            return _softmax(module, query, key, value, mask, scale, window, softcap, dropout)
        if dropout:
            raise ValueError(f"config.attention_dropout (GPT-2: attn_pdrop) must be 0 with KA-attention, got {dropout}")
        v = value if state is None else state.value
        gate = ka.gate_init if ka.gate == "fixed" else _learned_gate(module, ka, v)
        if adapter is None and ka.adapters and str(layer_idx) in ka.adapters:
            raise RuntimeError(
                f"ka_config has an adapter for layer {layer_idx}, which has none: make the model with "
                "ka_attention.hf.attach"
            )
        if n == 1:
            values = value if length > 1 else repeat_heads(value, query)  # a cache repeats what it keeps
            out = _one(query, key, values, mask, scale, window, softcap)
            read = out if adapter is None or state is None else adapter(out)
        elif adapter is None:
            past = length - n
            out = read = ka_attention(
                query,
                key[:, :, past:] if past else key,
                v,
                gate=gate,
                scale=scale,
                window=window,
                past=(key[:, :, :past], value[:, :, :past]) if past else None,
                attn_mask=mask if packed is None else None,  # the ends say the same
                cu_seqlens=packed,
                softcap=softcap,
            )
        else:
            mask = _band(mask, n, length, window, query.device)
            out, read = _token_by_token(query, key, value, v, mask, gate, adapter, scale, softcap)
        if state is not None:
            state.commit(read if not isinstance(gate, Tensor) and gate == 1 else cache_values(v, read, gate))
    return out.transpose(1, 2).contiguous(), None


def _refuse_unsupported(module: nn.Module, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError('output_attentions: attention "ka" returns no weights; ka_attention.ops.walk computes them')
    names = sorted(name for name in _UNSUPPORTED - {"output_attentions"} if kwargs.get(name) is not None)
    if names:
        raise ValueError(f"{type(module).__name__} passes {', '.join(names)}, which KA-attention does not support")


def _learned_gate(module: nn.Module, ka: KAConfig, v: Tensor) -> Tensor:
    gate = getattr(module, "ka_gate", None)
    if gate is None:
        raise RuntimeError(
            f"ka_config asks for a learned gate ({ka.gate!r}) and layer {module.layer_idx} has none: "
            "make the model with ka_attention.hf.attach"
        )
    return gate(v)


def _as_bool(mask: Tensor) -> Tensor:
    """An additive mask of zeros and minus infinities as a boolean one, True where attention is allowed."""
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not torch.compiler.is_compiling() and bool((~hidden & (mask != 0)).any()):
        raise ValueError("attention_mask: expected booleans, or 0 and -inf to be added, got other additive values")
    return ~hidden


def _band(mask: Tensor | None, n: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """The mask with causality and the window added, for ``n`` queries at the end of ``length`` keys."""
    distance = torch.arange(length - n, length, device=device)[:, None] - torch.arange(length, device=device)
    band = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return band[None, None] if mask is None else band & mask


def _in_one_sequence(mask: Tensor | None, ends: Tensor, n: int) -> Tensor:
    """The mask cut to pairs of tokens of one packed sequence; ``ends`` are 0, …, n."""
    sequence = torch.searchsorted(ends[1:], torch.arange(n, device=ends.device), right=True)
    same = (sequence[:, None] == sequence)[None, None]
    return same if mask is None else mask & same


def _softmax(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """Standard attention, on PyTorch's kernels unless the scores are capped."""
    n, length = q.shape[2], k.shape[2]
    if mask is None and 1 < n < length:  # the prefill of a static cache of transformers: causal from its first slot
        k, v, length = k[:, :, :n], v[:, :, :n], n
    if (window is not None and window < length) or (softcap is not None and mask is None):
        mask = _band(mask, n, length, window, q.device)
    if softcap is None:
        return sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scale)
    weights = F.dropout(_weights(q, k, mask, scale, softcap), dropout)
    return (weights @ repeat_heads(v, q).to(weights.dtype)).to(q.dtype).transpose(1, 2).contiguous(), None


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Softmax weights ``[B, Hq, n, S]`` in float32 or better; a row that may attend nothing is 0."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ repeat_heads(k, q).to(dtype).transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        return scores.softmax(-1)
    return scores.masked_fill(~mask, torch.finfo(dtype).min).softmax(-1) * mask


def _one(
    q: Tensor, k: Tensor, values: Tensor, mask: Tensor | None, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """KA-attention ``[B, Hq, 1, D]`` of one new token; the values ``[B, Hq, S, D]`` are U of the past and its own V."""
    if softcap is None:
        return attend_one(q, k, values, mask, scale, window)
    if window is not None:
        mask = _band(mask, 1, k.shape[2], window, q.device)
    weights = _weights(q, k, mask, scale, softcap)
    return (weights @ values.to(weights.dtype)).to(q.dtype)


def _token_by_token(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    v: Tensor,
    mask: Tensor,
    gate: float | Tensor,
    adapter: nn.Module,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(A, adapter(A)) of the new tokens, one after another, as each reads what the adapter made of those before."""
    n = q.shape[2]
    past = k.shape[2] - n
    weights = _weights(q, k, mask, scale, softcap)
    of_past = weights[..., :past] @ repeat_heads(values[:, :, :past], q).to(weights.dtype)
    v = repeat_heads(v, q)
    outputs: list[Tensor] = []
    adapted: list[Tensor] = []
    read: list[Tensor] = []
    for t in range(n):
        v_t = v[:, :, t : t + 1]
        seen = torch.cat([*read, v_t], dim=2).to(weights.dtype)  # U of the earlier tokens, V of this one
        a = (of_past[:, :, t : t + 1] + weights[:, :, t : t + 1, past : past + t + 1] @ seen).to(q.dtype)
        outputs.append(a)
        adapted.append(adapter(a))
        g = gate[..., t : t + 1] if isinstance(gate, Tensor) and gate.ndim == 3 else gate
        read.append(cache_values(v_t, adapted[-1], g))
    return torch.cat(outputs, dim=2), torch.cat(adapted, dim=2)
