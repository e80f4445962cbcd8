"""Random inputs for the operator, and the ways in which the tests call it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ka_attention import ka_attention
from ka_attention.ops import reference
from ka_attention.ops.api import normalise


@dataclass
class Problem:
    """Inputs of one call. `leaves` have gradients; packed sequences have `lengths`, whose sum is T."""

    B: int = 2
    Hq: int = 4
    Hkv: int = 2
    T: int = 9
    D: int = 8
    P: int = 0
    gate: str = "one"  # one, zero, number, head, token, signed
    mask: str = "none"  # none, left, right, any, full
    window: int | None = None
    softcap: float | None = None
    lengths: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float64

    def __post_init__(self):
        if self.lengths:
            self.B, self.T, self.P, self.mask = 1, sum(self.lengths), 0, "none"
        self.q, self.k, self.v = (self._leaf(heads, self.T) for heads in (self.Hq, self.Hkv, self.Hkv))
        self.leaves = [self.q, self.k, self.v]
        self.options: dict = {"window": self.window, "softcap": self.softcap, "gate": self._gate()}
        if isinstance(self.options["gate"], Tensor):
            self.leaves.append(self.options["gate"])
        if self.P:
            self.options["past"] = self._leaf(self.Hkv, self.P), self._leaf(self.Hq, self.P)
            self.leaves += self.options["past"]
        if self.mask != "none":
            self.options["attn_mask"] = self._mask()
        if self.lengths:
            ends = torch.tensor((0, *self.lengths)).cumsum(0)
            self.options["cu_seqlens"] = ends.int()

    def _leaf(self, heads, length):
        return torch.randn(self.B, heads, length, self.D, dtype=torch.float64).to(self.dtype).requires_grad_()

    def _gate(self) -> float | Tensor:
        shape = (self.Hq,) if self.gate == "head" else (self.B, self.Hq, self.T)
        match self.gate:
            case "one":
                return 1.0
            case "zero":
                return 0
            case "number":
                return 0.4
            case "signed":
                return (2 * torch.rand(shape, dtype=torch.float64) - 1).requires_grad_()
        return torch.rand(shape, dtype=torch.float64).requires_grad_()

    def _mask(self) -> Tensor:
        columns = torch.arange(self.P + self.T)
        pads = torch.arange(self.B)[:, None] * (self.P + self.T) // (2 * self.B)
        match self.mask:
            case "left":
                return columns >= pads
            case "right":
                return columns < self.P + self.T - pads
            case "any":
                return torch.rand(self.B, self.P + self.T) < 0.6
        return torch.rand(self.B, 1, self.T, self.P + self.T) < 0.6

    def run(self, backend: str | None) -> Tensor:
        """The public operator, or the specification's token loop."""
        if backend != "token loop":
            return ka_attention(self.q, self.k, self.v, backend=backend, **self.options)
        o = {"scale": None, "past": None, "attn_mask": None, "cu_seqlens": None} | self.options
        call = normalise(
            self.q,
            self.k,
            self.v,
            o["gate"],
            o["scale"],
            o["window"],
            o["past"],
            o["attn_mask"],
            o["cu_seqlens"],
            o["softcap"],
        )
        return reference.token_loop(*call.tensors, **call.options)

    def gradients(self, out: Tensor, grad: Tensor | None = None) -> list[Tensor]:
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape) if grad is None else grad
        return list(torch.autograd.grad(out, self.leaves, grad))


OPTIONS = {
    "plain": {},
    "multi-head": {"Hkv": 4},
    "multi-query": {"Hkv": 1},
    "gate zero": {"gate": "zero"},
    "gate number": {"gate": "number"},
    "gate per head": {"gate": "head"},
    "gate per token": {"gate": "token"},
    "gate signed": {"gate": "signed"},
    "window": {"window": 3},
    "past": {"P": 4},
    "softcap": {"softcap": 1.5},
    "left padding": {"mask": "left"},
    "right padding": {"mask": "right"},
    "padding anywhere": {"mask": "any", "P": 3},
    "full mask": {"mask": "full"},
    "packed": {"lengths": (3, 0, 1, 5)},
    "all with past": {"P": 5, "window": 4, "mask": "full", "softcap": 2.0, "gate": "token"},
    "all packed": {"lengths": (4, 3), "window": 2, "softcap": 2.0, "gate": "signed"},
}
