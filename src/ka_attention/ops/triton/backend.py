"""The Triton backend: what docs/architecture.md asks of a backend, as kernel launches and nothing else."""

from collections.abc import Callable
from functools import cached_property, reduce
from operator import or_
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from ka_attention.ops.triton.backward import columns_kernel, dq_kernel, prepare_kernel
from ka_attention.ops.triton.forward import forward_kernel
from ka_attention.ops.triton.sweep import sweep_kernel
from ka_attention.ops.triton.tiles import Tiles, choose, links, longest_reach, padded, sweep_stages, wave

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
MAX_PLANS = 1024
SWEEP_WIDTH = 16  # columns of the head dimension that a program of the sweep owns


def outputs(q: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what `forward` returns, all contiguous: A [B, Hq, T, D], the log-sum-exp [B, Hq, T] and, with `save`, of
    each diagonal block the rows of S, where I + S = (I − L G)⁻¹.
    """
    return _outputs(q, choose(q).columns.BM if save else 0)


def _outputs(q: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, _ = q.shape
    a, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(B, H, T, dtype=torch.float32)
    return a, lse, q.new_empty((B, H, T, width) if width else 0)


def forward(q, k, v, gate, k_past, u_past, mask, cu_seqlens, *, scale, window, softcap, save):
    """`outputs`, filled. Same input, same bits."""
    q, k, v, k_past, u_past = map(_unit_stride, (q, k, v, k_past, u_past))
    plan = _plan(None, q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale, window, softcap, save)
    a, lse, solve = _outputs(q, plan.BM if save else 0)
    u = a if gate is None or plan.mode != "chain" else torch.empty_like(a)
    band, flags = plan.band(q), plan.flags(q)
    with torch.cuda.device_of(q):
        schedule = plan.schedule(cu_seqlens, plan.BM)
        plan.forward(q, k, v, gate, k_past, u_past, mask, cu_seqlens, schedule, a, u, lse, solve, band, flags)
        if plan.mode == "band":
            plan.forward_sweep(a, band, cu_seqlens)
    return a, lse, solve


def backward(da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, solve, *, scale, window, softcap):
    """Gradients of q, k, v, gate, k_past, u_past; None for those that are absent. Same input, same bits."""
    da, q, k, v, k_past, u_past = map(_unit_stride, (da, q, k, v, k_past, u_past))
    plan = _plan(da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale, window, softcap, True)
    a, lse, solve = a.contiguous(), lse.contiguous(), solve.contiguous()
    y, delta = torch.empty_like(a), torch.empty_like(lse)
    u = a if gate is None else torch.empty_like(a)
    dgate = None if gate is None else torch.empty_like(lse)
    dk_past = du_past = None

    def row_gradients() -> Tensor:
        dq = torch.empty_like(a)
        rows = plan.schedule(cu_seqlens, plan.row_tiles.BM)
        plan.rows(q, k, v, k_past, u_past, mask, cu_seqlens, rows, a, u, lse, y, delta, dq)
        return dq

    with torch.cuda.device_of(q):
        schedule = plan.schedule(cu_seqlens, plan.BM)
        if plan.mode != "chain":
            band = plan.band(q)
            plan.prepare(da, q, k, v, gate, mask, cu_seqlens, schedule, a, u, lse, solve, y, band)
            if plan.mode == "band":
                plan.backward_sweep(y, band, cu_seqlens)
            del band  # its memory serves for the gradients
            dq = row_gradients()
        dk, dv = torch.empty_like(a), torch.empty_like(a)
        plan.columns(
            da, q, k, v, gate, None, mask, cu_seqlens, schedule, a, u, lse, solve, y, delta, dk, dv, None, dgate,
            plan.flags(q),
        )  # fmt: skip
        if k_past is not None:
            dk_past, du_past = (torch.empty(u_past.shape, dtype=q.dtype, device=q.device) for _ in range(2))
            plan.past_columns(
                None, q, k_past, v, None, u_past, mask, cu_seqlens, schedule, a, u, lse, None, y, delta, dk_past, None,
                du_past, None, None,
            )  # fmt: skip
            dk_past = _sum_groups(dk_past, k_past)
        if plan.mode == "chain":
            dq = row_gradients()
    return dq, _sum_groups(dk, k), _sum_groups(dv, v), dgate, dk_past, du_past


class Launch:
    """One kernel on one grid with everything fixed but its tensors, and of those the dtypes and which are absent.

    `kernel[grid](…)` looks at all arguments to find the compiled kernel, which takes the processor longer than short
    sequences take the GPU. What it looks at is fixed here, but for one thing: whether pointers are multiples of 16. So
    once they all were, that compiled kernel is kept, and launched with bare pointers whenever they all are again.
    """

    def __init__(self, kernel, grid: tuple[int, ...], *numbers, **constants):
        self.kernel, self.numbers, self.constants = kernel, numbers, constants
        self.grid = (*grid, 1, 1)[:3]
        self.launch: Callable | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        aligned = reduce(or_, pointers) % 16 == 0
        if aligned and self.launch is not None:
            return self.launch(pointers)
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
        if aligned and isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            names = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
            rest = *self.numbers, *(self.constants[name] for name in names)
            self.launch = _launcher(compiled, self.grid, rest)


def _launcher(compiled: CompiledKernel, grid: tuple[int, ...], rest: tuple) -> Callable:
    """`compiled[grid]` on the current device, given what goes before `rest`; but what that does at every launch for the
    hooks of profilers is left out unless there are any.
    """
    observed, run, active = compiled[grid], compiled.run, driver.active
    stream, device = active.get_current_stream, active.get_current_device()
    fixed = compiled.function, compiled.packed_metadata, None, None, None  # no launch metadata, no hooks

    def launch(pointers: list[int]) -> None:
        hooks = triton.knobs.runtime
        if getattr(hooks.launch_enter_hook, "calls", True) or getattr(hooks.launch_exit_hook, "calls", True):
            observed(*pointers, *rest)
        else:
            run(*grid, stream(device), *fixed, *pointers, *rest)

    return launch


_plans: dict[tuple, "_Plan"] = {}


def _plan(*arguments) -> "_Plan":
    """The plan for calls whose arguments differ in nothing but the tensors' contents."""
    *tensors, scale, window, softcap, save = arguments
    q = tensors[1]  # all are on its device, of dtypes that follow from its own
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    layout = [None if x is None else (x.shape, x.stride()) for x in tensors]
    key = (q.dtype, q.device, tf32, scale, window, softcap, save, *layout)
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        plan = _plans[key] = _Plan(*arguments)
    return plan


class _Plan:
    """What calls of one layout share: numbers and constants, and the launches, each made when first needed.

    It keeps no tensors.
    """

    def __init__(self, da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale, window, softcap, save):
        _check(q)
        self.packed, self.window, self.device = cu_seqlens is not None, window, q.device
        B, self.H, self.T, self.D = q.shape
        self.P = 0 if k_past is None else k_past.shape[2]
        self.sequences = len(cu_seqlens) - 1 if self.packed else B
        self.da, self.q, self.k, self.v, self.gate = map(_strides, (da, q, k, v, gate))
        self.k_past, self.u_past, self.mask = map(_strides, (k_past, u_past, mask))
        read = 2 * (self.P + self.T) * self.D * q.element_size()  # a head's K and U
        self.wave = wave(self.device, self.H if self.packed else B * self.H, read)
        self.numbers = scale, softcap or 0.0, B, self.H, self.T, self.P, window or 0, self.wave
        table = self.table = choose(q)
        self.BM = table.columns.BM
        self.mode, self.reach = self._mode()
        self.row_tiles = table.dq if self.mode == "chain" else table.solved_dq
        self.precision = "half"
        if q.dtype == torch.float32:  # three tf32 products are as exact as one of float32
            self.precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
        self.constants = {
            "GROUP": self.H // k.shape[1], "D": self.D, "BD": padded(self.D), "HAS_GATE": gate is not None,
            "HAS_PAST": k_past is not None, "HAS_MASK": mask is not None, "PACKED": self.packed,
            "Q_ROW": q.stride(2), "K_ROW": k.stride(2), "V_ROW": v.stride(2), "WINDOW": window is not None,
            "SOFTCAP": softcap is not None, "SAVE": save, "PRECISION": self.precision,
        }  # fmt: skip

    @cached_property
    def forward(self) -> Launch:
        tiles = self.table.forward
        strides = self.q, self.k, self.v, self.gate, self.k_past, self.u_past, self.mask
        return self._launch(forward_kernel, tiles, self.grid(tiles), *strides, MODE=self.mode, REACH=self.reach)

    @cached_property
    def prepare(self) -> Launch:
        tiles = self.table.prepare
        strides = self.da, self.q, self.k, self.v, self.gate, self.mask
        return self._launch(prepare_kernel, tiles, self.grid(tiles), *strides, REACH=self.reach)

    @cached_property
    def columns(self) -> Launch:
        tiles = self.table.columns
        mode = "chain" if self.mode == "chain" else "solved"
        strides = self.da, self.q, self.k, self.v, self.gate, None, self.mask
        return self._launch(columns_kernel, tiles, self.grid(tiles), *strides, MODE=mode, REACH=self.reach)

    @cached_property
    def past_columns(self) -> Launch:
        tiles = self.table.columns
        strides = None, self.q, self.k_past, self.v, None, self.u_past, self.mask
        constants = {"MODE": "past", "REACH": 0, "HAS_GATE": False, "K_ROW": self.k_past[2]}
        return self._launch(columns_kernel, tiles, self.grid(tiles, self.P), *strides, **constants)

    @cached_property
    def rows(self) -> Launch:
        tiles = self.row_tiles
        solved = self.mode != "chain"
        strides = self.q, self.k, self.v, self.k_past, self.u_past, self.mask
        return self._launch(dq_kernel, tiles, self.grid(tiles), *strides, SOLVED=solved)

    @cached_property
    def forward_sweep(self) -> Launch:
        return self._sweep(reverse=False)

    @cached_property
    def backward_sweep(self) -> Launch:
        return self._sweep(reverse=True)

    def _sweep(self, reverse: bool) -> Launch:
        """The sequential part of a window, over slices of the head dimension side by side."""
        return Launch(
            sweep_kernel, (self.sequences * self.H, triton.cdiv(self.D, SWEEP_WIDTH)), *self.numbers[2:5],
            D=self.D, BD=SWEEP_WIDTH, BM=self.BM, REACH=self.reach, STAGES=sweep_stages(self.device, self.reach),
            PACKED=self.packed, RAGGED=self.ragged(self.BM), REVERSE=reverse,
            DOT="ieee" if self.precision == "half" else self.precision,
        )  # fmt: skip

    def _launch(self, kernel, tiles: Tiles, grid: tuple[int, ...], *strides, **constants) -> Launch:
        available = self.constants | {"BM": tiles.BM, "BN": tiles.BN, "RAGGED": self.ragged(tiles.BM)} | constants
        chosen = {name: available[name] for name in kernel.arg_names if name in available}
        return Launch(kernel, grid, *strides, *self.numbers, **chosen, **tiles.options)

    def _mode(self) -> tuple[str, int]:
        """How row blocks reach one another, see `forward_kernel`, and how many blocks back by links."""
        reach = triton.cdiv(self.T, self.BM) - 1
        if self.window is not None:
            reach = min(reach, triton.cdiv(self.window - 1, self.BM))
        if reach <= longest_reach(self.device, self.window is not None):
            return ("band" if reach else "single"), reach
        return "chain", links(self.device, self.wave * (self.sequences if self.packed else 1))

    def grid(self, tiles: Tiles, length: int | None = None) -> tuple[int]:
        """One program a block and head. Lengths of packed sequences stay on the device: the grid is an upper bound."""
        if self.packed:
            return ((self.T // tiles.BM + self.sequences) * self.H,)
        return (triton.cdiv(self.T if length is None else length, tiles.BM) * self.sequences * self.H,)

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
        return q.new_zeros(1 + self.sequences * self.H, dtype=torch.int32) if self.mode == "chain" else None

    def band(self, q: Tensor) -> Tensor | None:
        """Room for what joins each row block of a band to those it reaches, side by side."""
        return q.new_empty(*q.shape[:3], self.reach * self.BM) if self.mode == "band" else None


def _check(q: Tensor) -> None:
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        raise RuntimeError(f"backend 'triton' needs a CUDA device, got q on {q.device}")
    if q.dtype not in DTYPES:
        raise RuntimeError(f"backend 'triton' takes bfloat16, float16 or float32, got {q.dtype}")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise RuntimeError(f"backend 'triton' takes head dimensions up to {MAX_HEAD_DIM}, got {q.shape[-1]}")


def _unit_stride(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor | None) -> Any:
    """Strides in elements, 0 along broadcast dimensions."""
    if x is None:
        return None
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _sum_groups(x: Tensor, like: Tensor) -> Tensor:
    """Sum gradients of query heads over the group that shares a key head."""
    return x if x.shape == like.shape else x.unflatten(1, (like.shape[1], -1)).sum(2, dtype=x.dtype)
