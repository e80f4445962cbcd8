"""The plan for narrow windows: three kernels a pass, or one where a segment is the sequence."""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ka_attention.ops.triton import tiles
from ka_attention.ops.triton.launcher import Launch
from ka_attention.ops.triton.narrow_backward import adjoint_apply_kernel, adjoint_maps_kernel
from ka_attention.ops.triton.narrow_forward import apply_kernel, maps_kernel, scan_kernel
from ka_attention.ops.triton.plan import Plan, sum_groups


class Narrow(Plan):
    """Segments of `span` blocks of BM rows, BM the least that a block may have for its window."""

    def __init__(self, da, q, *others):
        super().__init__(da, q, *others)
        apart = self.packed or self.constants["HAS_MASK"]
        rows = tiles.narrow_rows(q, self.window, apart)
        assert rows is not None
        self.BM = rows
        blocks, heads = triton.cdiv(self.T, self.BM), self.B * self.H
        self.span = triton.cdiv(blocks, tiles.segments(self.device, heads, blocks))
        self.segments = triton.cdiv(blocks, self.span)
        self.width = 2 * self.BM if self.save else 0
        self.options = tiles.narrow_options(self.BM, q)
        self.constants["APART"] = apart
        scale, _, softcap, _ = others[-4:]
        self.numbers = scale, softcap or 0.0, self.H, self.T, self.P, self.window, self.span, self.segments
        self.grid = (heads * self.segments,)

    @cached_property
    def maps(self) -> Launch:
        strides = self.q, self.k, self.v, self.gate, self.k_past, self.u_past, self.mask
        return self._launch(maps_kernel, *strides, *self.numbers, WHOLE=self.segments == 1)

    @cached_property
    def apply(self) -> Launch:
        strides = self.v, self.gate, self.u_past
        return self._launch(apply_kernel, *strides, self.H, self.T, self.P, self.span, self.segments)

    @cached_property
    def adjoint_maps(self) -> Launch:
        return self._launch(adjoint_maps_kernel, self.da, self.gate, self.H, self.T, self.span, self.segments)

    @cached_property
    def adjoint_apply(self) -> Launch:
        strides = self.da, self.q, self.k, self.v, self.gate, self.k_past, self.u_past, self.mask
        return self._launch(adjoint_apply_kernel, *strides, *self.numbers, WHOLE=self.segments == 1)

    @cached_property
    def scan(self) -> Launch:
        return self._scan(reverse=False)

    @cached_property
    def reverse_scan(self) -> Launch:
        return self._scan(reverse=True)

    @cached_property
    def wide_scan(self) -> Launch:
        """With M beside c."""
        return self._scan(reverse=False, width=self.D + self.BM)

    def _scan(self, reverse: bool, width: int | None = None) -> Launch:
        width = width or self.D
        grid = self.B * self.H, triton.cdiv(width, tiles.SCAN_WIDTH)
        constants = {"D": width, "BD": tiles.SCAN_WIDTH, "BM": self.BM, "REVERSE": reverse}
        return self.launch(scan_kernel, grid, self.segments, **constants, **self.options["scan_kernel"])

    def _launch(self, kernel, *numbers, **constants) -> Launch:
        options = self.options[kernel.__name__]
        return self.launch(kernel, self.grid, *numbers, BM=self.BM, **constants, **options)

    def forward(self, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, saved) -> None:
        state, maps = self._room(q)
        if self.segments > 1 and not self.save:
            saved = q.new_empty(*q.shape[:3], 2 * self.BM)
        self.maps(q, k, v, gate, k_past, u_past, mask, self._starts(cu_seqlens), a, lse, saved, state, maps)
        if self.segments > 1:
            into = torch.empty_like(state)
            self.scan(state, maps, into)
            self.apply(v, gate, u_past, saved, into, a)

    def open(self, q, k, v, gate, k_past, u_past, a, lse, saved) -> tuple[Tensor, Tensor, Callable]:
        """A share over ranks (`backend.open`): all segments are one map more, and what each meets is affine, too."""
        state, maps = self._room(q)
        saved = saved if self.save else q.new_empty(*q.shape[:3], 2 * self.BM)
        self.maps(q, k, v, gate, k_past, u_past, None, None, a, lse, saved, state, maps)
        state = F.pad(state, (0, self.BM))
        state[:, :, 0, :, self.D :] = maps[:, :, 0]
        into = torch.empty_like(state)
        self.wide_scan(state, maps, into)
        last = slice(self.BM - self.window + 1, None)
        both = (state[:, :, -1] + maps[:, :, -1] @ into[:, :, -1])[:, :, last].float()

        def close() -> tuple[Tensor, Tensor, Tensor]:
            before = F.pad(u_past, (0, 0, self.BM - self.P, 0))[:, :, None]
            with torch.cuda.device_of(q):
                self.apply(v, gate, u_past, saved, into[..., : self.D] + into[..., self.D :] @ before, a)
            return a, lse, saved

        return both[..., self.D :][..., last], both[..., : self.D], close

    def state_gradient(self, da, gate, saved) -> Tensor:
        state, maps = self._room(saved)
        into = torch.empty_like(state)
        self.adjoint_maps(da, gate, saved, state, maps)
        self.reverse_scan(state, maps, into)
        z = (state[:, :, 0] + maps[:, :, 0] @ into[:, :, 0]).float()  # of the first block
        z = z if gate is None else gate[:, :, : self.BM, None] * z
        f = saved[:, :, : self.BM, 2 * self.BM - self.P :].float()
        return f.mT @ (da[:, :, : self.BM] + z)

    def backward(self, da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, saved) -> tuple:
        state, maps = self._room(q)
        into = torch.empty_like(state)
        if self.segments > 1:
            self.adjoint_maps(da, gate, saved, state, maps)
            self.reverse_scan(state, maps, into)
        dq, dk, dv = (torch.empty_like(a) for _ in range(3))
        dgate = None if gate is None else torch.empty_like(lse)
        dk_past = du_past = None
        if u_past is not None:  # a window does not reach all cached tokens
            dk_past, du_past = (q.new_zeros(u_past.shape) for _ in range(2))
        self.adjoint_apply(
            da, q, k, v, gate, k_past, u_past, mask, self._starts(cu_seqlens), a, lse, into,
            dq, dk, dv, dgate, dk_past, du_past,
        )  # fmt: skip
        if dk_past is not None:
            dk_past = sum_groups(dk_past, k_past)
        return dq, sum_groups(dk, k), sum_groups(dv, v), dgate, dk_past, du_past

    def _room(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """For the maps of the segments: c [B, H, segments, BM, D] and M [B, H, segments, BM, BM]."""
        heads = self.B, self.H, self.segments if self.segments > 1 else 0, self.BM
        return q.new_empty(*heads, self.D), q.new_empty(*heads, self.BM)

    def _starts(self, cu_seqlens: Tensor | None) -> Tensor | None:
        """The first token of each token's sequence, int32 [T]; a caller who has them gives [1, T] for `cu_seqlens`.
        Packed sequences are one sequence with a mask.
        """
        if cu_seqlens is None or cu_seqlens.ndim == 2:
            return cu_seqlens
        tokens = torch.arange(self.T, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        return cu_seqlens[torch.searchsorted(cu_seqlens, tokens, right=True) - 1].to(torch.int32)
