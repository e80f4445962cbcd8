"""The plan for narrow windows: four kernels a pass, or two where a segment is the sequence."""

import torch
import triton
from torch import Tensor

from ka_attention.ops.triton import tiles
from ka_attention.ops.triton.launcher import Launch
from ka_attention.ops.triton.narrow_backward import adjoint_walk_kernel, gradients_kernel
from ka_attention.ops.triton.narrow_forward import scan_kernel, walk_kernel, weights_kernel
from ka_attention.ops.triton.plan import Plan, sum_groups


class Narrow(Plan):
    """Segments of `span` blocks, each of which reaches `before` tokens back."""

    def __init__(self, da, q, *others):
        super().__init__(da, q, *others)
        before = tiles.narrow_reach(q, self.window)
        assert before is not None
        self.before, self.options, self.heads = before, tiles.narrow_options(before, q), self.B * self.H
        blocks = triton.cdiv(self.T, tiles.NARROW_BLOCK)
        walks = self.heads * triton.cdiv(self.D, self.options["walk_kernel"]["BD"])
        reach = before // tiles.NARROW_BLOCK  # the walk takes as many blocks a step
        parts = tiles.segments(self.device, walks, blocks, self.options["segments"])
        self.span = triton.cdiv(blocks, parts * reach) * reach
        self.segments = triton.cdiv(blocks, self.span)
        self.width = tiles.narrow_width(before, self.save)
        apart = self.packed or self.constants["HAS_MASK"]
        self.constants |= {"BEFORE": before, "WIDTH": self.width, "APART": apart, "WHOLE": self.segments == 1}
        scale, _, softcap, _ = others[-4:]
        self.numbers = scale, softcap or 0.0, self.H, self.T, self.P, self.window
        self.weights, self.gradients = self._weights(), self._gradients()
        walk = self.v, self.gate, self.u_past
        self.maps, self.apply = (self._walk(walk_kernel, *walk, MAPS=maps) for maps in (True, False))
        self.adjoint_maps, self.adjoint_apply = (
            self._walk(adjoint_walk_kernel, self.da, self.gate, MAPS=maps) for maps in (True, False)
        )
        scan = self.options["scan_kernel"]
        grid = self.heads, triton.cdiv(self.D, scan["BD"])
        self.scan, self.reverse_scan = (
            self.launch(scan_kernel, grid, self.segments, REVERSE=reverse, **scan) for reverse in (False, True)
        )

    def _weights(self) -> Launch:
        """One program a tile of rows and head."""
        options = self.options["weights_kernel"]
        grid = (triton.cdiv(self.T, options["ROWS"]) * self.heads,)
        strides = self.q, self.k, self.gate, self.k_past, self.mask
        return self.launch(weights_kernel, grid, *strides, *self.numbers, **options)

    def _gradients(self) -> Launch:
        """One program for some tiles of rows and head."""
        options = self.options["gradients_kernel"]
        blocks = triton.cdiv(self.T, options["ROWS"])
        span = triton.cdiv(blocks, tiles.segments(self.device, self.heads, blocks, self.options["spans"]))
        groups = triton.cdiv(blocks, span)
        strides = self.q, self.k, self.v, self.gate, self.k_past, self.u_past, self.mask
        return self.launch(gradients_kernel, (groups * self.heads,), *strides, *self.numbers, span, groups, **options)

    def _walk(self, kernel, *strides, MAPS: bool) -> Launch:
        """One program a segment, head and some columns of the head dimension, or, of the adjoint, of the map."""
        options = self.options[kernel.__name__]
        columns = triton.cdiv(self.D, options["BD"])
        if kernel is adjoint_walk_kernel and MAPS:
            columns += triton.cdiv(self.before, options["BD"])
        numbers = self.H, self.T, self.P, self.span, self.segments
        return self.launch(kernel, (self.heads * self.segments, columns), *strides, *numbers, MAPS=MAPS, **options)

    def forward(self, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, saved) -> None:
        if not self.save:
            saved = q.new_empty(*q.shape[:3], self.width)
        self.weights(q, k, gate, k_past, mask, self.starts(cu_seqlens), lse, saved)
        into = state = maps = None
        if self.segments > 1:
            into, state, maps = self._room(q)
            self.maps(v, gate, u_past, saved, None, None, state, maps)
            self.scan(state, maps, into)
        self.apply(v, gate, u_past, saved, into, a, None, None)

    def backward(self, da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, saved) -> tuple:
        y, into = torch.empty_like(a), None
        dk_past = du_past = None
        if u_past is not None:  # a window does not reach all cached tokens
            dk_past, du_past = (q.new_zeros(u_past.shape) for _ in range(2))
        if self.segments > 1:
            into, state, maps = self._room(q)
            self.adjoint_maps(da, gate, saved, None, None, state, maps, None)
            self.reverse_scan(state, maps, into)
            del state, maps  # their memory serves for the gradients
        self.adjoint_apply(da, gate, saved, into, y, None, None, du_past)
        dq, dk, dv = (torch.empty_like(a) for _ in range(3))
        dgate = None if gate is None else torch.empty_like(lse)
        self.gradients(
            q, k, v, gate, k_past, u_past, mask, self.starts(cu_seqlens), a, lse, y, dq, dk, dv, dgate, dk_past
        )
        if dk_past is not None:
            dk_past = sum_groups(dk_past, k_past)
        return dq, sum_groups(dk, k), sum_groups(dv, v), dgate, dk_past, du_past

    def _room(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each segment the state before it and c, [before, D], and M, [before, before]."""
        heads = self.B, self.H, self.segments, self.before
        return q.new_empty(*heads, self.D), q.new_empty(*heads, self.D), q.new_empty(*heads, self.before)
