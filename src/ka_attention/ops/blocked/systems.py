"""Unit triangular systems, many at once, by few large products."""

import torch
import torch.nn.functional as F
from torch import Tensor

LEAF = 16  # rows of the systems inverted by powers
INVERTED = 64  # rows of those inverted from smaller ones; beyond, substitution takes fewer operations


def take_diagonal(w: Tensor) -> Tensor:
    """The diagonal of w [n, rows, rows] as [n, rows, 1]; zeros take its place."""
    diagonal = w.diagonal(dim1=1, dim2=2)
    d = diagonal.clone()[..., None]
    diagonal.zero_()
    return d


def inverse(N: Tensor) -> Tensor:
    """(I − N)⁻¹ of strictly lower N [n, rows, rows]; rows are LEAF or twice, four times … as many."""
    power = _on_the_diagonal(N, LEAF)
    found = power.clone()
    found.diagonal(dim1=1, dim2=2).add_(1)
    for _ in range(LEAF.bit_length() - 2):  # N is nilpotent: (I − N)⁻¹ = (I + N)(I + N²)(I + N⁴)…
        power = power @ power
        found = torch.baddbmm(found, found, power)
    size = LEAF
    while size < N.shape[1]:  # that of [[I − A, 0], [−C, I − B]] is [[A', 0], [B' C A', B']] with A' = (I − A)⁻¹
        A, B = found.view(-1, 2, size, size).unbind(1)
        C = _on_the_diagonal(N, 2 * size, slice(size, None), slice(0, size))
        found = N.new_zeros(len(A), 2 * size, 2 * size)
        found[:, :size, :size], found[:, size:, size:], found[:, size:, :size] = A, B, B @ C @ A
        size *= 2
    return found


def _on_the_diagonal(N: Tensor, size: int, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
    """The blocks of this size on N's diagonal, or these rows and columns of each: [n · rows / size, …]."""
    blocks = N.unflatten(1, (-1, size)).unflatten(3, (-1, size)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
    return blocks[:, :, rows, columns].flatten(0, 1).contiguous()


def solve(N: Tensor, x: Tensor, upper: bool = False) -> Tensor:
    """(I − N)⁻¹ X, or (I − N)⁻ᵀ X where `upper`, of strictly lower N [n, rows, rows]. Changes x."""
    rows, size = N.shape[1], LEAF
    while size < min(rows, INVERTED):
        size *= 2
    if rows % size:
        short = size - rows % size
        return solve(F.pad(N, (0, short, 0, short)), F.pad(x, (0, 0, 0, short)), upper)[:, :rows]
    inverses = inverse(_on_the_diagonal(N, size)).unflatten(0, (-1, rows // size))
    if upper:
        N, inverses = N.mT, inverses.mT
    for i in reversed(range(rows // size)) if upper else range(rows // size):
        block, solved = slice(i * size, (i + 1) * size), slice((i + 1) * size, rows) if upper else slice(0, i * size)
        known = (
            x[:, block]
            if solved.start == solved.stop
            else torch.baddbmm(x[:, block], N[:, block, solved], x[:, solved])
        )
        x[:, block] = inverses[:, i] @ known
    return x
