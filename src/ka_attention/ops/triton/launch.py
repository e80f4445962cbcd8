"""The Triton backend: what docs/architecture.md asks of a backend, as kernel launches and nothing else."""

import torch
import triton
from torch import Tensor

from ka_attention.ops.triton.backward import columns_kernel, dq_kernel, prepare_kernel
from ka_attention.ops.triton.decode import join_kernel, split_kernel
from ka_attention.ops.triton.forward import forward_kernel
from ka_attention.ops.triton.sweep import sweep_kernel
from ka_attention.ops.triton.tiles import Tiles, choose, longest_reach, padded, sweep_stages, sweep_width

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
DECODE_STEP = 64  # cached positions a step
DECODE_PROGRAMS = 1024  # several a multiprocessor
MAX_PARTS = 64


def forward(q, k, v, gate, k_past, u_past, mask, cu_seqlens, *, scale, window, softcap):
    """A [B, Hq, T, D] and the log-sum-exp [B, Hq, T], both contiguous. Same input, same bits."""
    call = _Call(q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale, window, softcap)
    a = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if call.k_past is not None and call.u_past is not None and call.T == 1 and window != 1:
        with torch.cuda.device_of(q):
            call.decode(call.k_past, call.u_past, a, lse, mask)
        return a, lse
    tiles = choose(q).forward
    mode, reach = call.mode(tiles)
    u = a if gate is None or mode != "chain" else torch.empty_like(a)
    band = call.band(reach * tiles.BM) if mode == "band" else None
    with torch.cuda.device_of(q):
        forward_kernel[call.grid(tiles)](
            call.q, call.k, call.v, gate, call.k_past, call.u_past, mask, cu_seqlens, call.schedule(tiles), a, u, lse,
            band, call.flags(mode),
            *map(_strides, (call.q, call.k, call.v, gate, call.k_past, call.u_past, mask)), *call.numbers,
            BM=tiles.BM, BN=tiles.BN, RAGGED=call.ragged(tiles), K_ROW=call.k.stride(2), V_ROW=call.v.stride(2),
            MODE=mode, REACH=reach, HAS_GATE=gate is not None, HAS_PAST=k_past is not None,
            WINDOW=window is not None, **call.constants, **tiles.options,
        )  # fmt: skip
        if band is not None:
            call.sweep(a, band, tiles, reach, reverse=False)
    return a, lse


