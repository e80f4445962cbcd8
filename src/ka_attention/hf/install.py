"""What attention modules of a KA model carry (gates, convolutions, adapters), made before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from ka_attention.hf.adapters import build_adapter
from ka_attention.hf.config import KAConfig
from ka_attention.hf.convolution import hook_convolution, make_convolution, remove_convolution
from ka_attention.hf.gates import KAGate
from ka_attention.hf.heads import Heads
from ka_attention.hf.output_gate import hook_output_gate, make_output_gate, remove_output_gate
from ka_attention.hf.support import attention_modules, check_supported, text_config

Adapters = Callable[[int], nn.Module | None] | Mapping[int, nn.Module]
Parts = list[tuple[Any, dict[str, nn.Module]]]
PARTS = ("ka_gate", "ka_output_gate", "ka_convolution", "ka_adapter")


def prepare(model: Any, ka: KAConfig, adapter: Adapters | None = None) -> tuple[KAConfig, Parts]:
    """``ka`` for this model, with what describes its adapters, and what each module is to carry. Changes nothing.

    ValueError for a model that is not supported, and for layers or adapters that do not fit it.
    """
    if adapter is not None and ka.adapters:
        raise ValueError("adapter: ka.adapters names adapters too, give only one of the two")
    check_supported(model)
    text, modules = text_config(model), attention_modules(model)
    ka = ka.resolve(text)
    if beyond := sorted(i for i in map(int, ka.adapters or ()) if i >= len(modules)):
        raise ValueError(f"layers: {type(model).__name__} has the layers 0 to {len(modules) - 1}, got {beyond}")
    ka_layers = {m.layer_idx for m in modules if ka.caches_outputs(m.layer_idx)}
    given = adapter if isinstance(adapter, Mapping) else {int(i): None for i in ka.adapters or () if adapter is None}
    if unused := sorted(map(repr, given.keys() - ka_layers)):
        raise ValueError(f"adapter: {type(model).__name__} has no KA layers {', '.join(unused)} to put it in")
    parts: Parts = []
    specs: dict[str, dict[str, Any]] = {}
    for module in modules:
        i = module.layer_idx
        found = {
            "ka_gate": make_gate(ka, text) if i in ka_layers else None,
            "ka_output_gate": make_output_gate(module, text) if ka.gates_output(i) else None,
            "ka_convolution": make_convolution(module, text, ka.convolution) if ka.convolution else None,
            "ka_adapter": _adapter(ka, adapter, i, text) if i in ka_layers else None,
        }
        made = {name: part for name, part in found.items() if part is not None}
        if "ka_adapter" in made:
            specs[str(i)] = getattr(made["ka_adapter"], "spec", {})
        parts.append((module, {name: part.to(_device(module)) for name, part in made.items()}))
    return (ka if adapter is None else replace(ka, adapters=specs)), parts


def install(parts: Parts) -> None:
    """Put the parts that `prepare` made into their modules."""
    for module, made in parts:
        for name, part in made.items():
            setattr(module, name, part)
        if "ka_output_gate" in made:
            hook_output_gate(module)
        if "ka_convolution" in made:
            hook_convolution(module)


def remove(model: Any) -> None:
    """Take out of the attention modules what `install` put there."""
    for module in attention_modules(model):
        remove_output_gate(module)
        remove_convolution(module)
        for name in (*PARTS, "ka_layer"):
            if hasattr(module, name):
                delattr(module, name)


def make_gate(ka: KAConfig, text: Any) -> KAGate | None:
    """A new learned gate for one layer of a model, of the kind that ``ka`` asks for; None for fixed gates."""
    if ka.gate == "fixed":
        return None
    heads = Heads.of(text)
    return KAGate(heads.query, ka.gate_init, ka.gate_range, heads.dim if ka.gate == "token" else None)


def _adapter(ka: KAConfig, adapter: Adapters | None, layer_idx: int, text: Any) -> nn.Module | None:
    if adapter is not None:
        return adapter.get(layer_idx) if isinstance(adapter, Mapping) else adapter(layer_idx)
    if (spec := (ka.adapters or {}).get(str(layer_idx))) is None:
        return None
    heads, built = Heads.of(text), build_adapter(spec)
    for name, want in (("heads", heads.query), ("head_dim", heads.dim)):
        if spec.get(name, want) != want:
            raise ValueError(f"adapters: that of layer {layer_idx} is for {name} {spec[name]}, the model has {want}")
    return built


def _device(module: nn.Module) -> torch.device:
    """Where a module computes. ValueError for one whose weights are elsewhere until it is called."""
    if any(getattr(getattr(m, "_hf_hook", None), "offload", False) for m in module.modules()):
        raise ValueError(
            "model: its layers are offloaded, learned gates and adapters cannot be added to them; attach first, then "
            "offload, or take a fixed gate"
        )
    tensors = chain(module.parameters(), module.buffers())  # a quantized layer has buffers alone
    return next((t.device for t in tensors), torch.device("cpu"))
