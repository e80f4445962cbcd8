"""The attention function "ka" for transformers, and its registration."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ka_attention.hf.cache.state import KAState
from ka_attention.hf.layer import Layer, Options
from ka_attention.hf.masks import as_bool, band, in_one_sequence, ka_mask, refuse_future, refuse_holes
from ka_attention.hf.paged import Pages, attend_paged
from ka_attention.hf.ranks import attend_share
from ka_attention.ops import cache_values, ka_attention, private
from ka_attention.ops.api import attend_one, repeat_heads
from ka_attention.ops.reference import softmax
from ka_attention.ops.ring import ring_step

NAME = "ka"
_AS_IT_IS = nullcontext()

# Softmax attention in a window: the operator computes what is in sight, scaled_dot_product_attention with a mask all
# there is, which is faster for fewer tokens than these and for windows of more than a quarter of them.
SHORT = 256

# Arguments with which some models change what attention computes. None of them has a meaning for KA-attention here.
_UNSUPPORTED = frozenset(
    {
        "s_aux",
        "sinks",
        "position_bias",
        "head_mask",
        "alibi",
        "indices",
        "block_indices",
        "score_mod",
        "output_attentions",
    }
)


def register_attention() -> None:
    """Make ``attn_implementation="ka"`` known to transformers. May be called again."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, ka_mask)  # without a mask function every mask would be None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    ka_output_gate: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer of a transformers model, KA-attention where ``module.config.ka_config`` says so.

    Layers that are not KA layers, those with the fixed gate 0 and modules that are not causal (vision towers) run
    PyTorch's scaled_dot_product_attention. A KA layer with an adapter (``module.ka_adapter``: U = V + g (adapter(A) −
    V)) and several new tokens runs token by token, as the adapter stands inside the recurrence: exact, differentiable,
    slow.

    query ``[B, Hq, n, D]``, key and value ``[B, Hkv, S, D]`` (or the KAState of a KA cache) give ``[B, n, Hq, D]``,
    multiplied by ``ka_output_gate`` ``[B, n, Hq D]`` where there is one. ``cache`` is a paged cache. The first seven
    arguments stand where they do in transformers' own functions. ValueError: an argument that KA-attention does not
    have. RuntimeError: a cache that does not fit, a missing gate, or a ``ka_config`` that was changed behind the
    model's back.
    """
    if not _UNSUPPORTED.isdisjoint(kwargs):
        _refuse_unsupported(module, kwargs)
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        _refuse_both_ways(module)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False, **kwargs
        )
    layer = module.__dict__.get("ka_layer") or Layer.of(module)
    if layer.is_first:
        layer.check(module.config)
    if cache is not None:  # transformers before 5.24 leaves this to attention functions
        value = cache.update(key, value, module.layer_idx, kwargs)[1]
    pages = value if type(value) is Pages else None
    state = value if type(value) is KAState else None
    if state is not None and state.layer.ka is not layer.ka:
        _check_cache(state, layer)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # To ask about autocast on one kind of device takes the processor longer than all else here.
    autocast = private.any_autocast() and torch.is_autocast_enabled(query.device.type)
    is_plain = attention_mask is softcap is cu_seq_lens_q is None and not (layer.has_adapter or dropout or autocast)
    if is_plain and state is not None and state.is_step_in(sliding_window):
        out = _decode_step(module, layer, query, state, scale)
    else:
        window = layer.window
        # A softmax layer's own window is in its mask, which continuous batching and shares of texts have none of; nor
        # does the operator read that of packed sequences.
        has_no_mask = pages is not None or layer.group is not None or (cu_seq_lens_q is not None and window is not None)
        if (layer.is_ka or has_no_mask) and sliding_window is not None:
            window = sliding_window if window is None else min(window, sliding_window)
        options = Options(scale, window, softcap, dropout, cu_seq_lens_q)
        with torch.autocast(query.device.type, enabled=False) if autocast else _AS_IT_IS:
            dtype = torch.get_autocast_dtype(query.device.type) if autocast else None
            if pages is not None:
                out = attend_paged(
                    _attend, module, layer, query, pages, options, {**kwargs, "cu_seq_lens_q": cu_seq_lens_q}
                )
            elif state is not None and state.is_ring_step and layer.group is None:
                out = _ring_step(module, layer, query, state, attention_mask, options)
            else:
                attend = _attend if layer.group is None else attend_share
                out = attend(
                    module, layer, query, key, value if state is None else state, attention_mask, options, dtype
                )
    if layer.gates_output:
        if ka_output_gate is None:
            raise RuntimeError(f"layer {layer.index} got no output gate: make the model with ka_attention.hf.attach")
        out = out * ka_output_gate.view_as(out)
    return out, None


def _decode_step(module: nn.Module, layer: Layer, q: Tensor, state: KAState, scale: float) -> Tensor:
    """One new token of a plain layer, whose cache holds what it sees and no more. Most steps of decoding are such."""
    if not layer.is_ka:
        state.layer.commit(None)
        return sdpa_attention_forward(module, q, state.keys, state.values, None, scaling=scale)[0]
    out = attend_one(q, state.keys, state.values, None, scale)
    gated = layer.gate != 1
    state.layer.commit(cache_values(state.value, out, layer.gate_of(module, state.value)) if gated else out)
    return out.transpose(1, 2).contiguous()


def _ring_step(
    module: nn.Module, layer: Layer, q: Tensor, state: KAState, mask: Tensor | None, options: Options
) -> Tensor:
    """One new token of a layer whose past lies in a ring, ``[B, 1, Hq, D]``. A gate of 0 leaves an adapter V's slot."""
    _refuse_dropout(options)
    if options.ends is not None:
        raise ValueError("cu_seq_lens_q: packed sequences cannot continue a cache, got a token for a ring of slots")
    adapter = _adapter_of(module, layer)
    key, v, count = state.layer.pending
    gate = layer.gate_of(module, v, in_bounds=False) if layer.is_ka and adapter is None else 0.0
    out = ring_step(
        q,
        key,
        v,
        (state.keys, state.values),
        count,
        gate=gate,
        bounds=layer.ka.gate_range,
        window=min(options.window or state.keys.shape[2], state.keys.shape[2]),
        mask=None if mask is None else as_bool(mask),
        scale=options.scale,
        softcap=options.softcap,
    )
    state.commit(None if adapter is None else cache_values(v, adapter(out), layer.gate_of(module, v)))
    return out.transpose(1, 2).contiguous()


