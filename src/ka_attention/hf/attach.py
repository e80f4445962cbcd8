"""Attach KA-attention to a loaded transformers model, and detach it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

from ka_attention.hf.attention import NAME, register
from ka_attention.hf.cache import KACache, KAStaticCache, layer_plan
from ka_attention.hf.config import KAConfig
from ka_attention.hf.gates import KAGate

# Models whose attention code changes keys, values or weights around the interface that KA-attention plugs into.
_UNSUPPORTED = {
    "diffllama": "it subtracts two attention maps",
    "doge": "its attention mask carries learned values",
    "gpt_oss": "it uses attention sinks",
    "jetmoe": "its attention heads are mixtures of experts that repeat the cached values",
}


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's decoder, which holds ``ka_config``."""
    return model.config.get_text_config(decoder=True)


def attention_modules(model: nn.Module) -> list[Any]:
    """The decoder's attention modules, in the order of their layers."""
    kind = type(text_config(model))
    found = [
        m
        for m in model.modules()
        if type(getattr(m, "config", None)) is kind
        and getattr(m, "layer_idx", None) is not None
        and "Attention" in type(m).__name__
        and not getattr(m, "is_cross_attention", False)
    ]
    return sorted(found, key=lambda m: m.layer_idx)


def check_supported(model: nn.Module) -> None:
    """Raise ValueError, with the reason, for a model on which KA-attention would fail or silently not run."""
    text = text_config(model)
    reason = _UNSUPPORTED.get(text.model_type)
    if model.config.is_encoder_decoder:
        reason = "it is an encoder-decoder"
    elif not model._can_set_attn_implementation():
        reason = "its code does not use transformers' attention interface, so standard attention would run silently"
    elif getattr(text, "kv_lora_rank", None):
        reason = "its keys and values are compressed (multi-head latent attention)"
    elif getattr(text, "num_kv_shared_layers", None):
        reason = "its layers share keys and values"
    elif not reason and len(attention_modules(model)) != text.num_hidden_layers:
        reason = f"{len(attention_modules(model))} of its {text.num_hidden_layers} layers have causal self-attention"
    if reason:
        raise ValueError(f"KA-attention does not support {type(model).__name__} ({text.model_type}): {reason}")
    layer_plan(model.config)


def attach(
    model: nn.Module,
    ka: KAConfig | None = None,
    adapter: Callable[[int], nn.Module | None] | Mapping[int, nn.Module] | None = None,
) -> nn.Module:
    """Make ``model`` a KA model, in place, and return it; with learned gates if ``ka`` asks for them.

    model:   a causal language model of transformers, loaded or built from a configuration.
    adapter: modules that map A ``[B, Hq, T, D]`` to what later tokens read in V's place: a mapping from, or a function
             of, the index of a KA layer. With one, several new tokens at once are computed one after another.

    From then on ``generate`` makes a KA cache. Raises ValueError for models that are not supported, layers that do not
    exist, or a model that is attached already; then nothing has changed.
    """
    ka = ka or KAConfig()
    register()
    check_supported(model)
    if hasattr(model, "_ka_restore"):
        raise ValueError("model: it is attached already, call ka_attention.hf.detach first")
    text, modules = text_config(model), attention_modules(model)
    beyond = [i for i in ka.layers or () if not 0 <= i < len(modules)]
    if beyond:
        raise ValueError(f"layers: {type(model).__name__} has layers 0 to {len(modules) - 1}, got {beyond}")
    find = adapter.get if isinstance(adapter, Mapping) else adapter or (lambda layer_idx: None)
    parts = [(m, make_gate(ka, text), find(m.layer_idx)) for m in modules if ka.caches_outputs(m.layer_idx)]
    for module, gate, adapter_module in parts:
        device = next(module.parameters()).device
        if gate is not None:
            module.ka_gate = gate.to(device)
        if adapter_module is not None:
            module.ka_adapter = adapter_module.to(device)
    model._ka_restore = (getattr(text, "ka_config", None), text._attn_implementation)
    text.ka_config = ka.to_dict()
    set_attention(model, NAME)
    model._prepare_cache_for_generation = MethodType(prepare_cache_for_generation, model)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach`, in place: gates and adapters are dropped, the model computes bit for bit what it did before."""
    if not hasattr(model, "_ka_restore"):
        raise ValueError("model: it is not attached")
    ka_config, implementation = model._ka_restore
    del model._ka_restore, model._prepare_cache_for_generation
    for module in attention_modules(model):
        for name in ("ka_gate", "ka_adapter"):
            if hasattr(module, name):
                delattr(module, name)
    text = text_config(model)
    if ka_config is None:
        del text.ka_config
    else:
        text.ka_config = ka_config
    set_attention(model, implementation)
    return model


@contextmanager
def use(model: nn.Module, ka: KAConfig | None = None, *, adapter: Any = None, **settings: Any) -> Iterator[nn.Module]:
    """``with use(model, layers=…, gate_init=…, window=…):`` is `attach` now and `detach` at the end.

    Give a KAConfig, or its fields as keywords. ``gate`` may also be a number, for a fixed gate of that value.
    """
    if ka is not None and settings:
        raise ValueError(f"ka: give a KAConfig or its fields, not both, got {sorted(settings)} besides")
    if isinstance(settings.get("gate"), int | float):
        settings["gate_init"] = float(settings.pop("gate"))
    attach(model, ka or KAConfig(**settings), adapter)
    try:
        yield model
    finally:
        detach(model)


def make_gate(ka: KAConfig, text: Any) -> KAGate | None:
    """A new learned gate for one layer of a model, of the kind that ``ka`` asks for; None for fixed gates."""
    if ka.gate == "fixed":
        return None
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return KAGate(text.num_attention_heads, ka.gate_init, ka.gate_range, head_dim if ka.gate == "token" else None)


def set_attention(model: nn.Module, implementation: Any) -> None:
    """Set the attention implementation of the decoder alone; other parts, such as vision towers, keep theirs."""
    text = text_config(model)
    if text is model.config:
        model.set_attn_implementation(implementation)
    else:
        name = next(name for name in model.config.sub_configs if getattr(model.config, name) is text)
        model.set_attn_implementation({name: implementation})


def prepare_cache_for_generation(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
) -> None:
    """What ``generate`` calls to make a cache: a KA cache where it would have made its own."""
    if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
        return type(self)._prepare_cache_for_generation(
            self, generation_config, model_kwargs, mode, batch_size, max_cache_length
        )
    kind = generation_config.cache_implementation
    if kind == "static":
        length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
        model_kwargs["past_key_values"] = KAStaticCache(self.config, length)
    elif kind in (None, "dynamic", "dynamic_full"):
        cache = model_kwargs["past_key_values"] = KACache(self.config)
        if generation_config.is_assistant:
            cache.activate_past_recording()
    else:
        raise ValueError(f"cache_implementation: with KA-attention expected 'dynamic' or 'static', got {kind!r}")
