"""An arm of a comparison is an attention configuration: a name, words for it and the KA settings of the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from transformers import GPTNeoXForCausalLM, set_seed

from ka_attention.errors import UserError
from ka_attention.harness.models.saved import is_softmax
from ka_attention.harness.run.settings import LARGEST, ModelSettings
from ka_attention.hf.config import KAConfig
from ka_attention.hf.support import attention_modules

NAME = re.compile(r"(?P<attention>softmax|ka|ka-head|ka-token)(-w(?P<window>[1-9]\d*))?")
KINDS = {"softmax": "softmax", "ka": "KA", "ka-head": "KA, gate per head", "ka-token": "KA, gate per token"}
ATTENTION = "attention"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Arm:
    """What distinguishes the models of a comparison.

    kind:  the attention in words, without its window: arms of one kind are one line in a figure.
    ka:    None for plain softmax attention; a windowed softmax arm is KA-attention with its gate fixed at 0.
    mixer: what mixes tokens: "attention", or the name of a layer that stands in its place.
    """

    name: str
    kind: str
    ka: KAConfig | None = None
    mixer: str = ATTENTION

    @property
    def window(self) -> int | None:
        """The window of its KA layers, where they all have the same."""
        return self.ka.window if self.ka is not None and isinstance(self.ka.window, int) else None

    @property
    def label(self) -> str:
        """How reports call it."""
        return self.kind + (f", window {self.window}" if self.window else "")

    @property
    def own_cache(self) -> str:
        """The cache that belongs to its attention, "kv" or "ka"."""
        return "kv" if is_softmax(self.ka) else "ka"

    @property
    def is_ka(self) -> bool:
        """Whether any of its layers reads outputs."""
        return self.mixer == ATTENTION and not is_softmax(self.ka)

    @property
    def is_plain(self) -> bool:
        """Whether it is stock softmax attention, or KA-attention in every layer without windows and learned gates."""
        return self.mixer == ATTENTION and self.ka in (None, KAConfig())

    def softened(self, other: Arm) -> bool:
        """Whether ``other`` is softmax attention where this one is KA-attention: same layers, same window."""
        if not self.is_ka or other.mixer != ATTENTION or other.is_ka:
            return False
        mine, its = self.ka or KAConfig(), other.ka or KAConfig()
        return (mine.layers, mine.pattern, mine.window) == (its.layers, its.pattern, its.window)

    def install(self, model: Any) -> Any:
        """Give a softmax model, in place, the attention of this arm, and return it."""
        from ka_attention.hf import attach

        return model if self.ka is None else attach(model, self.ka)


@dataclass(frozen=True)
class ArmResults(Generic[Result]):
    """What was found of one arm: a result a seed."""

    arm: Arm
    seeds: tuple[Result, ...]

    @property
    def label(self) -> str:
        """How reports call the arm."""
        return self.arm.label

    def each(self, figure: Callable[[Result], float]) -> list[float]:
        """One number per seed."""
        return [figure(seed) for seed in self.seeds]


def arm(name: str) -> Arm:
    """The arm called ``softmax``, ``ka``, ``ka-head`` or ``ka-token`` (learned gates); ``-w16`` adds a window of 16."""
    match = NAME.fullmatch(name)
    if not match:
        allowed = ", ".join(KINDS)
        raise UserError(f"--set arms: no arm {name!r}; allowed are {allowed}, each also with a window, as in ka-w16")
    attention, window = match["attention"], int(match["window"]) if match["window"] else None
    if window and window > LARGEST:
        raise UserError(f"--set arms: expected a window <= {LARGEST}, got {name}")
    kind = KINDS[attention]
    if attention == "softmax":
        return Arm(name, kind, KAConfig(window=window, gate_init=0.0) if window else None)
    gate = attention.partition("-")[2] or "fixed"
    # A learned gate starts halfway, where its gradient is largest and neither attention is favoured.
    return Arm(name, kind, KAConfig(window=window, gate=gate, gate_init=1.0 if gate == "fixed" else 0.5))  # type: ignore[arg-type]


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