def _attend(
    module: nn.Module,
    layer: Layer,
    q: Tensor,
    k: Tensor,
    value: Any,
    raw_mask: Tensor | None,
    options: Options,
    dtype: torch.dtype | None,
) -> Tensor:
    """Attention of any new tokens, ``[B, n, Hq, D]``; in ``dtype`` without a cache, which has one of its own."""
    n, length = q.shape[2], k.shape[2]
    mask = None if raw_mask is None else as_bool(raw_mask)
    state = value if type(value) is KAState else None
    if state is not None:
        k, values, v = state.keys, state.values, state.value
        length = k.shape[2]
        mask, window = state.layer.align(mask, options.window, length)
        if window != options.window:
            options = options._replace(window=window)
    else:
        if dtype is not None:  # rotary embeddings leave queries and keys in float32
            q, k, value = q.to(dtype), k.to(dtype), value.to(dtype)
        values = v = value
        if length != n and (layer.is_ka or options.window is not None):
            raise RuntimeError(
                f"layer {layer.index} got {length} keys for {n} queries from a plain cache, which "
                "does not hold what KA-attention reads: pass past_key_values=KACache(model.config), or generate "
                "with a model from ka_attention.hf.attach"
            )
    if n > 1 and (layer.is_ka or options.window is not None):
        refuse_split_tokens()
    ends = options.ends
    if ends is not None and length != n:
        raise ValueError(f"cu_seq_lens_q: packed sequences cannot continue a cache, got one of {length - n} tokens")
    if mask is not None and raw_mask is not None and n > 1 and (layer.is_ka or layer.cuts(length)):
        mask = refuse_future(mask, raw_mask, n)
    adapter = _adapter_of(module, layer)
    by_operator = n > 1 and (adapter is None if layer.is_ka else _is_narrow(length, options))
    if ends is not None and not by_operator:  # it alone takes their ends
        mask = band(in_one_sequence(mask, ends, n), n, n, options.window, q.device)
    elif ends is not None and mask is not None:
        mask = refuse_holes(mask, raw_mask, ends, n, options.window)
    if not layer.is_ka:
        if by_operator:
            out = _parallel(q, k, values, v, mask, 0.0, options).transpose(1, 2).contiguous()
        else:
            out = _softmax(module, q, k, values, mask, options)
        if state is not None:
            state.commit()
        return out
    _refuse_dropout(options)
    gate = layer.gate_of(module, v)
    if n == 1 and (
        state is not None or not getattr(gate, "requires_grad", False)
    ):  # else its gradient is 0, not absent
        values = values if length > 1 else repeat_heads(values, q)  # a cache repeats what it keeps
        out = attend_one(q, k, values, mask, *options[:3])
        read = out if adapter is None or state is None else adapter(out)
    elif adapter is None:
        out = read = _parallel(q, k, values, v, mask, gate, options)
    else:
        mask = band(mask, n, length, options.window, q.device)
        out, read = _token_by_token(q, k, values, v, mask, gate, adapter, options)
    if state is not None:
        state.commit(read if not isinstance(gate, Tensor) and gate == 1 else cache_values(v, read, gate))
    return out.transpose(1, 2).contiguous()


