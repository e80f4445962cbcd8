"""What mixes tokens in a layer of a Llama-like model: attention in three parts, convolutions, nothing.

Every mixer is a module called as transformers calls Llama's attention, and says what it does in three parts, which the
fast training runs apart: ``before`` (projections; compiled), ``mix`` (kernels that a compiler must not touch) and
``after`` (output gate and projection; compiled). ``h`` is the normalised input ``[B, T, size]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, apply_rotary_pos_emb

from ka_attention.hf.layer import Layer
from ka_attention.nn import carried, short_convolution
from ka_attention.ops import ka_attention

KERNEL = 4  # tokens that a convolution reads, the present one included


def together(h: Tensor, *projections: Any) -> list[Tensor]:
    """What each of several linear layers makes of ``h``: parts of one product, which is faster than several."""
    product = F.linear(h, torch.cat([each.weight for each in projections]))
    parts = product.split([each.out_features for each in projections], -1)
    biases = [each.bias for each in projections]
    return [x if bias is None else x + bias.to(x.dtype) for x, bias in zip(parts, biases, strict=True)]


class Remembering(nn.Module):
    """What continues, within `streaming`, where its last call ended, from what it keeps in ``past``."""

    past: Tensor | None = None

    def nothing(self, batch: int) -> Tensor:
        """The past before the first token, of a layer's dtype: zeros."""
        raise NotImplementedError


