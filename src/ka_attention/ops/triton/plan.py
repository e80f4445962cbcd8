"""What calls of one layout share: numbers, constants and launches, each made when first needed. It keeps no tensors."""

from typing import Any

import torch
import triton
from torch import Tensor

from ka_attention.ops.triton.launcher import Launch
from ka_attention.ops.triton.tiles import padded


class Plan:
    """The part of both kinds of plan: `wide.Wide` and, for narrow windows, `narrow.Narrow`."""

    def __init__(self, da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale, window, softcap, save):
        self.packed, self.window, self.save, self.device = cu_seqlens is not None, window, save, q.device
        self.given = self.packed and cu_seqlens.ndim == 2  # the first token of each token's sequence (`starts`)
        self.B, self.H, self.T, self.D = q.shape
        self.P = 0 if k_past is None else k_past.shape[2]
        self.da, self.q, self.k, self.v, self.gate = map(strides, (da, q, k, v, gate))
        self.k_past, self.u_past, self.mask = map(strides, (k_past, u_past, mask))
        self.precision = "half"
        if q.dtype == torch.float32:  # three tf32 products hold what one of float32 does
            self.precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
        self.constants: dict[str, Any] = {
            "GROUP": self.H // k.shape[1], "D": self.D, "BD": padded(self.D), "HAS_GATE": gate is not None,
            "HAS_PAST": k_past is not None, "HAS_MASK": mask is not None, "PACKED": self.packed,
            "Q_ROW": q.stride(2), "K_ROW": k.stride(2), "V_ROW": v.stride(2), "WINDOW": window is not None,
            "SOFTCAP": softcap is not None, "SAVE": save, "PRECISION": self.precision,
        }  # fmt: skip

    def starts(self, cu_seqlens: Tensor | None) -> Tensor | None:
        """The first token of each token's sequence, int32 [T]. Packed sequences are one sequence with a mask. A caller
        who has them gives [1, T] for `cu_seqlens`, and A, which lies as [1, T, Hq, D], of those tokens themselves.
        """
        if cu_seqlens is None or self.given:
            return cu_seqlens
        tokens = torch.arange(self.T, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        return cu_seqlens[torch.searchsorted(cu_seqlens, tokens, right=True) - 1].to(torch.int32)

    def launch(self, kernel: triton.JITFunction, grid: tuple[int, ...], *numbers, **constants) -> Launch:
        """`kernel` with those of all constants that it takes; what it takes of Triton stands in `constants`."""
        available = self.constants | constants
        chosen = {name: available[name] for name in kernel.arg_names if name in available}
        options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
        return Launch(kernel, grid, *numbers, **chosen, **options)


def strides(x: Tensor | None) -> Any:
    """Strides in elements, 0 along broadcast dimensions."""
    if x is None:
        return None
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def sum_groups(x: Tensor | None, like: Tensor | None) -> Any:
    """Sum gradients of query heads over the group that shares a key head; None where there are none."""
    if x is None or like is None or x.shape == like.shape:
        return x
    return x.unflatten(1, (like.shape[1], -1)).sum(2, dtype=x.dtype)