def backward(da, q, k, v, gate, k_past, u_past, mask, cu_seqlens, a, lse, *, scale, window, softcap):
    """Gradients of q, k, v, gate, k_past, u_past; None for those that are absent. Same input, same bits."""
    call = _Call(q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale, window, softcap)
    table = choose(q)
    tiles = table.columns
    mode, reach = call.mode(tiles)
    da, a, lse = da.contiguous(), a.contiguous(), lse.contiguous()
    y, delta = torch.empty_like(a), torch.empty_like(lse)
    u = a if gate is None else torch.empty_like(a)
    dgate = None if gate is None else torch.empty_like(lse)
    dk_past = du_past = None

    def columns(mode, grid, k, u_past, dk, dv, du):
        g = None if mode == "past" else gate
        columns_kernel[grid](
            call.q, k, call.v, g, u_past, mask, cu_seqlens, call.schedule(tiles), a, u, lse, y, delta, links,
            dk, dv, du, dgate, call.flags(mode),
            *map(_strides, (call.q, k, call.v, g, u_past, mask)), *call.numbers,
            BM=tiles.BM, BN=tiles.BN, RAGGED=call.ragged(tiles), K_ROW=k.stride(2), V_ROW=call.v.stride(2),
            MODE=mode, HAS_GATE=g is not None, WINDOW=window is not None, **call.constants,
            **tiles.options,
        )  # fmt: skip

    def row_gradients():
        dq, tiles = torch.empty_like(a), table.dq
        dq_kernel[call.grid(tiles)](
            call.q, call.k, call.v, call.k_past, call.u_past, mask, cu_seqlens, call.schedule(tiles), a, u, lse, y,
            delta, dq,
            *map(_strides, (call.q, call.k, call.v, call.k_past, call.u_past, mask)), *call.numbers,
            BM=tiles.BM, BN=tiles.BN, RAGGED=call.ragged(tiles), K_ROW=call.k.stride(2), V_ROW=call.v.stride(2),
            SOLVED=mode != "chain", HAS_PAST=k_past is not None, WINDOW=window is not None, **call.constants,
            **tiles.options,
        )  # fmt: skip
        return dq

    with torch.cuda.device_of(q):
        band = call.band((reach + (mode == "chain")) * tiles.BM)
        prepare_kernel[call.grid(tiles)](
            da, call.q, call.k, call.v, gate, mask, cu_seqlens, call.schedule(tiles), a, u, lse, y, band,
            *map(_strides, (call.q, call.k, call.v, gate, mask)), *call.numbers,
            BM=tiles.BM, RAGGED=call.ragged(tiles), K_ROW=call.k.stride(2), V_ROW=call.v.stride(2), MODE=mode,
            REACH=reach, HAS_GATE=gate is not None, WINDOW=window is not None, **call.constants,
            **table.prepare.options,
        )  # fmt: skip
        if mode == "band":
            call.sweep(y, band, tiles, reach, reverse=True)
        links = band if mode == "chain" else None
        del band  # its memory serves for the gradients
        if mode != "chain":
            dq = row_gradients()
        dk, dv = torch.empty_like(a), torch.empty_like(a)
        columns("chain" if mode == "chain" else "solved", call.grid(tiles), call.k, None, dk, dv, None)
        if k_past is not None:
            dk_past, du_past = (torch.empty(u_past.shape, dtype=q.dtype, device=q.device) for _ in range(2))
            columns("past", call.grid(tiles, call.P), call.k_past, call.u_past, dk_past, None, du_past)
            dk_past = _sum_groups(dk_past, k_past)
        if mode == "chain":
            dq = row_gradients()
    return dq, _sum_groups(dk, k), _sum_groups(dv, v), dgate, dk_past, du_past


