"""One self-contained page about a text: what each head attends to, and where its output really comes from."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ka_attention.files import write_atomically
from ka_attention.report.render import templates


@dataclass(frozen=True)
class Inspection:
    """What attention does with one text of T ≥ 2 tokens, in L layers of H heads.

    title:   the page's heading.
    note:    a sentence about the model's attention.
    tokens:  the T tokens as text.
    layers:  a few words on each layer's attention.
    weights: W, ``[L, H, T, T]``, the causal softmax weights.
    sources: R, ``[L, H, T, T]``: output i is Σ_j R_ij V_j.
    hops:    ``[L, H, T]``, expected steps of the walk from each token.
    """

    title: str
    note: str
    tokens: Sequence[str]
    layers: Sequence[str]
    weights: np.ndarray
    sources: np.ndarray
    hops: np.ndarray

    def __post_init__(self) -> None:
        L, T = len(self.layers), len(self.tokens)
        if T < 2:
            raise ValueError(f"tokens: expected at least 2, got {T}")
        H = self.hops.shape[1]
        for name, shape in (("weights", (L, H, T, T)), ("sources", (L, H, T, T)), ("hops", (L, H, T))):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {getattr(self, name).shape}")


def write(inspection: Inspection, path: Path) -> None:
    """Write the page: one HTML file with its data, styles and script inside; it loads nothing. The text is escaped.

    Pointing at a cell of a map, a tap or the arrow keys name its tokens and their shares; the address keeps the choice
    (``#layer.head.row.column``). Shares are stored in 16 bits, exact to 0.002 % of the largest.
    """
    data = {
        "tokens": list(inspection.tokens),
        "layers": list(inspection.layers),
        "heads": inspection.hops.shape[1],
        "W": _packed(inspection.weights),
        "R": _packed(inspection.sources),
        "hops": inspection.hops.round(3).tolist(),
        "mean_hops": inspection.hops[..., 1:].mean(-1).round(3).tolist(),
        "mean_sink": inspection.sources[..., 1:, 0].mean(-1).round(5).tolist(),
    }
    template = templates.get_template("inspect.html")
    page = template.render(
        title=inspection.title,
        note=inspection.note,
        count=len(inspection.tokens),
        signed=bool((inspection.sources < 0).any()),
        data=data,
    )
    write_atomically(path, page)


def _packed(matrices: np.ndarray) -> dict[str, float | str]:
    """The lower triangles as base64 of little-endian int16, row by row, and the number that one step stands for."""
    rows, columns = np.tril_indices(matrices.shape[-1])
    scale = max(1.0, float(np.abs(matrices).max())) / 32767
    steps = np.rint(matrices[..., rows, columns] / scale).astype("<i2")
    return {"scale": scale, "base64": base64.b64encode(steps.tobytes()).decode()}
