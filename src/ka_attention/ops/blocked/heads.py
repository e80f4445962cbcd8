"""Tensors with batch and heads in one dimension, one entry for every query head."""

import torch
from torch import Tensor


def flat(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[B, H, L, D] as [B · heads, L, D]; contiguous, since PyTorch's fused attention never asks for strides."""
    x = x.to(dtype)[:, :, None].expand(-1, -1, heads // x.shape[1], -1, -1)
    return x.reshape(-1, *x.shape[3:]).contiguous()


def flat_gate(gate: Tensor | None) -> Tensor | None:
    """[B, Hq, T] as [B · Hq, T, 1]."""
    return None if gate is None else gate.reshape(-1, gate.shape[2], 1).contiguous()


def softmax_alone(gate: Tensor | None) -> bool:
    """Whether every gate is 0, so that U = V."""
    return gate is not None and not gate.any()


def sum_heads(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x [B, H, L, D] from that of its copies for query heads, [B · Hq, L, D]."""
    grad = grad.reshape(*x.shape[:2], -1, *x.shape[2:])
    return (grad[:, :, 0] if grad.shape[2] == 1 else grad.sum(2)).to(x.dtype)
