"""A model over several processes, each of which reads a contiguous share of every text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ka_attention.hf.layer import Layer, Options
from ka_attention.hf.support import attention_modules, text_config
from ka_attention.ops import ka_attention

IGNORED = -100  # a label that is not asked for


def sequence_parallel(model: Any, group: Any) -> Any:
    """From now on every attention layer of the KA model ``model`` attends over the processes of ``group``, in place.

    Each process calls the model with its ``share`` of the same batch. Layers with a window exchange messages whose size
    does not depend on the length of the text; the others share out their heads (``ka_attention``'s ``group``).
    ``group`` is a ProcessGroup or one dimension of a DeviceMesh; None ends it. Parameters are alike on all processes,
    and their gradients have to be averaged over them, as DistributedDataParallel and FSDP do.

    ValueError for a model that is not a KA model, has adapters or attention dropout, or whose heads cannot be shared.
    """
    text = text_config(model)
    if text._attn_implementation != "ka":
        raise ValueError(f"model: {type(model).__name__} is no KA model, use ka_attention.hf.attach")
    group = group.get_group() if hasattr(group, "get_group") else group
    modules = attention_modules(model)
    layers = [Layer.of(module) for module in modules]
    if group is not None:
        if any(layer.has_adapter for layer in layers):
            raise ValueError("group: layers with adapters run token by token, in one process")
        if getattr(text, "attention_dropout", 0) or getattr(text, "attn_pdrop", 0):
            raise ValueError("group: attention dropout must be 0 where a text is split over processes")
        size = dist.get_world_size(group)
        heads = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        if any(layer.window is None for layer in layers) and any(number % size for number in heads):
            raise ValueError(
                f"group: layers without a window share out {heads[0]} query and {heads[1]} key heads, "
                f"which must be multiples of the {size} processes"
            )
    for module, layer in zip(modules, layers, strict=True):
        module.ka_layer = replace(layer, group=group)
    return model


def share(batch: dict[str, Tensor], group: Any) -> dict[str, Any]:
    """What this process of ``group`` gives the model of a batch that all of them hold.

    ``input_ids``, ``labels`` [B, T] and whatever else has T columns are cut into contiguous parts, in the order of the
    ranks; T must be a multiple of their number. Labels are shifted before the cut, so that the last token of a share
    is asked for the first of the next. The losses of the processes, averaged, are the loss of the whole batch.

    ValueError for a length that cannot be shared out, and for padding: pack sequences instead.
    """
    group = group.get_group() if hasattr(group, "get_group") else group
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    batch, length = dict(batch), batch["input_ids"].shape[1]
    if length % size:
        raise ValueError(f"batch: {length} tokens cannot be shared out to {size} processes, pad or cut the text")
    mask = batch.pop("attention_mask", None)
    if mask is not None and not bool(mask.all()):
        raise ValueError("batch: attention_mask hides tokens; a text over several processes has no padding")
    if "position_ids" not in batch:
        batch["position_ids"] = torch.arange(length, device=batch["input_ids"].device)[None].expand_as(
            batch["input_ids"]
        )
    if "labels" in batch and "shift_labels" not in batch:
        batch["shift_labels"] = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    own = slice(rank * length // size, (rank + 1) * length // size)
    cut: dict[str, Any] = {
        name: x[:, own].contiguous() if isinstance(x, Tensor) and x.ndim > 1 and x.shape[1] == length else x
        for name, x in batch.items()
    }
    if "shift_labels" in batch:
        cut["num_items_in_batch"] = (batch["shift_labels"] != IGNORED).sum() / size
    return {**cut, "use_cache": False}


def attend_share(
    module: nn.Module,
    layer: Layer,
    q: Tensor,
    k: Tensor,
    v: Any,
    mask: Tensor | None,
    options: Options,
    dtype: torch.dtype | None,
) -> Tensor:
    """Attention of this process's share of the text, ``[B, n, Hq, D]``; softmax attention is the gate 0."""
    if not isinstance(v, Tensor) or v.shape[2] != q.shape[2]:
        raise RuntimeError("a text that is split over processes is not cached: call the model with use_cache=False")
    if mask is not None:
        raise ValueError("attention_mask: a text that is split over processes has none; pack its sequences")
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    gate = layer.gate_of(module, v) if layer.is_ka else 0.0
    scale, window, softcap, _, ends = options
    out = ka_attention(
        q, k, v, gate=gate, scale=scale, window=window, cu_seqlens=ends, softcap=softcap, group=layer.group
    )
    return out.transpose(1, 2).contiguous()
