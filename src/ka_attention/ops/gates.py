"""Learned gates that stay in their bounds."""

import torch
from torch import Tensor


def clamp_gate(gate: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """The gate with values beyond [low, high] clamped, so that the bounds are reached exactly.

    There, a gradient passes only where a step of descent leads back inside: the bounds are never a trap, and nothing is
    pushed further beyond them, for ever and without effect.
    """
    if not torch.is_grad_enabled():  # a step of decoding, in which an autograd function takes longest of all
        return gate.clamp(low, high)
    return _Clamp.apply(gate, low, high)


class _Clamp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gate, low, high):
        return gate.clamp(low, high)

    @staticmethod
    def setup_context(ctx, inputs, output):
        gate, *ctx.bounds = inputs
        ctx.save_for_backward(gate)

    @staticmethod
    def backward(ctx, grad):
        (gate,) = ctx.saved_tensors
        low, high = ctx.bounds
        outward = ((gate <= low) & (grad > 0)) | ((gate >= high) & (grad < 0))
        return grad.masked_fill(outward, 0), None, None
