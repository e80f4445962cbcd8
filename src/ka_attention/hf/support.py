"""Which transformers models KA-attention can run in."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel

from ka_attention.hf.cache.caches import layer_plan

# Models whose attention code changes keys, values or weights around the interface that KA-attention plugs into.
_UNSUPPORTED = {
    "diffllama": "it subtracts two attention maps",
    "doge": "its attention mask carries learned values",
    "gptj": "its attention comes by way of transformers' interface in the newest versions only",
    "jetmoe": "its heads are mixtures of experts that repeat the cached values",
}


def text_config(model: Any) -> Any:
    """The configuration of a model's decoder, which holds ``ka_config``."""
    return model.config.get_text_config(decoder=True)


def attention_modules(model: Any) -> list[Any]:
    """The decoder's self-attention modules, in the order of their layers."""
    text = text_config(model)
    found = [
        m
        for m in model.modules()
        if getattr(m, "config", None) is text
        and getattr(m, "layer_idx", None) is not None
        and "Attention" in type(m).__name__
        and not (getattr(m, "is_cross_attention", False) or "CrossAttention" in type(m).__name__)
    ]
    return sorted(found, key=lambda m: m.layer_idx)


def _uses_interface(kind: Any) -> bool:
    """Whether attention of a class of models is what the configuration names. The way to ask is private."""
    ask = getattr(kind, "_can_set_attn_implementation", None)
    if ask is None:
        raise ValueError(
            f"transformers {transformers.__version__} does not say whether {kind.__name__} uses its attention "
            "interface: ka-attention does not know this version, install one that it names"
        )
    return ask()


def check_supported(model: Any) -> None:
    """Raise ValueError, with the reason, for a model on which KA-attention would fail or silently not run."""
    text, modules = text_config(model), attention_modules(model)
    bases = [c for c in type(model).__mro__ if issubclass(c, PreTrainedModel) and c is not PreTrainedModel]
    if model.config.is_encoder_decoder:
        reason = "it is an encoder-decoder"
    elif not all(_uses_interface(base) for base in bases):
        reason = "its code does not use transformers' attention interface: standard attention would run silently"
    elif (family := text.model_type.removeprefix("ka_")) in _UNSUPPORTED:
        reason = _UNSUPPORTED[family]
    elif getattr(text, "kv_lora_rank", None):
        reason = "its keys and values are compressed (multi-head latent attention)"
    elif getattr(text, "num_kv_shared_layers", None):
        reason = "its layers share keys and values"
    elif any("sink" in name for m in modules for name, _ in m.named_parameters()):
        reason = "it uses attention sinks"
    elif not modules:
        reason = "none of its layers has self-attention"
    elif not all(getattr(m, "is_causal", True) for m in modules):
        reason = "its attention is not causal (BERT and the like need is_decoder=True)"
    else:
        layer_plan(model.config)
        if len(modules) == text.num_hidden_layers:
            return
        reason = f"{len(modules)} of its {text.num_hidden_layers} layers have causal self-attention"
    raise ValueError(f"KA-attention does not support {type(model).__name__} ({text.model_type}): {reason}")
