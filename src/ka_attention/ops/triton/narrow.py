"""The plan for narrow windows: three kernels a pass, or four for windows of more than 17 tokens."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
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
        self.before, self.solved, self.heads = before, before > tiles.NARROW_BLOCK, self.B * self.H
        self.options = tiles.narrow_options(before, q)
        blocks = triton.cdiv(self.T, tiles.NARROW_BLOCK)
        reach = before // tiles.NARROW_BLOCK  # the walk takes as many blocks a step
        # Up to 17 tokens the gradients walk over the segments, too.
        most = self.options["segments" if da is None or self.solved else "spans"]
        parts = tiles.segments(self.device, self.heads, blocks, most)
        self.span = triton.cdiv(blocks, parts * reach) * reach
        self.segments = triton.cdiv(blocks, self.span)
        self.width = tiles.narrow_width(before, self.save)
        apart = self.packed or self.constants["HAS_MASK"]
        # Where a walk must look for what is not finite, it is one by itself.
        self.walks_at_once = self.segments > 1 and not self.solved and not apart
        self.constants |= {"BEFORE": before, "WIDTH": self.width, "APART": apart, "WHOLE": self.segments == 1,
                           "SOLVED": self.solved}  # fmt: skip
        scale, _, softcap, _ = others[-4:]
        self.numbers = scale, softcap or 0.0, self.H, self.T, self.P, self.window
        self.weights, self.gradients = self._weights(), self._gradients()
        self.constants["A_ROW"] = self.H * self.D if self.given else self.D
        walk = self.v, self.gate, self.u_past, self.H, self.T, self.P
        adjoint = self.da, self.gate, self.H, self.T
        self.maps, self.apply = (self._walk(walk_kernel, *walk, MAPS=maps) for maps in (True, False))
        self.adjoint_maps, self.adjoint_apply = (
            self._walk(adjoint_walk_kernel, *adjoint, MAPS=maps) for maps in (True, False)
        )
        self.scan, self.reverse_scan = self._scan(self.D, False), self._scan(self.D, True)
        self.wide_scan = self._scan(self.D + before, False)  # with M beside c
        group = 0 if self.save or self.segments < tiles.MANY else math.isqrt(self.segments)
        self.groups = triton.cdiv(self.segments, group or self.segments)  # composed first, then each is scanned
        self.scans = [self._scan(self.D, False, group, compose=x) for x in (True, False)] if group else [self.scan]

    def _weights(self) -> Launch:
        """One program for as many rows as a block reaches back, or a segment, and head."""
        options = self.options["weights_and_walk" if self.walks_at_once else "weights_kernel"]
        span, segments = (self.span, self.segments) if self.walks_at_once else (1, triton.cdiv(self.T, options["ROWS"]))
        strides = self.q, self.k, self.v, self.gate, self.k_past, self.u_past, self.mask
        return self.launch(
            weights_kernel, (self.heads * segments,), *strides, *self.numbers, span, segments,
            WALK=self.walks_at_once, **options,
        )  # fmt: skip

    def _gradients(self) -> Launch:
        """One program a segment and head, or some tiles of rows and head."""
        options, span, segments = self.options["gradients_kernel"], self.span, self.segments
        if self.solved:
            blocks = triton.cdiv(self.T, options["ROWS"])
            span = triton.cdiv(blocks, tiles.segments(self.device, self.heads, blocks, self.options["spans"]))
            segments = triton.cdiv(blocks, span)
        strides = self.da, self.q, self.k, self.v, self.gate, self.k_past, self.u_past, self.mask
        return self.launch(
            gradients_kernel, (self.heads * segments,), *strides, *self.numbers, span, segments, **options
        )

    def _walk(self, kernel, *numbers, MAPS: bool) -> Launch:
        """One program a segment, head and some columns of the head dimension."""
        options = self.options[kernel.__name__]
        grid = self.heads * self.segments, triton.cdiv(self.D, options["BD"])
        return self.launch(kernel, grid, *numbers, self.span, self.segments, MAPS=MAPS, **options)

    def _scan(self, width: int, reverse: bool, group: int = 0, compose: bool = False) -> Launch:
        options = {**self.options["scan_kernel"], "D": width, "COMPOSE": compose, "GROUPS": group > 0}
        columns, span = width + self.before if compose else width, group or self.segments
        grid = self.heads, triton.cdiv(columns, options["BD"]), triton.cdiv(self.segments, span)
        return self.launch(scan_kernel, grid, self.segments, span, REVERSE=reverse, **options)

    def forward(self, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, saved) -> None:
        if not self.save:
            saved = q.new_empty(*q.shape[:3], self.width)
        room: Any = (None, None, None) if self.segments == 1 else self._room(q)
        into, state, maps = room
        self._maps(q, k, v, gate, k_past, u_past, mask, self.starts(cu_seqlens), lse, saved, state, maps)
        if self.segments > 1:
            of_groups = [x.new_empty(*x.shape[:2], self.groups, *x.shape[3:]) for x in (state, maps)]
            for scan in self.scans:
                scan(state, maps, into, *of_groups)
        self.apply(v, gate, u_past, saved, into, a, cu_seqlens if self.given else None, None, None)

    def _maps(self, q, k, v, gate, k_past, u_past, mask, starts, lse, saved, state, maps) -> None:
        self.weights(q, k, v, gate, k_past, u_past, mask, starts, lse, saved, state, maps)
        if self.segments > 1 and not self.walks_at_once:
            self.maps(v, gate, u_past, saved, None, None, None, state, maps)

    def open(self, q, k, v, gate, k_past, u_past, a, lse, saved) -> tuple[Tensor, Tensor, Callable]:
        """A share over ranks (`backend.open`): all segments are one map more, and what each meets is affine, too."""
        _, state, maps = self._room(q)
        saved = saved if self.save else q.new_empty(*q.shape[:3], self.width)
        self._maps(q, k, v, gate, k_past, u_past, None, None, lse, saved, state, maps)
        state = F.pad(state, (0, self.before))
        state[:, :, 0, :, self.D :] = maps[:, :, 0]
        into = torch.empty_like(state)
        self.wide_scan(state, maps, into, None, None)
        last = slice(self.before - self.window + 1, None)
        both = (state[:, :, -1] + maps[:, :, -1] @ into[:, :, -1])[:, :, last].float()

        def close() -> tuple[Tensor, Tensor, Tensor]:
            before = F.pad(u_past, (0, 0, self.before - self.P, 0))[:, :, None]
            with torch.cuda.device_of(q):
                met = into[..., : self.D] + into[..., self.D :] @ before
                self.apply(v, gate, u_past, saved, met, a, None, None, None)
            return a, lse, saved

        return both[..., self.D :][..., last], both[..., : self.D], close

    def state_gradient(self, da, gate, saved) -> Tensor:
        into, state, maps = self._room(saved)
        self.adjoint_maps(da, gate, saved, None, None, state, maps)
        self.reverse_scan(state, maps, into, None, None)
        z = (state[:, :, 0] + maps[:, :, 0] @ into[:, :, 0]).float()
        past = slice(self.before - self.P, self.before)
        if self.solved:
            return z[:, :, past]
        z = z if gate is None else gate[:, :, : self.before, None] * z  # of the first block
        return saved[:, :, : self.before, past].float().mT @ (da[:, :, : self.before] + z)

    def backward(self, da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, saved) -> tuple:
        y = into = dk_past = du_past = None
        if self.segments > 1:
            into, state, maps = self._room(q)
            self.adjoint_maps(da, gate, saved, None, None, state, maps)
            self.reverse_scan(state, maps, into, None, None)
            del state, maps  # their memory serves for the gradients
        if self.solved:
            y = torch.empty_like(a)
            self.adjoint_apply(da, gate, saved, into, y, None, None)
        if u_past is not None:  # a window does not reach all cached tokens
            dk_past, du_past = (q.new_zeros(u_past.shape) for _ in range(2))
        dq, dk, dv = (torch.empty_like(a) for _ in range(3))
        dgate = None if gate is None else torch.empty_like(lse)
        self.gradients(
            da, q, k, v, gate, k_past, u_past, mask, self.starts(cu_seqlens), a, lse, y, into,
            dq, dk, dv, dgate, dk_past, du_past,
        )  # fmt: skip
        return dq, sum_groups(dk, k), sum_groups(dv, v), dgate, sum_groups(dk_past, k_past), du_past

    def _room(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each segment the state before it and c, [before, D], and M, [before, before]."""
        heads = self.B, self.H, self.segments, self.before
        return q.new_empty(*heads, self.D), q.new_empty(*heads, self.D), q.new_empty(*heads, self.before)