def _adapter_of(module: nn.Module, layer: Layer) -> nn.Module | None:
    """The layer's adapter; RuntimeError where its settings ask for one that is not there."""
    if not layer.has_adapter:
        return None
    adapter = module._modules.get("ka_adapter")
    if adapter is None:
        raise RuntimeError(
            f"ka_config has an adapter for layer {layer.index}, which has none: make the model with "
            "ka_attention.hf.attach"
        )
    return adapter


def _refuse_dropout(options: Options) -> None:
    if options.dropout:
        raise ValueError(
            f"config.attention_dropout (GPT-2: attn_pdrop) must be 0 with KA-attention, got {options.dropout}"
        )


def _is_narrow(length: int, options: Options) -> bool:
    """Whether a softmax layer's window is so much shorter than ``length`` that the operator is faster."""
    return length >= SHORT and options.window is not None and 4 * options.window <= length and not options.dropout


def _parallel(
    q: Tensor, k: Tensor, values: Tensor, v: Tensor, mask: Tensor | None, gate: float | Tensor, options: Options
) -> Tensor:
    """KA-attention ``[B, Hq, n, D]`` of several new tokens by the operator."""
    past = k.shape[2] - q.shape[2]
    return ka_attention(
        q,
        k[:, :, past:] if past else k,
        v,
        gate=gate,
        scale=options.scale,
        window=options.window,
        past=(k[:, :, :past], repeat_heads(values[:, :, :past], q)) if past else None,
        attn_mask=mask if options.ends is None else None,  # the ends say the same
        cu_seqlens=options.ends,
        softcap=options.softcap,
    )


def _check_cache(state: KAState, layer: Layer) -> None:
    if state.layer.ka != layer.ka:
        raise RuntimeError(
            f"layer {layer.index}: this KA cache was made for another ka_config ({state.layer.ka}), make a new one"
        )
    state.layer.ka = layer.ka


def _refuse_unsupported(module: nn.Module, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError('output_attentions: attention "ka" returns no weights; ka_attention.ops.walk computes them')
    names = sorted(name for name in _UNSUPPORTED - {"output_attentions"} if kwargs.get(name) is not None)
    if names:
        raise ValueError(f"{type(module).__name__} passes {', '.join(names)}, which KA-attention does not support")


def _refuse_both_ways(module: nn.Module) -> None:
    """ValueError where a decoder's layer is asked to look both ways; that of a vision tower does so by itself."""
    if "ka_layer" not in vars(module) and not getattr(module, "is_causal", False):
        return
    layer = Layer.of(module)
    if layer.is_ka or layer.window is not None:
        raise ValueError("is_causal: KA-attention and its windows look back only, got False")


def refuse_split_tokens() -> None:
    """ValueError where accelerate gives each process a part of every sequence: KA-attention would take it for all."""
    # The class holds the state of the process; to make an instance would begin it.
    parallelism = getattr(AcceleratorState, "_shared_state", {}).get("parallelism_config")
    if parallelism is not None and (getattr(parallelism, "cp_size", 1) > 1 or getattr(parallelism, "sp_size", 1) > 1):
        raise ValueError(
            f"parallelism_config: cp_size {parallelism.cp_size} and sp_size {getattr(parallelism, 'sp_size', 1)} split "
            "sequences in ways that KA-attention does not know: use ka_attention.hf.sequence_parallel and share"
        )


def _softmax(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """Standard attention, ``[B, n, Hq, D]``, on PyTorch's kernels unless the scores are capped."""
    n, length, (scale, window, softcap, dropout, _) = q.shape[2], k.shape[2], options
    if mask is None and 1 < n < length:  # the prefill of a static cache of transformers: causal from its first slot
        k, v, length = k[:, :, :n], v[:, :, :n], n
    if (window is not None and window < length) or (softcap is not None and mask is None):
        mask = band(mask, n, length, window, q.device)
    if softcap is None:
        return sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scale)[0]
    weights = F.dropout(softmax(q, k, mask, scale, softcap), dropout)
    return (weights @ repeat_heads(v, q).to(weights.dtype)).to(q.dtype).transpose(1, 2).contiguous()


def _token_by_token(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    v: Tensor,
    mask: Tensor,
    gate: float | Tensor,
    adapter: nn.Module,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """(A, adapter(A)) of the new tokens, one after another, as each reads what the adapter made of those before."""
    n = q.shape[2]
    past = k.shape[2] - n
    weights = softmax(q, k, mask, options.scale, options.softcap)
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
