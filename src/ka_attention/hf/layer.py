"""What a layer of a KA model needs to know to attend, worked out once from its configuration and kept on its module."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ka_attention.hf.config import KAConfig
from ka_attention.hf.gates import KAGate
from ka_attention.hf.support import attention_modules, text_config
from ka_attention.ops.dispatch import traced


class Options(NamedTuple):
    """How the scores are made, and of which tokens; ``ends`` are those of packed sequences, 0, …, n."""

    scale: float
    window: int | None
    softcap: float | None
    dropout: float
    ends: Tensor | None


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's settings, in its attention module's attribute ``ka_layer``.

    ka, stored:   the model's settings, and the ``config.ka_config`` that they were read from.
    is_first:     the first layer looks whether ``config.ka_config`` is still what was read.
    is_ka:        later tokens read outputs: a KA layer whose gate is not fixed at 0.
    window:       the window of ``ka`` in this layer; the model may have a narrower one of its own.
    gate:         the fixed gate, None for a learned one.
    gates_output: the output is multiplied by silu(W_g x).
    group:        the processes over which a text is split (``sequence_parallel``), None for one process.
    """

    ka: KAConfig
    stored: Any
    index: int
    is_first: bool
    is_ka: bool
    window: int | None
    gate: float | tuple[float, ...] | None
    gates_output: bool
    has_adapter: bool
    group: Any = None
    _gates: dict[Any, Tensor] = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> Layer:
        return self  # nothing of it changes, and a group cannot be copied

    @classmethod
    def make(cls, config: Any, index: int, is_first: bool, ka: KAConfig | None = None) -> Layer:
        """The settings of layer ``index`` of a model with the (decoder's) configuration ``config``."""
        stored = copy.deepcopy(getattr(config, "ka_config", None))
        ka = ka or KAConfig.of(config)
        is_ka, gate = ka.caches_outputs(index), ka.gate_init if ka.gate == "fixed" else None
        has_adapter = "ka_adapter" in ka.parts(index)
        return cls(ka, stored, index, is_first, is_ka, ka.window_of(index), gate, ka.gates_output(index), has_adapter)

    @classmethod
    def of(cls, module: Any) -> Layer:
        """The settings on ``module``; of a model that was not attached they are worked out and put there now."""
        layer = module.__dict__.get("ka_layer")
        if layer is None:
            layer = cls.make(module.config, module.layer_idx, module.layer_idx == 0)
            if layer.ka.convolution is not None:
                raise RuntimeError(
                    f"ka_config asks for a convolution and layer {layer.index} has none: make the model with "
                    "ka_attention.hf.attach"
                )
            if not is_dynamo_compiling():
                module.ka_layer = layer
        return layer

    def check(self, config: Any) -> None:
        """RuntimeError if ``config.ka_config`` is no longer what the layers were told."""
        if getattr(config, "ka_config", None) != self.stored:
            raise RuntimeError(
                "config.ka_config was changed after the model was made: change it with ka_attention.hf.reconfigure"
            )

    def cuts(self, length: int) -> bool:
        """Whether its window leaves some of ``length`` tokens out."""
        return self.window is not None and self.window < length

    def gate_of(self, module: nn.Module, v: Tensor, in_bounds: bool = True) -> float | Tensor:
        """The gate for values ``v``: a number, ``[Hq]`` or ``[B, Hq, n]``; in its bounds it is float32 or better."""
        if self.gate is None:
            gate = getattr(module, "ka_gate", None)
            if gate is None:
                raise RuntimeError(
                    f"ka_config asks for a learned gate ({self.ka.gate!r}) and layer {self.index} has none: "
                    "make the model with ka_attention.hf.attach"
                )
            return gate(v) if in_bounds else gate(v, in_bounds=False)
        if not isinstance(self.gate, tuple):
            return self.gate
        dtype = torch.promote_types(v.dtype, torch.float32)
        if traced(v):  # what is made then may be worth nothing later
            return torch.tensor(self.gate, dtype=dtype, device=v.device)
        key = (v.device, dtype)
        if key not in self._gates:  # made once, for all modes: a copy to the device has no place in a CUDA graph
            with torch.inference_mode(False):
                self._gates[key] = torch.tensor(self.gate, dtype=dtype, device=v.device)
        return self._gates[key]


def configure(model: Any, ka: KAConfig) -> None:
    """Give every attention layer of ``model``, whose ``config.ka_config`` is set, its settings; groups stay."""
    text = text_config(model)
    for i, module in enumerate(attention_modules(model)):
        group = getattr(module.__dict__.get("ka_layer"), "group", None)
        module.ka_layer = replace(Layer.make(text, module.layer_idx, i == 0, ka), group=group)


def reconfigure(model: Any, ka: KAConfig) -> None:
    """Let a KA model go on with other settings, in place; the one way to change ``config.ka_config``.

    Its weights stay: ``ka`` may ask for learned gates, output gates, convolutions and adapters only where the model has
    them, of the same kind; those that it does not ask for are neither used nor saved. Caches that were filled before
    are refused from then on. ValueError for settings that the model cannot have; then nothing has changed.
    """
    text = text_config(model)
    if text._attn_implementation != "ka":
        raise ValueError(f"model: {type(model).__name__} is no KA model, use ka_attention.hf.attach")
    ka = ka.resolve(text)
    modules = attention_modules(model)
    for module in modules:
        i = module.layer_idx
        if lost := [name for name in ka.parts(i) if not _has(module, name, ka)]:
            raise ValueError(f"ka: layer {i} has no such {', '.join(lost)}, which only ka_attention.hf.attach makes")
    text.ka_config = ka.to_dict()
    configure(model, ka)
    for gate in (part for module in modules for part in module.modules() if isinstance(part, KAGate)):
        gate.start, gate.bounds = ka.gate_init, ka.gate_range


def _has(module: nn.Module, name: str, ka: KAConfig) -> bool:
    part: Any = getattr(module, name, None)
    if name == "ka_gate" and isinstance(part, nn.Module):
        return (part.weight is not None) == (ka.gate == "token")
    if name == "ka_convolution":
        return getattr(part, "tokens", None) == ka.convolution
    if name == "ka_adapter":
        return getattr(part, "spec", None) == (ka.adapters or {})[str(module.layer_idx)]
    return isinstance(part, nn.Module)
