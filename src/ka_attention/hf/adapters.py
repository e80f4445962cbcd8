"""Adapters, modules that map A to what later tokens read in V's place, and the registry to rebuild saved ones from.

An adapter is called with A ``[B, Hq, T, D]`` and returns the same shape, each token by itself. To be saved it has an
attribute ``spec``, a dictionary for JSON: its key ``kind`` names an entry of ADAPTERS, the rest are arguments to that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

ADAPTERS: dict[str, Callable[..., nn.Module]] = {}


def build_adapter(spec: dict[str, Any]) -> nn.Module:
    """The adapter that ``spec`` describes, with fresh weights. ValueError for a kind that is not in ADAPTERS."""
    settings = dict(spec)
    kind = settings.pop("kind", None)
    if kind not in ADAPTERS:
        raise ValueError(f"adapters: unknown kind {kind!r}, known are {sorted(ADAPTERS)}")
    return ADAPTERS[kind](**settings)
