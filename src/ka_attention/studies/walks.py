"""What the attention of a transformers model does with whole sequences: weights, walks, other ways to attend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoTokenizer

from ka_attention.errors import UserError
from ka_attention.hf import KAConfig, use
from ka_attention.hf.attention import NAME, attention_forward
from ka_attention.ops import ka_attention, walk
from ka_attention.report.inspect import Inspection
from ka_attention.studies import hub
from ka_attention.studies.caches import own_config
from ka_attention.studies.memory import is_softmax

LONGEST = 128  # tokens of an inspected text: the page holds two matrices a head


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
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        ka, layer = KAConfig.of(module.config), module.layer_idx
        windows = [w for w in (sliding_window, ka.window if ka.enabled(layer) else None) if w]
        gate: float | Tensor = 0.0
        if ka.caches_outputs(layer):
            gate = ka.gate_init if ka.gate == "fixed" else module.ka_gate(value)
        options = {"gate": gate, "scale": scaling, "window": min(windows, default=None), "softcap": softcap}
        out = compute(Call(layer, query, key, value, options))
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, forward)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, attention_forward)


def exact(call: Call) -> Tensor:
    """The attention that the model has."""
    return ka_attention(call.q, call.k, call.v, **call.options)


def load_model(source: str, argument: str = "MODEL") -> tuple[Any, Any]:
    """Model and tokenizer of a folder or Hub name, softmax or KA, in evaluation mode.

    Raises UserError, naming the command's ``argument``, if there is none.
    """
    model = hub.load_model(argument, source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{argument}: cannot load {source}: {str(error).splitlines()[0]}") from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


@torch.inference_mode()
def inspect(model: Any, tokenizer: Any, text: str, name: str) -> Inspection:
    """W, R and hops of every layer and head of ``model``, called ``name``, on ``text`` of 2 to 128 tokens.

    Of a softmax model R and hops are those of its weights read as KA-attention: what a KA cache would make of a layer.
    """
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    count = ids.shape[1]
    if not 2 <= count <= LONGEST:
        raise UserError(f"TEXT: expected 2 to {LONGEST} tokens, got {count}")
    ka = own_config(model)
    softmax = is_softmax(ka)
    weights: list[np.ndarray] = []
    walks: list[Any] = []

    def record(call: Call) -> Tensor:
        options = call.options if not softmax else call.options | {"gate": 1.0}
        weights.append(walk(call.q, call.k, **call.options | {"gate": 0.0}).matrix[0].float().cpu().numpy())
        walks.append(walk(call.q, call.k, **options))
        return exact(call)

    with nullcontext() if ka else use(model, KAConfig(gate_init=0.0)), attending(record):
        model(input_ids=ids.to(model.device), use_cache=False)
    return Inspection(
        title=f"Where the output of {name} comes from",
        note="It is a softmax model: R and hops show what a KA cache would make of each layer." if softmax else "",
        tokens=[_shown(tokenizer, i) for i in ids[0].tolist()],
        layers=[_described(ka, layer) for layer in range(len(weights))],
        weights=np.stack(weights),
        sources=np.stack([w.matrix[0].float().cpu().numpy() for w in walks]),
        hops=np.stack([w.hops[0].float().cpu().numpy() for w in walks]),
    )


def _shown(tokenizer: Any, token: int) -> str:
    text = tokenizer.decode([token])
    return tokenizer.convert_ids_to_tokens(token) if "�" in text else text  # a part of a character


def _described(ka: KAConfig | None, layer: int) -> str:
    if ka is None or not ka.enabled(layer):
        return "softmax"
    words = "KA" if ka.caches_outputs(layer) else "softmax"
    if words == "KA" and ka.gate != "fixed":
        words += f", gate per {ka.gate}"
    return words + (f", window {ka.window}" if ka.window else "")
