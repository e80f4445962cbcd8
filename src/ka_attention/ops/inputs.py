"""What a backend computes with, by name: eight tensors and three options (docs/architecture.md describes them)."""

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor


class Tensors(NamedTuple):
    """The tensors of a call, in the order of a backend's arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    k_past: Tensor | None
    u_past: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Those that may have a gradient."""
        return self.q, self.k, self.v, self.gate, self.k_past, self.u_past

    @property
    def may_train(self) -> bool:
        """Whether a gradient may be asked for."""
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self.differentiable)


class Options(TypedDict):
    """The options of a call, keyword arguments of a backend."""

    scale: float
    window: int | None
    softcap: float | None


class Call(NamedTuple):
    """A call whose arguments are checked and complete."""

    tensors: Tensors
    options: Options
