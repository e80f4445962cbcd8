"""Tile sizes: a small table instead of autotuning, so that a first call costs one compilation."""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = torch.device("cpu")
SCAN_WIDTH = 32  # columns of the head dimension that a program of the scan owns


class Tiles(NamedTuple):
    """Rows BM of a block, columns BN of a step, warps and pipeline stages."""

    BM: int
    BN: int
    warps: int
    stages: int

    @property
    def options(self) -> dict:
        return {"num_warps": self.warps, "num_stages": self.stages}


class Table(NamedTuple):
    """The tiles of each kernel for one architecture, dtype and head dimension."""

    forward: Tiles
    prepare: Tiles
    columns: Tiles  # BM of all those above is the same: they share the systems of the diagonal blocks
    dq: Tiles
    solved_dq: Tiles  # of dq where it runs before columns: a window is short, or all is one block


def _table(rows: Tiles, columns: Tiles | None = None) -> Table:
    """The same tiles for all kernels, but for `columns`."""
    return Table(rows, rows._replace(stages=1), columns or rows, rows, rows)


# Keyed by the padded head dimension, for half precision.
HOPPER = {
    64: _table(Tiles(64, 64, 4, 3), columns=Tiles(64, 64, 4, 1)),
    128: Table(
        forward=Tiles(64, 32, 4, 3),
        prepare=Tiles(64, 64, 4, 1),
        columns=Tiles(64, 32, 4, 2),
        dq=Tiles(128, 64, 8, 3),
        solved_dq=Tiles(64, 64, 4, 2),
    ),
    256: _table(Tiles(64, 32, 4, 2), columns=Tiles(64, 32, 8, 2)),
}
# For a GPU with 99 KiB of shared memory a block (sm_86, sm_89); runs everywhere.
SMALL = {
    64: _table(Tiles(64, 64, 4, 2), columns=Tiles(64, 64, 4, 1)),
    128: _table(Tiles(64, 32, 4, 2), columns=Tiles(64, 32, 4, 1)),
    256: _table(Tiles(32, 32, 4, 1), columns=Tiles(32, 16, 4, 1)),
}
FLOAT32 = {
    64: _table(Tiles(32, 32, 4, 1)),
    128: _table(Tiles(32, 32, 4, 1)),
    256: _table(Tiles(16, 16, 4, 1)),
}


def choose(q: Tensor) -> Table:
    """The tiles for queries like `q`."""
    if q.device == INTERPRETED:
        return _table(Tiles(32, 16, 1, 1))
    size = padded(q.shape[-1])
    if q.dtype == torch.float32:
        return FLOAT32[size]
    return (HOPPER if _roomy(q.device) else SMALL)[size]


def narrow_rows(q: Tensor, window: int | None, apart: bool) -> int | None:
    """Rows of a block that reaches no further than the one before it: 16, 32 or 64, so three kernels serve all narrow
    windows. None for a wider window, for one of a single token, which reaches no other, and where registers would not
    hold a block of so many rows of `q`; `apart`, for a mask or packed sequences, takes more of them.
    """
    if window is None or not 2 <= window <= 65:
        return None
    rows = max(16, 1 << (window - 2).bit_length())
    if q.device == INTERPRETED:
        return rows
    size = 1024 if q.dtype == torch.float32 else 4096
    if apart and rows == 32:
        size //= 2
    return rows if rows * padded(q.shape[-1]) <= size else None


def segments(device: torch.device, heads: int, blocks: int) -> int:
    """Into how many segments a narrow window divides a head's `blocks`: as many as run at once, none too short."""
    return max(1, min(8 * _processors(device) // heads, blocks // 4))


def narrow_options(BM: int, q: Tensor) -> dict[str, dict]:
    """Warps and stages of each kernel for narrow windows."""
    size = BM * padded(q.shape[-1]) * q.element_size() // 2
    warps, most = (4, 4) if BM == 64 else (max(1, size // 2048), max(1, size // 1024))
    return {
        "maps_kernel": {"num_warps": warps, "num_stages": 3 if size <= 1024 else 2},
        "scan_kernel": {"num_warps": BM // 16, "num_stages": 4},
        "apply_kernel": {"num_warps": warps, "num_stages": 3},
        "adjoint_maps_kernel": {"num_warps": warps, "num_stages": 3},
        "adjoint_apply_kernel": {"num_warps": most, "num_stages": 3 if size <= 1024 else 1},
    }


def longest_reach(device: torch.device, windowed: bool) -> int:
    """How many blocks back the sweep may read: beyond, the band costs more memory than keys and values do.

    Without a window the chain is faster even where there are two blocks.
    """
    if not windowed:
        return 0
    return 8 if _roomy(device) else 4


def wave(device: torch.device, heads: int, size: int) -> int:
    """How many of the heads advance together, each reading its `size` bytes of keys and values block after block.

    All of them, unless they would fill the L2 cache twice: then as many as leave a third of it to other things, but no
    fewer than one for 16 multiprocessors. With fewer the chain from block to block sets the pace.
    """
    cache = 1 << 14 if device == INTERPRETED else torch.cuda.get_device_properties(device).L2_cache_size
    if heads * size < 2 * cache:
        return heads
    most = max(cache * 2 // 3 // size, _processors(device) // 16)
    return triton.cdiv(heads, triton.cdiv(heads, most))


def links(device: torch.device, heads: int) -> int:
    """How many of the nearest blocks a block of the chain waits for one by one, all else being ready before.

    With few heads what a block computes beside the loop decides how fast the chain advances; with many it is only work.
    """
    return 3 if heads * 8 <= _processors(device) else 1


def sweep_stages(device: torch.device, reach: int) -> int:
    """How many steps ahead the sweep loads `reach` tiles each."""
    return max(2, min(4, (20 if _roomy(device) else 8) // reach))


def padded(D: int, interpreted: bool = triton.knobs.runtime.interpret) -> int:
    """The head dimension as the kernels see it: a power of two of at least 64."""
    return max(16 if interpreted else 64, 1 << (D - 1).bit_length())


def _processors(device: torch.device) -> int:
    return 16 if device == INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _roomy(device: torch.device) -> bool:
    """Whether a block may have 200 KB of shared memory."""
    if device == INTERPRETED:
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 200_000  # type: ignore[attr-defined]
