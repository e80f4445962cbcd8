"""Masks of KA layers: what transformers makes, as booleans, checked to let nothing see the future."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from ka_attention.ops import private
from ka_attention.ops.dispatch import traced


def ka_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The boolean masks of scaled_dot_product_attention, of the last ``kv_length`` positions where there are more.

    Only a static cache whose layers all have windows goes on beyond the positions that it has masks for.
    """
    if attention_mask is not None:
        kv_offset = max(kv_offset, attention_mask.shape[-1] - kv_length)
    elif isinstance(q_offset, Tensor):
        kv_offset = (q_offset + q_length - kv_length).clamp(min=kv_offset)
    return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, **kwargs)  # type: ignore[arg-type]


def as_bool(mask: Tensor) -> Tensor:
    """An additive mask of zeros and minus infinities as a boolean one, True where attention is allowed."""
    if mask.dtype == torch.bool:
        return mask
    seen = mask > torch.finfo(mask.dtype).min / 2
    wrong = "attention_mask: expected booleans, or 0 and -inf to be added, got other additive values"
    return _refuse(seen, lambda: seen & (mask != 0), wrong, mask)


def refuse_future(mask: Tensor, raw: Any, n: int) -> Tensor:
    """The mask, whose last columns are the ``n`` new tokens; ValueError if one of them is to see one after it.

    What KA-attention reads of a token is made of those before it alone. ``raw`` is the tensor that all layers get.
    """
    wrong = (
        "attention_mask: it lets tokens attend to later ones (images, a prefix, a 4-D mask that is not causal), which "
        "KA-attention and its windows cannot"
    )
    return _refuse(mask, lambda: mask[..., -n:].triu(1), wrong, raw, n)


def refuse_holes(mask: Tensor, raw: Any, ends: Tensor, n: int, window: int | None) -> Tensor:
    """The mask; ValueError if it hides something of what ``ends`` and ``window`` let tokens see."""
    wrong = (
        "attention_mask: it hides tokens within the sequences of cu_seq_lens_q (padding, a model that attends in "
        "chunks), give one of the two"
    )

    def hidden() -> Tensor:
        return band(in_one_sequence(~mask, ends, n), n, n, window, mask.device)

    return _refuse(mask, hidden, wrong, raw, n, window, ends, private.version(ends))


def _refuse(mask: Tensor, find: Callable[[], Tensor], wrong: str, raw: Any = None, *case: Any) -> Tensor:
    """The mask; ValueError where ``find`` finds something, or the device's RuntimeError where no one else may look.

    Looking waits for the device: a case is looked at once for the tensor ``raw``, which all layers get.
    """
    if traced(mask) or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return private.checked(mask, ~find().any(), wrong)
    right = getattr(raw, "_ka_right", ())
    case = private.version(raw), *case
    if case not in right:
        if bool(find().any()):
            raise ValueError(wrong)
        raw._ka_right = {*right, case}
    return mask


def band(mask: Tensor | None, n: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """The mask with causality and the window added, for ``n`` queries at the end of ``length`` keys."""
    distance = torch.arange(length - n, length, device=device)[:, None] - torch.arange(length, device=device)
    band = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return band[None, None] if mask is None else band & mask


def in_one_sequence(mask: Tensor | None, ends: Tensor, n: int) -> Tensor:
    """The mask cut to pairs of tokens of one packed sequence; ``ends`` are 0, …, n."""
    sequence = torch.searchsorted(ends[1:], torch.arange(n, device=ends.device), right=True)
    same = (sequence[:, None] == sequence)[None, None]
    return same if mask is None else mask & same
