"""Attach KA-attention to a transformers model, and detach it again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ka_attention.hf.adapters import build_adapter
from ka_attention.hf.attention import NAME
from ka_attention.hf.cache.caches import KACache, KAStaticCache
from ka_attention.hf.config import KAConfig
from ka_attention.hf.gates import KAGate
from ka_attention.hf.layer import configure
from ka_attention.hf.output_gate import add_output_gate, check_output_gate, remove_output_gate
from ka_attention.hf.support import attention_modules, check_supported, text_config

Adapters = Callable[[int], nn.Module | None] | Mapping[int, nn.Module]


def attach(model: Any, ka: KAConfig | None = None, adapter: Adapters | None = None) -> Any:
    """Make ``model`` a KA model, in place, and return it; with learned gates if ``ka`` asks for them.

    model:   a causal language model of transformers, loaded or built from a configuration.
    adapter: modules that map A ``[B, Hq, T, D]`` to what later tokens read in V's place: a mapping from, or a function
             of, the index of a KA layer. With one, several new tokens at once are computed one after another.

    From then on ``generate`` makes a KA cache, and the model has a configuration of its own, of a type of its own
    (``ka_llama`` for ``llama``), with which it saves and loads as a KA model. Other models around a decoder
    (classifiers, vision and language, the bare ``LlamaModel``) keep their type, and ``save_pretrained`` refuses: use
    `save_adapter`. Raises ValueError for models that are not supported, layers that do not exist, or a model that is
    attached already; then nothing has changed.
    """
    from ka_attention.hf.types import ka_classes, register

    ka = ka or KAConfig()
    register()
    if is_attached(model):
        raise ValueError("model: it is attached already, call ka_attention.hf.detach first")
    if adapter is not None and ka.adapters:
        raise ValueError("adapter: ka.adapters names adapters too, give only one of the two")
    check_supported(model)
    text, modules = text_config(model), attention_modules(model)
    ka = ka.resolve(text)
    if beyond := sorted(i for i in map(int, ka.adapters or ()) if i >= len(modules)):
        raise ValueError(f"layers: {type(model).__name__} has the layers 0 to {len(modules) - 1}, got {beyond}")
    output_gates = [m for m in modules if ka.gates_output(m.layer_idx)]
    for module in output_gates:
        check_output_gate(module)
    modules = [m for m in modules if ka.caches_outputs(m.layer_idx)]
    given = adapter if isinstance(adapter, Mapping) else {int(i): None for i in ka.adapters or () if adapter is None}
    if unused := sorted(map(repr, given.keys() - {m.layer_idx for m in modules})):
        raise ValueError(f"adapter: {type(model).__name__} has no KA layers {', '.join(unused)} to put it in")
    gates = [make_gate(ka, text) for _ in modules]
    adapters = [_adapter(ka, adapter, m.layer_idx) for m in modules]

    if adapter is not None:
        specs = {
            str(m.layer_idx): getattr(a, "spec", {}) for m, a in zip(modules, adapters, strict=True) if a is not None
        }
        ka = replace(ka, adapters=specs)
    for module, gate, adapter_module in zip(modules, gates, adapters, strict=True):
        device = next(module.parameters()).device
        if gate is not None:
            module.ka_gate = gate.to(device)
        if adapter_module is not None:
            module.ka_adapter = adapter_module.to(device)
    for module in output_gates:
        add_output_gate(module, text)
    model._ka_before = (model.config, text)
    config = copy.deepcopy(model.config)
    new_text = config.get_text_config(decoder=True)
    new_text._attn_implementation = NAME
    new_text.ka_config = ka.to_dict()
    if text is model.config and model.can_generate():
        new_text.__class__ = ka_classes(model.__class__)[0]
    else:
        model.save_pretrained = _refuse_to_save
    _swap_configs(model, (config, new_text))
    configure(model, ka)
    for part in _parts(model):
        part.set_attn_implementation = _refuse_other_attention
    model.init_continuous_batching = _refuse_continuous_batching
    model._prepare_cache_for_generation = partial(_prepare_cache_for_generation, model)
    return model


def detach(model: Any) -> Any:
    """Undo `attach`, in place: gates and adapters are dropped, the model computes bit for bit what it did before.

    ValueError for a model that is not attached, or that was made as a KA model (``KALlamaForCausalLM``).
    """
    if not is_attached(model):
        raise ValueError("model: it is not attached")
    if model.config_class.model_type.startswith("ka_"):
        raise ValueError(
            f"model: {type(model).__name__} was made as a KA model, there is nothing to go back to; "
            "load the model it came from for softmax attention"
        )
    for module in attention_modules(model):
        for name in ("ka_gate", "ka_adapter", "ka_layer"):
            if hasattr(module, name):
                delattr(module, name)
        remove_output_gate(module)
    for part in _parts(model):
        del part.set_attn_implementation
    _swap_configs(model, model.__dict__.pop("_ka_before"))
    model.__dict__.pop("save_pretrained", None)
    del model.init_continuous_batching, model._prepare_cache_for_generation
    return model


def is_attached(model: Any) -> bool:
    """Whether `attach` has made ``model`` a KA model."""
    return "_ka_before" in model.__dict__


@contextmanager
def use(model: Any, ka: KAConfig | None = None, *, adapter: Adapters | None = None, **settings: Any) -> Iterator[Any]:
    """``with use(model, layers=…, gate=…, window=…):`` is `attach` now and `detach` at the end.

    Give a KAConfig or its fields as keywords. ``gate`` may also be a number: the fixed gate of that value.
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


def _adapter(ka: KAConfig, adapter: Adapters | None, layer_idx: int) -> nn.Module | None:
    if adapter is not None:
        return adapter.get(layer_idx) if isinstance(adapter, Mapping) else adapter(layer_idx)
    spec = (ka.adapters or {}).get(str(layer_idx))
    return None if spec is None else build_adapter(spec)


def _parts(model: Any) -> list[Any]:
    """The model, and those within it that can change the attention of its decoder: all but a vision tower."""
    configs = (model.config, text_config(model))
    return [m for m in model.modules() if isinstance(m, PreTrainedModel) and any(m.config is c for c in configs)]


def _swap_configs(model: Any, new: tuple[Any, Any]) -> None:
    """Give the model and its parts the configurations (model's, decoder's) in the place of those they have."""
    old = (model.config, text_config(model))
    for module in model.modules():
        for before, after in zip(old, new, strict=True):
            if getattr(module, "config", None) is before:
                module.config = after


def _prepare_cache_for_generation(
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


def _refuse_other_attention(attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
    if attn_implementation != NAME:
        raise ValueError(
            f"attn_implementation: a KA model runs {NAME!r} only, got {attn_implementation!r}; call "
            "ka_attention.hf.detach first, or load the model it came from"
        )


def _refuse_continuous_batching(*args: Any, **kwargs: Any) -> None:
    raise ValueError("continuous batching (generate_batch) has no KA cache: use generate, or a softmax model")


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "save_pretrained: only a causal language model by itself has a KA type, this would load as a softmax model; "
        "use ka_attention.hf.save_adapter, and save the rest after detach"
    )
