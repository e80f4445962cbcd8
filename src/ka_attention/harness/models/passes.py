"""The passes of a Llama-like model as training wants them: compiled around the mixers, logits never all in memory.

The model stays what it is: `hidden_states` and `model(…)` compute the same, the parameters are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ka_attention.harness.models.mixers import together
from ka_attention.ops import private

CHUNK = 8192  # tokens whose logits are in memory at once
GRAPHS = 64  # that one function may have: of each mixer and each width of MLPs; PyTorch would stop at 8
IGNORED = -100  # a target without a loss


class Passes:
    """The passes of models on one device; compiled once for all layers and models of one shape.

    compiled: compile what stands around the mixers with Inductor, which takes a minute at first and pays on a GPU.
    graphs:   run what `ready` is given as CUDA graphs: small models wait for the processor otherwise.
    """

    def __init__(self, *, compiled: bool, graphs: bool = False) -> None:
        self.graphs = graphs
        private.allow_graphs(GRAPHS)

        def compile(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=False, fullgraph=True) if compiled else function

        self._before, self._after, self._norm = compile(_before), compile(_after), compile(_norm)
        self._score = compile(_score)

    def ready(self, function: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
        """``function`` of one tensor like ``example``, called so often that all is compiled; see `captured`."""
        if self.graphs:
            return captured(function, example)
        function(example)
        return function

    def hidden_states(self, model: Any, ids: Tensor) -> Tensor:
        """What the head reads, ``[B, T, size]``, for tokens ``[B, T]``."""
        decoder = model.model
        x = decoder.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        cos, sin = decoder.rotary_emb(x, position_ids=positions)
        for layer in decoder.layers:
            x = self._after(layer, x, *layer.self_attn.mix(*self._before(layer, x, cos, sin)))
        return self._norm(decoder.norm, x)

    def loss(self, model: Any, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of ``targets`` ``[B, T]`` that are not IGNORED, with its gradient."""
        hidden = self.hidden_states(model, ids).flatten(0, 1)
        return _Loss.apply(hidden, model.lm_head.weight, targets.flatten(), self._score)

    def token_losses(self, model: Any, ids: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of each target, float32 or better ``[B, T]``; 0 where a target is IGNORED.

        With gradients switched on it runs the graphs of the training; nothing is compiled anew.
        """
        hidden = self.hidden_states(model, ids).detach().flatten(0, 1)
        weight, flat = model.lm_head.weight.detach().to(hidden.dtype), targets.flatten()
        chunks = zip(hidden.split(CHUNK), flat.split(CHUNK), strict=True)
        with torch.no_grad():
            return torch.cat([self._score(h @ weight.T, t)[0] for h, t in chunks]).view(targets.shape)


def _before(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return layer.self_attn.before(layer.input_layernorm(x), cos, sin)


def _after(layer: Any, x: Tensor, *mixed: Tensor) -> Tensor:
    x = x + layer.self_attn.after(*mixed)
    gate, up = together(layer.post_attention_layernorm(x), layer.mlp.gate_proj, layer.mlp.up_proj)
    return x + layer.mlp.down_proj(layer.mlp.act_fn(gate) * up)


def _norm(norm: Any, x: Tensor) -> Tensor:
    """In the dtype in which matrices are multiplied."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    return norm(x).to(dtype)


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row of logits ``[N, V]``, float32 or better, and its gradient by them, in their dtype."""
    counted = targets != IGNORED
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    shifted = exact - exact.amax(-1, keepdim=True)
    total = shifted.exp().sum(-1, keepdim=True)
    wanted = torch.where(counted, targets, 0)[:, None]
    losses = (total.log() - shifted.gather(-1, wanted))[:, 0]
    columns = torch.arange(logits.shape[-1], device=logits.device)
    gradient = (shifted.exp() / total - (columns == wanted).to(exact.dtype)) * counted[:, None]
    return losses * counted, gradient.to(logits.dtype)


class _Loss(torch.autograd.Function):
    """Mean cross-entropy of ``hidden weightᵀ``, whose gradients are made chunk by chunk beside the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, score: Callable[..., Any]) -> Tensor:
        half = weight.to(hidden.dtype)
        count = (targets != IGNORED).sum().clamp(min=1)
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        by_hidden, by_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            losses, by_logits = score(hidden[part] @ half.T, targets[part])
            total += losses.sum()
            by_hidden[part] = by_logits @ half
            by_weight += by_logits.T @ hidden[part]
        ctx.save_for_backward(by_hidden, by_weight, count)
        return total / count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        by_hidden, by_weight, count = ctx.saved_tensors
        scale = gradient / count
        return by_hidden * scale.to(by_hidden.dtype), by_weight * scale, None, None


def captured(function: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """``function`` as one CUDA graph: its launches without the processor's time for them.

    The result is called with tensors like ``example``; what it returns is overwritten by the next call. ``function`` is
    called three times on the example before, and must do nothing but launch work on the device.
    """
    static = example.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(static)

    def replay(x: Tensor) -> Tensor:
        static.copy_(x, non_blocking=True)
        graph.replay()
        return out

    return replay
