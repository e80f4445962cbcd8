"""One step of decoding a window whose past lies in a ring: attend, and take the slot of the token that leaves.

Position p of a text lives in slot p mod S of a ring of S slots. So nothing moves and nothing grows, and the slot of a
new token is that of the one token in the ring that it does not see.
"""

import torch
from torch import Tensor

from ka_attention.ops import dispatch
from ka_attention.ops.api import cache_values
from ka_attention.ops.gates import clamp_gate
from ka_attention.ops.inputs import repeat_heads
from ka_attention.ops.one import attend_one


def ring_step(
    q: Tensor, k: Tensor, v: Tensor, ring: tuple[Tensor, Tensor], count: Tensor, *, gate: float | Tensor,
    bounds: tuple[float, float] = (-1.0, 1.0), window: int, mask: Tensor | None, scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """A of one new token, [B, Hq, 1, D]; its key and its U are in the ring then, in place.

    On a GPU this is one kernel, or two where slots are many; elsewhere, in float64, and where a compiler or autograd is
    to see it, PyTorch's operators.

    Args:
        q: query, [B, Hq, 1, D]; k, v: key and value, [B, Hkv, 1, D].
        ring: keys [B, Hkv, S, D] and U [B, Hq, S, D]. With gate 0 U is V and may have Hkv heads.
        count: how many tokens there are, the new one included; int64, without dimensions, on q's device.
        gate: 0, 1, [Hq] or [B, Hq, 1], any float dtype; brought within `bounds` here.
        window: the token attends to the last `window` positions, itself included; at most S.
        mask: bool [B or 1, Hq or 1, 1, L], its columns the last L positions, at least `window` of them or all.
        scale, softcap: as in `ka_attention`.
    """
    if q.device.type == "cuda" and _is_for_the_kernel(q, k, v, ring, gate):
        return dispatch.load("triton").step(q, k, v, ring, count, gate, bounds, window, mask, scale, softcap)
    keys, values = ring
    slots = torch.arange(keys.shape[2], device=q.device)
    last = count - 1
    slot = (last % keys.shape[2]).view(1)
    keys.index_copy_(2, slot, k)
    values.index_copy_(2, slot, repeat_heads(v, values))
    age = (last - slots) % keys.shape[2]
    seen = ((age < window) & (age <= last)).expand(1, 1, 1, -1)
    if mask is not None:
        column = last - age - (count - mask.shape[-1]).clamp(min=0)
        seen = seen & mask.index_select(-1, column.clamp(min=0))
    a = attend_one(q, keys, repeat_heads(values, q), seen, scale, softcap=softcap)
    if isinstance(gate, Tensor):
        gate = clamp_gate(gate.to(torch.promote_types(gate.dtype, torch.float32)), *bounds)
    if isinstance(gate, Tensor) or gate != 0:
        values.index_copy_(2, slot, cache_values(v, a, gate))
    return a


def _is_for_the_kernel(q: Tensor, k: Tensor, v: Tensor, ring: tuple[Tensor, Tensor], gate: float | Tensor) -> bool:
    """Whether the kernel, which computes in float32 and has no gradient, gives what PyTorch's operators give."""
    tensors = [q, k, v, *ring, *([gate] if isinstance(gate, Tensor) else [])]
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return q.dtype != torch.float64 and not trains and not dispatch.traced(*tensors)
