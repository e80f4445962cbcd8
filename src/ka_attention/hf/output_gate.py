"""The output gate of an attention layer: o_proj(silu(W_g x) · A), with x the layer's input."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ka_attention.hf.heads import Heads


def make_output_gate(module: Any, text: Any) -> nn.Linear:
    """W_g for an attention module of a model with the configuration ``text``, in the floating dtype of its weights.

    ValueError for a module that takes no keywords it does not know, so cannot hand the gate on.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        raise ValueError(f"output_gate: {type(module).__name__} does not pass keywords on to its attention function")
    heads = Heads.of(text)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    gate = nn.Linear(text.hidden_size, heads.query * heads.dim, bias=False, dtype=dtype)
    nn.init.normal_(gate.weight, std=getattr(text, "initializer_range", 0.02))
    return gate


def hook_output_gate(module: Any) -> None:
    """Let an attention module with a W_g, ``module.ka_output_gate``, hand its gate on to the attention function.

    That does not see x. A hook before the module computes silu(W_g x) and hands it on as one more keyword, which
    attention modules pass through: nothing is kept between calls.
    """
    module.register_forward_pre_hook(_gate_input, with_kwargs=True)


def remove_output_gate(module: Any) -> None:
    """Take a module's W_g away, and the hook."""
    if "ka_output_gate" in module._modules:
        del module.ka_output_gate
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _gate_input]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]


def _gate_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    layer = module.__dict__.get("ka_layer")
    if layer is None or not layer.gates_output:
        return args, kwargs
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return args, kwargs | {"ka_output_gate": F.silu(module.ka_output_gate(x))}
