"""What the attention of a transformers model does with whole sequences: weights, walks, other ways to attend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from transformers import AttentionInterface

from ka_attention.hf.attention import NAME, attention_forward
from ka_attention.hf.layer import Layer
from ka_attention.ops import ka_attention


class Call(NamedTuple):
    """One layer's attention: q ``[B, Hq, T, D]``, k and v ``[B, Hkv, T, D]`` and the options of ``ka_attention``."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]


@contextmanager
def attending(compute: Callable[[Call], Tensor]) -> Iterator[None]:
    """Within it, models with attention "ka" attend by ``compute``, which returns a layer's output ``[B, Hq, T, D]``.

    For sequences of equal length without padding or cache. A layer that is not a KA layer has the gate 0.
    """

    def forward(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        ka_output_gate: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        layer = Layer.of(module)
        gate: float | Tensor = 0.0
        if layer.is_ka:
            gate = layer.gate_of(module, value)
        window = layer.ka.window_of(layer.index, sliding_window)
        options = {"gate": gate, "scale": scaling, "window": window, "softcap": softcap}
        out = compute(Call(layer.index, query, key, value, options)).transpose(1, 2).contiguous()
        return (out if ka_output_gate is None else out * ka_output_gate.view_as(out)), None

    AttentionInterface.register(NAME, forward)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, attention_forward)


def exact(call: Call) -> Tensor:
    """The attention that the model has."""
    return ka_attention(call.q, call.k, call.v, **call.options)
