"""The plan without a window or with a wide one: a chain of blocks, or a band of them and a sweep."""

import torch
import triton
from torch import Tensor

from ka_attention.ops.triton.backward import columns_kernel, dq_kernel
from ka_attention.ops.triton.forward import forward_kernel
from ka_attention.ops.triton.launcher import Launch
from ka_attention.ops.triton.plan import Plan, sum_groups
from ka_attention.ops.triton.sweep import sweep_kernel
from ka_attention.ops.triton.tiles import Tiles, band, choose, links, reach, sweep_stages, wave

SWEEP_WIDTH = 16  # columns of the head dimension that a program of the sweep owns


class Wide(Plan):
    """Row blocks of BM rows, of which `band` are reached back by a sweep, or, where it is 0, `reach` by links."""

    def __init__(self, da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale, window, softcap, save):
        super().__init__(da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale, window, softcap, save)
        self.sequences = len(cu_seqlens) - 1 if self.packed else self.B
        read = 2 * (self.P + self.T) * self.D * q.element_size()  # a head's K and U
        self.wave = wave(self.device, self.H if self.packed else self.B * self.H, read)
        self.numbers = scale, softcap or 0.0, self.B, self.H, self.T, self.P, window or 0, self.wave
        table = self.table = choose(q)
        self.BM, self.band = table.forward.BM, band(q, window)
        chains = self.wave * (self.sequences if self.packed else 1)
        self.reach = self.band or min(reach(q, window), links(self.device, chains))
        self.width = (save + self.band) * self.BM
        self._make_launches()

    def forward(self, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, saved) -> None:
        u = a if gate is None or self.band else torch.empty_like(a)
        if self.band and not self.save:
            saved = q.new_empty(*q.shape[:3], self.width)
        schedule = self.schedule(cu_seqlens, self.BM)
        self.rows(q, k, v, gate, k_past, u_past, mask, cu_seqlens, schedule, a, u, lse, saved, self.flags(q))
        if self.band:
            self.forward_sweep(a, None, None, None, saved, cu_seqlens, a, None)

    def backward(self, da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, saved) -> tuple:
        y, delta = torch.empty_like(a), torch.empty_like(lse)
        u = a if gate is None else torch.empty_like(a)
        dgate = None if gate is None else torch.empty_like(lse)
        dk_past = du_past = None

        def query_gradients() -> Tensor:
            dq = torch.empty_like(a)
            rows = self.schedule(cu_seqlens, self.row_tiles.BM)
            self.queries(q, k, v, k_past, u_past, mask, cu_seqlens, rows, a, u, lse, saved, y, delta, dq)
            return dq

        if self.band:
            self.backward_sweep(da, v, gate, a, saved, cu_seqlens, y, u)
            dq = query_gradients()
        dk, dv = torch.empty_like(a), torch.empty_like(a)
        schedule = self.schedule(cu_seqlens, self.column_tiles.BM)
        self.columns(
            da, q, k, v, gate, None, mask, cu_seqlens, schedule, a, u, lse, saved, y, delta, dk, dv, None, dgate,
            self.flags(q),
        )  # fmt: skip
        if k_past is not None:
            dk_past, du_past = (torch.empty(u_past.shape, dtype=q.dtype, device=q.device) for _ in range(2))
            self.past_columns(
                None, q, k_past, v, None, u_past, mask, cu_seqlens, schedule, a, u, lse, None, y, delta, dk_past, None,
                du_past, None, None,
            )  # fmt: skip
        if not self.band:
            dq = query_gradients()
        return dq, sum_groups(dk, k), sum_groups(dv, v), dgate, sum_groups(dk_past, k_past), du_past

    def _make_launches(self) -> None:
        table, reach = self.table, {"REACH": self.reach}
        new, past = (self.q, self.k, self.v, self.gate), (self.k_past, self.u_past)
        banded = {"BAND": self.band > 0, "ROW": self.width}
        self.rows = self._launch(forward_kernel, table.forward, *new, *past, self.mask, **banded, **reach)
        self.column_tiles = table.banded if self.band else table.columns
        self.row_tiles = table.dq if self.window is None else table.banded
        columns, mode = (self.da, *new, None, self.mask), "solved" if self.band else "chain"
        self.columns = self._launch(columns_kernel, self.column_tiles, *columns, MODE=mode, **reach)
        rows, solved = (*new[:3], *past, self.mask), {"SOLVED": self.band > 0, "ROW": self.width}
        self.queries = self._launch(dq_kernel, self.row_tiles, *rows, **solved)
        if self.band:
            shape = (self.H * self.T * self.D, self.T * self.D, self.D)
            self.forward_sweep, self.backward_sweep = self._sweep(shape, False), self._sweep(self.da, True)
        if self.P:
            strides = None, self.q, self.k_past, self.v, None, self.u_past, self.mask
            constants = {"MODE": "past", "REACH": 0, "HAS_GATE": False, "K_ROW": self.k_past[2]}
            self.past_columns = self._launch(columns_kernel, table.columns, *strides, length=self.P, **constants)

    def _sweep(self, strides: tuple[int, ...], reverse: bool) -> Launch:
        """The sequential part of a window, over slices of the head dimension side by side."""
        return self.launch(
            sweep_kernel, (self.sequences * self.H, triton.cdiv(self.D, SWEEP_WIDTH)), strides, self.v, self.gate,
            *self.numbers[2:5], BD=SWEEP_WIDTH, BM=self.BM, REACH=self.band, PARTS=triton.next_power_of_2(self.band),
            ROW=self.width, STAGES=sweep_stages(self.device, self.band), REVERSE=reverse,
        )  # fmt: skip

    def _launch(self, kernel, tiles: Tiles, *strides, length: int | None = None, **constants) -> Launch:
        """One program a block and head. Lengths of packed sequences stay on the device: the grid is an upper bound."""
        blocks = triton.cdiv(self.T if length is None else length, tiles.BM) * self.sequences
        if self.packed:
            blocks = self.T // tiles.BM + self.sequences
        constants = {"BM": tiles.BM, "BN": tiles.BN, "RAGGED": self.ragged(tiles.BM)} | constants | tiles.options
        return self.launch(kernel, (blocks * self.H,), *strides, *self.numbers, **constants)

    def ragged(self, BM: int) -> bool:
        """Whether a sequence may end within a row block."""
        return self.packed or self.T % BM != 0

    def schedule(self, cu_seqlens: Tensor | None, BM: int) -> Tensor | None:
        """(sequence, rank) of each slot of a packed grid, int32 [slots, 2], by rank; spare slots lie beyond the length.

        Sequence s owns the slots from cu[s] // BM + s, which are at least as many as its blocks.
        """
        if cu_seqlens is None:
            return None
        first = cu_seqlens // BM + torch.arange(self.sequences + 1, device=cu_seqlens.device)
        slots = torch.arange(self.T // BM + self.sequences, device=cu_seqlens.device)
        sequence = torch.searchsorted(first, slots, right=True) - 1
        rank = slots - first[sequence]
        order = rank.argsort(stable=True)
        return torch.stack([sequence, rank], dim=1)[order].to(torch.int32)

    def flags(self, q: Tensor) -> Tensor | None:
        """For a chain the ticket, then the number of published blocks of each sequence and head."""
        chained = self.reach and not self.band
        return q.new_zeros(1 + self.sequences * self.H, dtype=torch.int32) if chained else None