class ShortConvolution(Remembering):
    """``y_t = Σ_i w_i · x_{t−i}``, i < KERNEL, each channel apart (depthwise, causal): ``[B, T, size]`` to the same.

    It starts as the identity or with ``drawn`` weights, as convolutions of PyTorch do, or with the sum of the two.
    Its past are the last KERNEL − 1 inputs.
    """

    def __init__(self, size: int, *, identity: bool = True, drawn: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(KERNEL, size))
        self.identity, self.drawn = identity, drawn
        self.draw(torch.Generator())

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """The weights of a new convolution."""
        self.weight.zero_()
        if self.drawn:
            bound = KERNEL**-0.5
            self.weight.uniform_(-bound, bound, generator=generator)
        if self.identity:
            self.weight[0] += 1.0

    def nothing(self, batch: int) -> Tensor:
        return self.weight.new_zeros(batch, KERNEL - 1, self.weight.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        y = short_convolution(x, self.weight, self.past)
        if self.past is not None:
            self.past.copy_(carried(self.past, x, KERNEL))
        return y


@contextmanager
def streaming(model: nn.Module, batch: int) -> Iterator[None]:
    """Within it what remembers in ``model`` continues where its last call ended, beginning with nothing."""
    found = [module for module in model.modules() if isinstance(module, Remembering)]
    for each in found:
        each.past = each.nothing(batch)
    try:
        yield
    finally:
        for each in found:
            each.past = None


def remembered_bytes(model: nn.Module) -> int:
    """Bytes of what is remembered now, keys and values apart."""
    pasts = [module.past for module in model.modules() if isinstance(module, Remembering)]
    return sum(past.numel() * past.element_size() for past in pasts if past is not None)


class Mixer(nn.Module):
    """A mixer other than attention."""

    def before(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def mix(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    def after(self, *tensors: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **_: Any) -> tuple[Tensor, None]:
        return self.after(*self.mix(*self.before(hidden_states, *position_embeddings))), None


class HybridAttention(LlamaAttention):
    """Llama's attention, softmax or KA as the model is attached, with what recurrent layers come with.

    Without a convolution its parameters are named as Llama's, and those of a KA model's attention.

    output_gate: it has a W_g of its own, where none comes with `ka_attention.hf.attach`.
    convolution: a `ShortConvolution` "qkv": on queries, keys and values; "front": on the layer's input, beside the
                 input itself (Canon layers, arXiv 2512.17351); None: nowhere.
    bias:        queries and keys have biases b, c, which start at 0: rotary embeddings make of them a learned weight on
                 distance, ``b_iᵀ c_j``, of the token itself too.
    normed:      queries and keys go through an RMSNorm a head, after convolutions and before rotations, as in Qwen3.
    """

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        output_gate: bool,
        convolution: str | None,
        bias: bool = False,
        normed: bool = False,
    ) -> None:
        super().__init__(config, layer_idx)
        size = config.hidden_size
        if bias:
            for projection in (self.q_proj, self.k_proj):
                projection.bias = nn.Parameter(torch.zeros(projection.out_features))
        if output_gate:
            self.ka_output_gate = nn.Linear(size, size, bias=False)
        self.front = ShortConvolution(size, drawn=True) if convolution == "front" else None
        three = (ShortConvolution(size, identity=False, drawn=True) for _ in range(3))
        self.on_qkv = nn.ModuleList(three) if convolution == "qkv" else None
        norms = (LlamaRMSNorm(self.head_dim, config.rms_norm_eps) for _ in range(2))
        self.on_qk = nn.ModuleList(norms) if normed else None

    def before(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """q, k, v ``[B, H, T, D]``, turned by the position, and with an output gate ``W_g h`` ``[B, T, size]``."""
        gate = (self.ka_output_gate,) if "ka_output_gate" in self._modules else ()
        qkv = self.q_proj, self.k_proj, self.v_proj
        if self.front is None:
            projected = together(h, *qkv, *gate)
        else:
            projected = [*together(self.front(h), *qkv), *(each(h) for each in gate)]
        projected, gates = projected[:3], projected[3:]
        if self.on_qkv is not None:
            projected = [convolve(x) for convolve, x in zip(self.on_qkv, projected, strict=True)]
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in projected)
        if self.on_qk is not None:
            q, k = (norm(x).to(v.dtype) for norm, x in zip(self.on_qk, (q, k), strict=True))
        q, k = apply_rotary_pos_emb(q, k, cos.to(q.dtype), sin.to(q.dtype))
        return (q, k, v, *gates)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> tuple[Tensor, ...]:
        """A ``[B, H, T, D]`` of whole sequences; softmax with a window on the operator too, which skips the rest."""
        layer = Layer.of(self) if self.config._attn_implementation == "ka" else None
        cuts = layer is not None and layer.cuts(q.shape[2])
        if layer is None or not (layer.is_ka or cuts):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scaling), *gates
        if layer.window == 1:  # a token reads its own value
            return v, *gates
        gate = layer.gate_of(self, v) if layer.is_ka else 0.0
        return ka_attention(q, k, v, gate=gate, scale=self.scaling, window=layer.window if cuts else None), *gates

    def after(self, a: Tensor, *gates: Tensor) -> Tensor:
        a = a.transpose(1, 2).flatten(2)
        return self.o_proj(F.silu(gates[0]) * a if gates else a)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        q, k, v, *gates = self.before(hidden_states, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        a, _ = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        if "ka_output_gate" in kwargs:  # the attention function has multiplied
            gates = []
        return self.after(a.transpose(1, 2), *gates), None


class GatedConvolution(Mixer):
    """LFM2's short convolution: ``out_proj(c · conv(b · x))``, b, c, x projections of h; ``output_gate`` as above.

    Its convolution starts as the identity, or ``drawn``.
    """

    def __init__(self, size: int, *, output_gate: bool, drawn: bool) -> None:
        super().__init__()
        self.in_proj = nn.Linear(size, 3 * size, bias=False)
        self.convolution = ShortConvolution(size, identity=not drawn, drawn=drawn)
        self.out_gate = nn.Linear(size, size, bias=False) if output_gate else None
        self.o_proj = nn.Linear(size, size, bias=False)

    def before(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        b, c, x = self.in_proj(h).chunk(3, -1)
        return (b * x, c) if self.out_gate is None else (b * x, c, self.out_gate(h))

    def after(self, *tensors: Tensor) -> Tensor:
        x, c, *gates = tensors
        a = c * self.convolution(x)
        return self.o_proj(F.silu(gates[0]) * a if gates else a)


class NoMixing(Mixer):
    """``o_proj(silu(W_g h) · W_v h)``: a gated layer in the place of attention in which no token meets another."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.v_proj, self.out_gate, self.o_proj = (nn.Linear(size, size, bias=False) for _ in range(3))

    def before(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(together(h, self.v_proj, self.out_gate))

    def after(self, *tensors: Tensor) -> Tensor:
        v, gate = tensors
        return self.o_proj(F.silu(gate) * v)