class _Call:
    """What the launches of one call share."""

    def __init__(self, q, k, v, gate, k_past, u_past, mask, cu_seqlens, scale, window, softcap):
        _check(q)
        self.q, self.k, self.v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
        self.k_past = None if k_past is None else _unit_stride(k_past)
        self.u_past = None if u_past is None else _unit_stride(u_past)
        self.cu_seqlens, self.window = cu_seqlens, window
        B, self.H, self.T, D = q.shape
        self.P = 0 if k_past is None else k_past.shape[2]
        self.sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
        self.numbers = scale, softcap or 0.0, B, self.H, self.T, self.P, window or 0
        precision = "half"
        if q.dtype == torch.float32:  # three tf32 products are as exact as one of float32
            precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
        self.constants = {
            "GROUP": self.H // k.shape[1], "D": D, "BD": padded(D), "HAS_MASK": mask is not None,
            "PACKED": cu_seqlens is not None, "Q_ROW": self.q.stride(2),
            "SOFTCAP": softcap is not None, "PRECISION": precision,
        }  # fmt: skip

    def mode(self, tiles: Tiles) -> tuple[str, int]:
        """How row blocks reach one another, see `forward_kernel`, and how many blocks back without waiting."""
        reach = triton.cdiv(self.T, tiles.BM) - 1
        if self.window is not None:
            reach = min(reach, triton.cdiv(self.window - 1, tiles.BM))
        if reach <= longest_reach(self.q.device, self.window is not None):
            return ("band" if reach else "single"), reach
        return "chain", 1

    def grid(self, tiles: Tiles, length: int | None = None) -> tuple[int]:
        """One program a block and head. Lengths of packed sequences stay on the device: the grid is an upper bound."""
        if self.cu_seqlens is not None:
            return ((self.T // tiles.BM + self.sequences) * self.H,)
        return (triton.cdiv(self.T if length is None else length, tiles.BM) * self.sequences * self.H,)

    def ragged(self, tiles: Tiles) -> bool:
        """Whether a sequence may end within a row block."""
        return self.cu_seqlens is not None or self.T % tiles.BM != 0

    def schedule(self, tiles: Tiles) -> Tensor | None:
        """(sequence, rank) of each slot of a packed grid, int32 [slots, 2], by rank; spare slots lie beyond the length.

        Sequence s owns the slots from cu[s] // BM + s, which are at least as many as its blocks.
        """
        if self.cu_seqlens is None:
            return None
        first = self.cu_seqlens // tiles.BM + torch.arange(self.sequences + 1, device=self.q.device)
        slots = torch.arange(self.T // tiles.BM + self.sequences, device=self.q.device)
        sequence = torch.searchsorted(first, slots, right=True) - 1
        rank = slots - first[sequence]
        order = rank.argsort(stable=True)
        return torch.stack([sequence, rank], dim=1)[order].to(torch.int32)

    def flags(self, mode: str) -> Tensor | None:
        """The ticket, then the number of published blocks of each sequence and head."""
        return self.q.new_zeros(1 + self.sequences * self.H, dtype=torch.int32) if mode == "chain" else None

    def band(self, width: int) -> Tensor:
        """Room for what joins each row block to its neighbours."""
        return self.q.new_empty(*self.q.shape[:3], width)

    def sweep(self, x: Tensor, band: Tensor, tiles: Tiles, reach: int, reverse: bool) -> None:
        """The sequential part of a window, over slices of the head dimension side by side."""
        D = self.q.shape[-1]
        width = min(sweep_width(reach), padded(D))
        precision = self.constants["PRECISION"]
        sweep_kernel[(self.sequences * self.H, triton.cdiv(D, width))](
            x, band, self.cu_seqlens, self.numbers[2], self.H, self.T, D=D, BD=width, BM=tiles.BM, REACH=reach,
            STAGES=sweep_stages(x.device, reach), PACKED=self.cu_seqlens is not None, RAGGED=self.ragged(tiles),
            REVERSE=reverse, DOT="ieee" if precision == "half" else precision,
        )  # fmt: skip

    def decode(self, k: Tensor, u: Tensor, a: Tensor, lse: Tensor, mask: Tensor | None) -> None:
        """One new token: parts of the cache (k, u) side by side, then their sum. The token's own gate has no effect."""
        P, heads = self.P, self.sequences * self.H
        if self.window is not None and self.window <= P:
            unseen = P - self.window + 1
            k, u, P = k[:, :, unseen:], u[:, :, unseen:], P - unseen
            mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., unseen:]
        BD, BN = self.constants["BD"], DECODE_STEP
        steps = triton.cdiv(P, BN)
        parts = min(steps, MAX_PARTS, max(1, DECODE_PROGRAMS // heads))
        split = triton.cdiv(steps, parts) * BN
        parts = triton.cdiv(P, split)
        part = self.q.new_empty(heads, parts, BD, dtype=torch.float32)
        top, total = self.q.new_empty(2, heads, parts, dtype=torch.float32)
        scale, softcap, *_ = self.numbers
        constants = {name: self.constants[name] for name in ("GROUP", "D", "BD", "HAS_MASK", "SOFTCAP")}
        split_kernel[heads, parts](
            self.q, k, u, mask, part, top, total, *map(_strides, (self.q, k, u, mask)),
            scale, softcap, self.H, P, split, BN=BN, STAGES=3 if split > 2 * BN else 1, **constants,
        )  # fmt: skip
        join_kernel[(heads,)](
            self.q, self.k, self.v, mask, part, top, total, a, lse,
            *map(_strides, (self.q, self.k, self.v, mask)),
            scale, softcap, self.H, P, parts, PARTS=triton.next_power_of_2(parts), **constants,
        )  # fmt: skip


def _check(q: Tensor) -> None:
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        raise RuntimeError(f"backend 'triton' needs a CUDA device, got q on {q.device}")
    if q.dtype not in DTYPES:
        raise RuntimeError(f"backend 'triton' takes bfloat16, float16 or float32, got {q.dtype}")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise RuntimeError(f"backend 'triton' takes head dimensions up to {MAX_HEAD_DIM}, got {q.shape[-1]}")


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, ...] | None:
    """Strides in elements, 0 along broadcast dimensions."""
    if x is None:
        return None
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _sum_groups(x: Tensor, like: Tensor) -> Tensor:
    """Sum gradients of query heads over the group that shares a key head."""
    return x if x.shape == like.shape else x.unflatten(1, (like.shape[1], -1)).sum(2)
