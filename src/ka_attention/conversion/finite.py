"""Training stops at the first number that is not finite, before a step could carry it into the weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class NotFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite."""


def require_finite(**tensors: Tensor | Sequence[Tensor]) -> None:
    """NotFiniteError, with the name, where one of the tensors holds NaN or infinity."""
    for name, given in tensors.items():
        for x in [given] if isinstance(given, Tensor) else given:
            if not x.isfinite().all():
                value = f" ({x.item()})" if x.numel() == 1 else ""
                raise NotFiniteError(f"the {name} is not finite{value}")
