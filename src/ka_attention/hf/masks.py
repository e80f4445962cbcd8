"""Masks of KA layers: what transformers makes, as booleans, checked to let nothing see the future."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from ka_attention.ops import private


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
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not torch.compiler.is_compiling() and bool((~hidden & (mask != 0)).any()):
        raise ValueError("attention_mask: expected booleans, or 0 and -inf to be added, got other additive values")
    return ~hidden


def refuse_future(mask: Tensor, raw: Any, n: int) -> Tensor:
    """The mask, whose last columns are the ``n`` new tokens; ValueError if one of them is to see one after it.

    What KA-attention reads of a token is made of those before it alone. ``raw`` is the tensor that all layers get: it
    is looked at once, as looking waits for the device. Compiled code and CUDA graphs look on the device.
    """
    wrong = (
        "attention_mask: it lets tokens attend to later ones (images, a prefix, a 4-D mask that is not causal), which "
        "KA-attention and its windows cannot"
    )
    if torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return private.checked(mask, ~mask[..., -n:].triu(1).any(), wrong)
    seen = n, private.version(raw)
    if getattr(raw, "_ka_seen", None) != seen:
        if bool(mask[..., -n:].triu(1).any()):
            raise ValueError(wrong)
        raw._ka_seen = seen
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
