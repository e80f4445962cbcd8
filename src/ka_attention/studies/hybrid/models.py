"""Llama-like models whose layers mix tokens in different ways: an arm is data, and all arms have as many parameters."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ka_attention.errors import UserError
from ka_attention.harness.models.mixers import (
    KERNEL,
    GatedConvolution,
    HybridAttention,
    NoMixing,
    ShortConvolution,
)
from ka_attention.harness.models.recurrent import GatedDeltaNet, Mamba2, Recurrent
from ka_attention.hf import KAConfig, attach

PATTERNS = {"all": 0, "1to1": 1, "3to1": 3, "5to1": 5}  # narrow layers before each full one; all: no full layer
ARM = re.compile(
    r"(?:(?P<whole>full|canon)"
    r"|(?P<pattern>all|1to1|3to1|5to1)-(?P<mixer>softmax|ka|ka-head|ka-token|conv|conv-drawn|none|gdn|mamba2)"
    r"(?:-w(?P<window>[1-9]\d*(?:\+[1-9]\d*)*))?(?:-from(?P<start>0|0\.5|1|spread))?(?P<fast>-fast)?"
    r"(?P<first>-first)?)"
    r"(?P<gated>-gated)?(?P<qkv>-qkv)?(?P<bias>-bias)?(?P<normed>-normed)?"
)
NAMES = {
    "softmax": "softmax",
    "ka": "KA",
    "conv": "gated conv",
    "none": "no mixing",
    "gdn": "Gated DeltaNet",
    "mamba2": "Mamba-2",
}
FAST = 10.0  # the learning rate of fast gates, in those of the weights
STEP = 8  # widths of MLPs are multiples of this


@dataclass(frozen=True)
class HybridArm:
    """What mixes tokens where.

    mixer:       of the narrow layers: "softmax" or "ka" with a window, "conv" (LFM2's gated short convolution), "none"
                 (a gated layer that mixes no tokens), "gdn", "mamba2"; "full": there are none.
    window:      of softmax and KA; several: of the narrow layers in turn.
    gate:        of KA: "fixed", "head" (learned, one a head) or "token" (learned, by content).
    start:       where the gates start, or their fixed value; "spread": evenly from 0 to 1 over the heads of a layer;
                 "drawn": a gated convolution that does not start as the identity.
    pattern:     "3to1": three narrow layers to one full one; "all": all narrow.
    first:       each group of layers begins with its full layer instead of ending with it.
    output_gate: ``o_proj(silu(W_g h) · A)`` in every layer, full ones too.
    convolution: "front" before every attention layer, "qkv" on its queries, keys and values, None.
    bias:        queries and keys of every attention layer have one.
    normed:      queries and keys of every attention layer go through an RMSNorm a head (QK norm).
    gate_rate:   the learning rate of KA's gates, in those of the weights.
    """

    mixer: str = "full"
    window: int | tuple[int, ...] | None = None
    gate: str = "fixed"
    start: float | str = 0.0
    pattern: str = "all"
    first: bool = False
    output_gate: bool = False
    convolution: str | None = None
    bias: bool = False
    normed: bool = False
    gate_rate: float = 1.0

    def windows(self, layers: int) -> tuple[int | None, ...]:
        """Of each narrow layer of a model."""
        given = self.window if isinstance(self.window, tuple) else (self.window,)
        return tuple(itertools.islice(itertools.cycle(given), len(self.narrow(layers))))

    @property
    def attends(self) -> bool:
        """Whether every layer is attention."""
        return self.mixer in ("full", "softmax", "ka")

    @property
    def words(self) -> dict[str, str]:
        """What a label says of it, by attribute and in order; nothing of what goes without saying.

        That is: learned gates start at 0.5, fixed ones are 1, a gated convolution starts at random.
        """
        mixer = "full softmax"
        if self.mixer != "full":
            name, pattern = NAMES[self.mixer], self.pattern.replace("to", ":")
            mixer = f"{name} in every layer" if pattern == "all" else f"{pattern} {name}"
        window = f"windows {'+'.join(map(str, self.window))}" if isinstance(self.window, tuple) else ""
        start = ""
        if self.mixer == "ka" and self.start != (1.0 if self.gate == "fixed" else 0.5):
            begin = "0 to 1" if self.start == "spread" else f"{self.start:g}"
            start = f"gates {'at' if self.gate == 'fixed' else 'from'} {begin}"
        elif self.mixer == "conv" and self.start != "drawn":
            start = "from identity"
        return {
            "mixer": mixer,
            "gate": {"head": "gate per head", "token": "gate per token"}.get(self.gate, ""),
            "window": window or (f"window {self.window}" if self.window else ""),
            "start": start,
            "gate_rate": "fast gates" if self.gate_rate == FAST else "",
            "first": "full first" if self.first and self.pattern != "all" else "",
            "bias": "biases on q, k" if self.bias else "",
            "normed": "norms on q, k" if self.normed else "",
            "output_gate": "output gate" if self.output_gate else "",
            "convolution": {"front": "+ conv in front", "qkv": "+ conv qkv"}.get(self.convolution or "", ""),
        }

    @property
    def label(self) -> str:
        """All its words; `labels.Labels` leaves out what the arms of a report share."""
        return spelled(self.words.values())

    def narrow(self, layers: int) -> tuple[int, ...]:
        """The indices of the narrow layers of a model."""
        if self.mixer == "full":
            return ()
        group = PATTERNS[self.pattern] + 1
        if group == 1:
            return tuple(range(layers))
        full = 0 if self.first else group - 1
        return tuple(i for i in range(layers) if i % group != full)


def spelled(words: Iterable[str]) -> str:
    """Words of an arm as a label: ``3:1 KA, window 4 + conv qkv``."""
    return ", ".join(filter(None, words)).replace(", +", " +")


def arm(name: str, setting: str = "arms") -> HybridArm:
    """The arm of a name: ``full``, ``canon`` or PATTERN-MIXER, and what is to be added.

    PATTERN is all, 1to1, 3to1 or 5to1. MIXER is softmax-wW, ka-wW (gate 1), ka-head-wW or ka-token-wW (learned gates
    that start at 0.5; several windows in turn: w2+4+8), conv, conv-drawn, none, gdn or mamba2. Then, in this order:
    ``-from0``, ``-from1``, ``-fromspread`` (start of learned gates, for ka the fixed value), ``-fast`` (learned gates
    with FAST times the learning rate), ``-first``, ``-gated`` (output gates), ``-qkv`` (convolutions), ``-bias``
    (biases on queries and keys), ``-normed`` (QK norm).
    """
    found = ARM.fullmatch(name)
    mixer = (found["mixer"] or "full").partition("-")[0] if found else ""
    windowed = mixer in ("softmax", "ka")
    strange = found and ((found["start"] and mixer != "ka") or (found["fast"] and "ka-" not in found["mixer"]))
    if found is None or strange or (mixer != "full" and windowed != bool(found["window"])):
        raise UserError(
            f"--set {setting}: no arm {name!r}; an arm is full, canon, or all, 1to1, 3to1 or 5to1 with a mixer, as in "
            "3to1-ka-head-w4, 3to1-softmax-w4, 3to1-conv, 3to1-none, 3to1-gdn; see studies.hybrid.models.arm"
        )
    of_attention = [f"-{part}" for part in ("qkv", "bias", "normed") if found[part]]
    if of_attention and found["pattern"] == "all" and not windowed:
        raise UserError(f"--set {setting}: {name!r} has no queries and keys for {of_attention[0]}")
    if found["whole"]:
        convolution = "front" if found["whole"] == "canon" else "qkv" if found["qkv"] else None
        return HybridArm(
            output_gate=bool(found["gated"]),
            convolution=convolution,
            bias=bool(found["bias"]),
            normed=bool(found["normed"]),
        )
    windows = tuple(map(int, (found["window"] or "").split("+"))) if found["window"] else (None,)
    gate = found["mixer"].partition("-")[2] or "fixed"
    start: float | str = 0.0 if mixer != "ka" else 1.0 if gate == "fixed" else 0.5
    if gate == "drawn":
        gate, start = "fixed", "drawn"
    if found["start"]:
        start = "spread" if found["start"] == "spread" else float(found["start"])
    return HybridArm(
        mixer=mixer,
        window=windows if len(windows) > 1 else windows[0],
        gate=gate,
        start=start,
        gate_rate=FAST if found["fast"] else 1.0,
        pattern=found["pattern"],
        first=bool(found["first"]),
        output_gate=bool(found["gated"]),
        convolution="qkv" if found["qkv"] else None,
        bias=bool(found["bias"]),
        normed=bool(found["normed"]),
    )


@dataclass(frozen=True, kw_only=True)
class LlamaSettings:
    """A Llama-like model: RMSNorm, SwiGLU, rotary embeddings, tied embeddings.

    intermediate_size: of the MLPs of plain full softmax attention; other arms get the width with which they have as
                       many parameters.
    initial_sd:        of the weights; smaller by √(2 · layers) in the matrices that write to the residual stream.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    tied: bool = True
    initial_sd: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads or self.hidden_size // self.heads % 8:
            raise UserError(
                f"--set hidden_size: expected heads × a multiple of 8 (heads = {self.heads}), got {self.hidden_size}"
            )

    def config(self, width: int, length: int) -> LlamaConfig:
        """The transformers configuration of a model with MLPs of ``width`` for sequences of ``length`` tokens."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            intermediate_size=width,
            max_position_embeddings=length,
            tie_word_embeddings=self.tied,
            initializer_range=self.initial_sd,
            bos_token_id=None,
            eos_token_id=None,
        )


def build(
    arm: HybridArm, settings: LlamaSettings, length: int, seed: int, *, tolerance: float = 0.01
) -> LlamaForCausalLM:
    """A new model of an arm, with as many parameters, to ``tolerance``, as plain full softmax attention.

    Each weight is drawn by the seed and its own name: what two arms have in common starts alike. UserError where the
    MLPs cannot make up for the mixers.
    """
    model = _assemble(arm, settings, _width(arm, settings, length), length)
    wanted, found = count(_bare(HybridArm(), settings, settings.intermediate_size, length)), count(model)
    if abs(found / wanted - 1) > tolerance:
        raise UserError(
            f"--set intermediate_size: expected MLPs so wide that a step of {STEP} is less than "
            f"{tolerance:.0%} of the parameters, "
            f"got {settings.intermediate_size}: {arm.label} has {found:,} parameters, full softmax {wanted:,}"
        )
    _initialise(model, seed)
    return model


def count(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def state_bytes(arm: HybridArm, settings: LlamaSettings, length: int, element: int = 2) -> int:
    """Bytes of what one sequence leaves after ``length`` tokens, in all layers, with ``element`` bytes a number.

    Attention: keys and values (or outputs) of all tokens, or of the last window − 1. Convolutions:
    the last KERNEL − 1 inputs. Recurrent layers: their state and what their convolutions keep.
    """
    size, heads = settings.hidden_size, settings.heads
    half = max(1, heads // 2)
    windows = arm.windows(settings.layers)
    full = settings.layers - len(windows)
    convolved = {"front": 1, "qkv": 3}.get(arm.convolution or "", 0) * (KERNEL - 1) * size
    states = {
        "conv": (KERNEL - 1) * size,
        "none": 0,
        "gdn": size * size // half + 3 * (KERNEL - 1) * size,
        "mamba2": size * size // heads + (2 * size + size // heads) * (KERNEL - 1),
    }
    numbers = full * (2 * length * size + convolved)
    for window in windows:
        kept = length if window is None else min(length, window - 1)
        numbers += states.get(arm.mixer, 2 * kept * size + convolved)
    return numbers * element


def _bare(arm: HybridArm, settings: LlamaSettings, width: int, length: int) -> LlamaForCausalLM:
    """The model without weights, to count."""
    with torch.device("meta"):
        return _assemble(arm, settings, width, length)


def _width(arm: HybridArm, settings: LlamaSettings, length: int) -> int:
    whole = count(_bare(HybridArm(), settings, settings.intermediate_size, length))
    small = count(_bare(arm, settings, STEP, length))
    steps = (whole - small) / (3 * STEP * settings.hidden_size * settings.layers)
    if steps < 0:
        raise UserError(f"--set intermediate_size: {arm.label} leaves no parameters to the MLPs; give more")
    return STEP * (1 + round(steps))


def _assemble(arm: HybridArm, settings: LlamaSettings, width: int, length: int) -> LlamaForCausalLM:
    config = settings.config(width, length)
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    narrow = arm.narrow(settings.layers)
    if arm.pattern != "all" and not narrow:
        raise UserError(f"--set layers: {arm.label} needs two or more layers, got {settings.layers}")
    for i, layer in enumerate(model.model.layers):
        layer.self_attn = _mixer(arm, model.config, i, narrow=i in narrow)
    if arm.attends and (narrow or arm.output_gate):
        start: Any = arm.start
        if isinstance(start, str):
            start = tuple(i / max(1, settings.heads - 1) for i in range(settings.heads))
        window = arm.windows(settings.layers) if isinstance(arm.window, tuple) else arm.window
        attach(
            model,
            KAConfig(layers=narrow, window=window, gate=arm.gate, gate_init=start, output_gate=arm.output_gate),  # type: ignore[arg-type]
        )
    return model


def _mixer(arm: HybridArm, config: Any, layer: int, *, narrow: bool) -> nn.Module:
    size = config.hidden_size
    own_gate = arm.output_gate and not arm.attends  # where all layers attend, the KA model brings them
    if not narrow or arm.attends:
        return HybridAttention(
            config, layer, output_gate=own_gate, convolution=arm.convolution, bias=arm.bias, normed=arm.normed
        )
    if arm.mixer == "conv":
        return GatedConvolution(size, output_gate=arm.output_gate, drawn=arm.start == "drawn")
    if arm.mixer == "none":
        return NoMixing(size)
    heads = config.num_attention_heads
    return GatedDeltaNet(size, heads, output_gate=arm.output_gate) if arm.mixer == "gdn" else Mamba2(size, heads)


@torch.no_grad()
def _initialise(model: LlamaForCausalLM, seed: int) -> None:
    """Draw the matrices of a model. Norms and gates begin as their modules say."""
    sd = model.config.initializer_range
    residual = sd * (2 * model.config.num_hidden_layers) ** -0.5
    for name, module in model.named_modules():
        tied = name == "lm_head" and model.config.tie_word_embeddings
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if isinstance(module, Recurrent | ShortConvolution):
            module.draw(generator)
        if tied or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        module.weight.normal_(0, residual if name.endswith(("o_proj", "down_proj")) else sd, generator=generator)
