"""Adapters: small maps, one a layer and head, from an attention output A_j to what a KA cache serves in V_j's place.

An adapter is called with A ``[B, Hq, T, D]`` and returns the same shape and dtype, each token by itself. To be saved it
has an attribute ``spec``, a dictionary for JSON: its key ``kind`` names an entry of ADAPTERS, the rest are arguments to
that. `ka_attention.conversion.fitting` trains them on a frozen model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearAdapter(nn.Module):
    """V̂ = M A + b, with M ``[H, D, D]`` and b ``[H, D]``; starts as the identity, the plain swap of V for A."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.spec = {"kind": "linear", "heads": heads, "head_dim": head_dim}
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(self, a: Tensor) -> Tensor:
        dtype = torch.promote_types(a.dtype, self.weight.dtype)
        return (a.to(dtype) @ self.weight.mT.to(dtype) + self.bias[:, None]).to(a.dtype)


class MLPAdapter(nn.Module):
    """V̂ = A + W₂ gelu(W₁ A + b₁) + b₂ with a bottleneck of ``width`` a head; starts as the identity, the plain swap."""

    def __init__(self, heads: int, head_dim: int, width: int) -> None:
        super().__init__()
        self.spec = {"kind": "mlp", "heads": heads, "head_dim": head_dim, "width": width}
        self.down = nn.Parameter(torch.randn(heads, width, head_dim) * head_dim**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(heads, width))
        self.up = nn.Parameter(torch.zeros(heads, head_dim, width))
        self.up_bias = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(self, a: Tensor) -> Tensor:
        dtype = torch.promote_types(a.dtype, self.up.dtype)
        hidden = F.gelu(a.to(dtype) @ self.down.mT.to(dtype) + self.down_bias[:, None])
        return (a.to(dtype) + hidden @ self.up.mT.to(dtype) + self.up_bias[:, None]).to(a.dtype)


ADAPTERS: dict[str, Callable[..., nn.Module]] = {"linear": LinearAdapter, "mlp": MLPAdapter}


def build_adapter(spec: dict[str, Any]) -> nn.Module:
    """The adapter that ``spec`` describes, with fresh weights. ValueError for a spec that describes none."""
    settings = dict(spec)
    kind = settings.pop("kind", None)
    if kind not in ADAPTERS:
        raise ValueError(f"adapters: unknown kind {kind!r}, known are {sorted(ADAPTERS)}")
    try:
        return ADAPTERS[kind](**settings)
    except (TypeError, ValueError, RuntimeError, MemoryError, OverflowError) as error:
        raise ValueError(f"adapters: no {kind!r} can be built from {settings}: {error}".splitlines()[0]) from error
