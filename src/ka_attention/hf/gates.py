"""Learned gates of KA layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init  # leaves parameters alone that were loaded from a file

from ka_attention.ops import clamp_gate


class KAGate(nn.Module):
    """The gate of one layer, kept in ``bounds``: a number a head, or for each token ``bias[h] + weight[h] · v``.

    heads:    query heads.
    start:    where every gate starts, or one number a head.
    bounds:   the interval of allowed gates, kept as `ka_attention.ops.clamp_gate` does.
    head_dim: D for gates of tokens, None for gates of heads.

    The number is called ``bias`` because trainers leave parameters of that name out of weight decay.
    """

    def __init__(
        self,
        heads: int,
        start: float | tuple[float, ...] = 1.0,
        bounds: tuple[float, float] = (0.0, 1.0),
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.start, self.bounds = start, bounds
        self.bias = nn.Parameter(torch.empty(heads))
        self.weight = None if head_dim is None else nn.Parameter(torch.empty(heads, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if isinstance(self.start, tuple):
            init.copy_(self.bias, torch.tensor(self.start))
        else:
            init.constant_(self.bias, self.start)
        if self.weight is not None:
            init.zeros_(self.weight)

    def forward(self, v: Tensor, in_bounds: bool = True) -> Tensor:
        """Values ``[B, Hkv, T, D]`` give gates ``[Hq]`` or ``[B, Hq, T]``, float32 or better.

        ``in_bounds=False`` leaves the bounds to the caller, and the dtype of a gate a head: it is the parameter then.
        """
        if not in_bounds and self.weight is None:
            return self.bias
        dtype = torch.promote_types(self.bias.dtype, torch.float32)
        gate = self.bias.to(dtype)
        if self.weight is not None:
            weight = self.weight.to(dtype).unflatten(0, (v.shape[1], -1))  # [Hkv, G, D]
            gate = (v.to(dtype) @ weight.mT).mT.flatten(1, 2) + gate[:, None]
        return clamp_gate(gate, *self.bounds) if in_bounds else gate
