"""Tile sizes: a small table instead of autotuning, so that a first call costs one compilation."""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = torch.device("cpu")
NARROW_BLOCK = 16  # rows of a block of a narrow window
MANY = 48  # segments of a sequence: so many are scanned in groups


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
    columns: Tiles  # BM of both is the same: they share the systems of the diagonal blocks
    dq: Tiles
    banded: Tiles  # of dq with a window, and of columns where a sweep is before them


def _table(rows: Tiles, columns: Tiles | None = None) -> Table:
    """The same tiles for all kernels, but for `columns`."""
    return Table(rows, columns or rows, rows, rows)


# Keyed by the padded head dimension, for half precision.
HOPPER = {
    64: _table(Tiles(64, 64, 4, 3), columns=Tiles(64, 64, 4, 1)),
    128: Table(
        forward=Tiles(64, 32, 4, 3),
        columns=Tiles(64, 32, 4, 2),
        dq=Tiles(128, 64, 8, 3),
        banded=Tiles(64, 64, 4, 2),
    ),
    256: _table(Tiles(64, 32, 4, 2), columns=Tiles(64, 64, 8, 2)),
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


def narrow_reach(q: Tensor, window: int | None) -> int | None:
    """How many tokens back a block of 16 rows may read, for a narrow window: 16, 32 or 64, so three sets of kernels
    serve them all. None for a wider window, for one of a single token, which reaches no other, and where registers
    would not hold so many rows of `q`.
    """
    if window is None or not 2 <= window <= 65:
        return None
    before = max(NARROW_BLOCK, 1 << (window - 2).bit_length())
    if q.device == INTERPRETED or (before == NARROW_BLOCK and q.element_size() == 2):
        return before
    return before if before * padded(q.shape[-1]) <= (1024 if q.dtype == torch.float32 else 8192) else None


def segments(device: torch.device, heads: int, blocks: int, most: int) -> int:
    """Into how many parts a head's `blocks` are divided: as many as make `most` a processor, and none too short."""
    return max(1, min(most * _processors(device) // heads, blocks // 4))


def narrow_width(before: int, save: bool) -> int:
    """Numbers a row that a narrow window keeps: its weights, and for a backward with several blocks of state S."""
    return before + NARROW_BLOCK + (NARROW_BLOCK if save and before > NARROW_BLOCK else 0)


def narrow_options(before: int, q: Tensor) -> dict[str, Any]:
    """Tiles, warps and stages of each kernel for narrow windows, and how many programs a processor gets: of the walks,
    for their `segments`, and of the gradients, for their `spans`.
    """
    D = 16 if q.device == INTERPRETED else padded(q.shape[-1])
    size, n = D * q.element_size() // 2, before // NARROW_BLOCK
    options = {
        "weights_kernel": {"ROWS": 16, "CHUNK": min(D, 32), "num_warps": 1, "num_stages": 3},
        "scan_kernel": {"BD": min(D, 32), "num_warps": n},
    }
    if before > NARROW_BLOCK:
        if D > 64 or q.device == INTERPRETED:  # blocks side by side have keys in common
            options["weights_kernel"] = {"ROWS": before, "CHUNK": min(D, 64), "num_warps": n, "num_stages": 2}
        return options | {
            "walk_kernel": {"BD": D, "STAGES": 3, "num_warps": 2},
            "adjoint_walk_kernel": {"BD": min(D, 64), "STAGES": 4, "num_warps": 2},
            "gradients_kernel": {"ROWS": 64, "STAGES": 1, "num_warps": max(4, D // 16)},
            "segments": 256 // D, "spans": 2 if D <= 64 else 1,
        }  # fmt: skip
    warps, most = max(1, size // 128), max(1, size // 64)
    return options | {
        "weights_and_walk": {"ROWS": 16, "CHUNK": D, "num_warps": warps, "num_stages": 3 if size <= 64 else 2},
        "walk_kernel": {"BD": min(D, 64), "STAGES": 4, "num_warps": 1},
        "adjoint_walk_kernel": {"BD": D, "STAGES": 3, "num_warps": warps},
        "gradients_kernel": {"ROWS": 16, "STAGES": 3 if size <= 128 else 1, "num_warps": most},
        "segments": 8, "spans": max(1, 8 // most),
    }  # fmt: skip


def reach(q: Tensor, window: int | None) -> int:
    """How many row blocks back rows read."""
    BM = choose(q).forward.BM
    return triton.cdiv(min(q.shape[2], window or q.shape[2]) - 1, BM)


def band(q: Tensor, window: int | None) -> int:
    """The same where the sweep takes those blocks, 0 where a chain does: for a longer reach the band costs more memory
    than keys and values do, and without a window the chain is faster even where there are two blocks.
    """
    blocks = reach(q, window)
    return blocks if window is not None and blocks <= 4 else 0


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
    return 2 if heads * 8 <= _processors(device) else 1


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
