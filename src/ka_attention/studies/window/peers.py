"""Recurrent peers: a GPT-NeoX whose attention gives way to a layer of flash-linear-attention with a state of one size.

The rest of the model stays: embeddings, norms, residuals, training. Every peer's state holds ``hidden_size · D``
numbers per layer, D the size of an attention head: what a KV or KA cache of D / 2 tokens holds.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP

from ka_attention.errors import UserError
from ka_attention.harness.models.arms import Arm

KINDS = {"gla": "GLA", "deltanet": "DeltaNet", "mamba2": "Mamba-2"}
KERNEL = 4  # tokens that a short convolution reads; the last 3 belong to the state


@dataclass(frozen=True)
class Peer(Arm):
    """An arm without attention; see `peer`."""

    def install(self, model: Any) -> Any:
        """Put new recurrent layers in the place of a GPT-NeoX's attention, and return the model.

        The MLPs are made anew, narrower or wider by what the recurrent layers take or leave, so that the number of
        parameters stays (to half a multiple of 8 units a layer). UserError where no MLP would be left.
        """
        config, blocks = model.config, model.gpt_neox.layers
        mixers = [_mixer(self.mixer, config.hidden_size, config.num_attention_heads) for _ in blocks]
        surplus = _parameters(mixers[0]) - _parameters(blocks[0].attention)
        width = config.intermediate_size - 8 * round(surplus / (2 * config.hidden_size + 1) / 8)
        if width < 8:
            raise UserError(
                f"--set intermediate_size: expected more than {config.intermediate_size - width} for the arm "
                f"{self.name}, whose layers take so much of the MLPs' parameters, got {config.intermediate_size}"
            )
        config.intermediate_size = width
        for block, mixer in zip(blocks, mixers, strict=True):
            block.attention, block.mlp = mixer, GPTNeoXMLP(config)
            for module in (*mixer.modules(), *block.mlp.modules()):
                model._init_weights(module)
        return model

    def state_bytes(self, config: Any) -> int:
        """Bytes that a sequence's state takes in all layers, in the model's dtype: recurrent and of convolutions."""
        size, heads = config.hidden_size, config.num_attention_heads
        convolved = {"gla": 0, "deltanet": 3 * size, "mamba2": 2 * size + size // heads}[self.mixer]
        numbers = size * (size // heads) + convolved * (KERNEL - 1)
        return config.num_hidden_layers * numbers * (config.dtype or torch.float32).itemsize


def peer(name: str) -> Peer:
    """The arm ``gla``, ``deltanet`` or ``mamba2``; UserError where its kernels cannot run."""
    if importlib.util.find_spec("fla") is None or not torch.cuda.is_available():
        raise UserError(
            f"--set arms: {name} needs a CUDA device and flash-linear-attention (pip install flash-linear-attention); "
            f"to leave recurrent peers out, name the other arms"
        )
    return Peer(name, KINDS[name], mixer=name)


class Mixer(nn.Module):
    """A recurrent layer called as GPT-NeoX calls attention: hidden states ``[B, T, hidden_size]`` in and out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        # Some of the kernels refuse float32, in which models are evaluated.
        with torch.autocast(hidden_states.device.type, torch.bfloat16):
            return self.mix(hidden_states), None

    def mix(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Mamba2Mixer(Mixer):
    """Mamba-2 on the kernels of gated linear attention, which its recurrence is (arXiv 2405.21060, section 5).

    State S_t = exp(−a Δ_t) S_{t−1} + Δ_t x_t b_tᵀ, output S_t c_t + d x_t, gated and normalised. The layer's own
    forward wants the package mamba-ssm, and without it holds chunk × chunk × state numbers per head. The
    recurrent kernel and not the chunked one, whose backward flash-linear-attention refuses on Hopper with Triton 3.4
    to 3.7.0.
    """

    def mix(self, x: Tensor) -> Tensor:
        from fla.ops.simple_gla import fused_recurrent_simple_gla

        m: Any = self.layer
        gate, mixed, step = m.in_proj(x).split([m.intermediate_size, m.conv_dim, m.num_heads], -1)
        mixed = F.silu(m.conv1d(mixed.mT)[..., : x.shape[1]].mT)
        x, b, c = mixed.split([m.intermediate_size, m.ssm_state_size, m.ssm_state_size], -1)
        x = x.unflatten(-1, (m.num_heads, m.head_dim))  # [B, T, H, P]
        b, c = (y[:, :, None].expand(-1, -1, m.num_heads, -1) for y in (b, c))  # [B, T, H, N]
        step = F.softplus(step.float() + m.dt_bias)  # [B, T, H]
        decay = -m.A_log.float().exp() * step
        out, _ = fused_recurrent_simple_gla(c, b, (x * step[..., None]).to(x.dtype), decay, scale=1.0)
        out = out + (x * m.D[:, None]).to(x.dtype)
        return m.out_proj(m.norm(out.flatten(2), gate))


def _mixer(name: str, size: int, heads: int) -> Mixer:
    from fla.layers import DeltaNet, GatedLinearAttention, Mamba2

    head = size // heads
    if name == "gla":  # half as many heads, of D and 2 D, which makes the keys half as wide as the values
        half = max(1, heads // 2)
        return Mixer(GatedLinearAttention(hidden_size=size, num_heads=half, expand_k=half / heads))
    if name == "deltanet":  # of D and D
        return Mixer(DeltaNet(hidden_size=size, num_heads=heads, conv_size=KERNEL))
    # of D / 2 and D, for inputs of twice the hidden size
    return Mamba2Mixer(Mamba2(hidden_size=size, head_dim=head, state_size=head // 2, conv_kernel=KERNEL))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
