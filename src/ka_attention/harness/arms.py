"""An arm of a comparison is an attention configuration: a name, a label and the KA settings of the model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPTNeoXForCausalLM, set_seed

from ka_attention.errors import UserError
from ka_attention.harness.settings import ModelSettings
from ka_attention.hf.config import KAConfig
from ka_attention.hf.support import attention_modules

NAME = re.compile(r"(?P<attention>softmax|ka|ka-head|ka-token)(-w(?P<window>[1-9]\d*))?")
LABELS = {"softmax": "softmax", "ka": "KA", "ka-head": "KA, gate per head", "ka-token": "KA, gate per token"}


@dataclass(frozen=True)
class Arm:
    """``ka`` is None for plain softmax attention; a windowed softmax arm is KA-attention with its gate fixed at 0."""

    name: str
    label: str
    ka: KAConfig | None

    def install(self, model: Any) -> Any:
        """Give a softmax model, in place, the attention of this arm, and return it."""
        from ka_attention.hf import attach

        return model if self.ka is None else attach(model, self.ka)


def arm(name: str) -> Arm:
    """The arm called ``softmax``, ``ka``, ``ka-head`` or ``ka-token`` (learned gates); ``-w16`` adds a window of 16."""
    match = NAME.fullmatch(name)
    if not match:
        allowed = ", ".join(LABELS)
        raise UserError(f"--set arms: no arm {name!r}; allowed are {allowed}, each also with a window, as in ka-w16")
    attention, window = match["attention"], int(match["window"]) if match["window"] else None
    label = LABELS[attention] + (f", window {window}" if window else "")
    if attention == "softmax":
        return Arm(name, label, KAConfig(window=window, gate_init=0.0) if window else None)
    gate = attention.partition("-")[2] or "fixed"
    # A learned gate starts halfway, where its gradient is largest and neither attention is favoured.
    return Arm(name, label, KAConfig(window=window, gate=gate, gate_init=1.0 if gate == "fixed" else 0.5))  # type: ignore[arg-type]


def build(arm: Arm, settings: ModelSettings, seed: int) -> GPTNeoXForCausalLM:
    """A freshly initialised model; for a seed, all arms have the same weights (learned gates come on top)."""
    set_seed(seed)
    config = settings.config()
    config._attn_implementation = "sdpa"
    model = GPTNeoXForCausalLM(config)
    _prefer_near_tokens(model, settings)
    return arm.install(model)


@torch.no_grad()
def _prefer_near_tokens(model: GPTNeoXForCausalLM, settings: ModelSettings) -> None:
    """Start the biases of queries and keys as ``settings.locality`` asks.

    Adam moves a bias by about the learning rate a step, so that a short training hardly gets them there.
    """
    strength = torch.linspace(0, settings.locality, settings.heads)[:, None, None]
    pairs = len(model.gpt_neox.rotary_emb.inv_freq)
    for module in attention_modules(model):
        bias = module.query_key_value.bias.view(settings.heads, 3, -1)  # queries, keys, values
        bias[:, :2, :pairs] = strength  # a rotary pair is dimensions i and i + pairs: this turns with the position
