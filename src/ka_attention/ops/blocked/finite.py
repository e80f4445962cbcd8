"""NaN and infinity stay where the token loop would have them.

A backend multiplies what may not be attended by a weight of 0, and 0 · NaN is NaN. So where an output is not finite,
the call is made once more with 0 in the place of every number that is not finite, and the rows that such a number
really reaches become NaN. Calls with finite outputs pay for one sum.
"""

import math

import torch
from torch import Tensor

from ka_attention.ops.inputs import repeat_heads


def is_finite(x: Tensor) -> bool:
    """Whether all of x is finite; False also where its sum overflows, which costs time and changes nothing."""
    return math.isfinite(x.sum().item())


def cleaned(*tensors: Tensor | None) -> list[Tensor | None]:
    """0 for every number that is not finite."""
    return [None if x is None else x.nan_to_num(0.0, 0.0, 0.0) for x in tensors]


def reached(tensors, mask: Tensor | None, window: int | None) -> Tensor:
    """Rows whose output depends on a number that is not finite, bool [B, Hq, T]; tensors: q, k, v, gate and past."""
    q, k, v, gate, k_past, u_past = tensors
    P = 0 if k_past is None else k_past.shape[2]
    rows = _bad(q)
    columns = repeat_heads(_bad(k if k_past is None else torch.cat([k_past, k], dim=2)), q)
    columns[:, :, P:] |= repeat_heads(_bad(v), q)
    if u_past is not None:
        columns[:, :, :P] |= _bad(u_past)
    out = torch.zeros_like(rows)
    for i in range(q.shape[2]):
        c = slice(0 if window is None else max(0, P + i - window + 1), P + i + 1)
        met = rows[:, :, i, None] | columns[:, :, c]
        if mask is not None:
            row = mask[:, :, min(i, mask.shape[2] - 1)]
            met = met & (row if mask.shape[3] == 1 else row[..., c])
        out[:, :, i] = met.any(-1)
        read = out[:, :, i] if gate is None else out[:, :, i] & (gate[:, :, i] != 0) | ~gate[:, :, i].isfinite()
        columns[:, :, P + i] |= read
    return out


def _bad(x: Tensor) -> Tensor:
    return ~x.isfinite().all(-1)
