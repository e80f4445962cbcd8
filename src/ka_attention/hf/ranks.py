"""A model over several processes, each of which reads a contiguous share of every text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

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
    group = _process_group(group)
    modules = attention_modules(model)
    layers = [Layer.of(module) for module in modules]
    if group is not None:
        if any(layer.has_adapter for layer in layers):
            raise ValueError("group: layers with adapters run token by token, in one process")
        if getattr(text, "output_router_logits", False):
            raise ValueError("output_router_logits: the loss of routers looks at whole texts, which no process has")
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

    Padding stands at the ends of texts, where no token reads it, and is not asked for (label −100). Packed sequences
    may cross from one share into the next: their ends are ``cu_seq_lens_q``, or found in ``position_ids``. ValueError
    for other padding, for packed sequences in more than one row, and for a length that cannot be shared out.
    """
    group = _process_group(group)
    return _cut(batch, dist.get_rank(group), dist.get_world_size(group))


def _cut(batch: dict[str, Tensor], rank: int, size: int) -> dict[str, Any]:
    length = _length(batch)
    batch = dict(batch)
    if length % size:
        raise ValueError(f"batch: {length} tokens cannot be shared out to {size} processes, pad or cut the text")
    mask = batch.pop("attention_mask", None)
    if mask is not None:
        _check_padding(mask != 0, batch.get("labels"))
    if "cu_seq_lens_q" not in batch and "position_ids" in batch:
        batch |= _ends_of(batch["position_ids"])
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
    # It stands for none: without one transformers makes masks [n, n] of packed sequences and of a model's own windows.
    cut["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch["input_ids"].device)
    if "shift_labels" in batch:
        cut["num_items_in_batch"] = (batch["shift_labels"] != IGNORED).sum() / size
    return {**cut, "use_cache": False}


def _length(batch: dict[str, Tensor]) -> int:
    """T, of token ids, labels and positions alike."""
    shapes = {name: list(batch[name].shape) for name in ("input_ids", "labels", "position_ids") if name in batch}
    first, *others = shapes.get("input_ids", []), *shapes.values()
    if len(first) != 2 or any(len(shape) != 2 or shape[1] != first[1] for shape in others):
        raise ValueError(f"batch: expected input_ids, and labels and positions like them, [B, T], got {shapes}")
    return first[1]


def _ends_of(positions: Tensor) -> dict[str, Tensor]:
    """The ends of packed sequences, which begin where positions do not rise by one: a share would not show them all."""
    begins = (positions.diff(dim=1) != 1).nonzero()
    if not len(begins):
        return {}
    if len(positions) > 1:
        raise ValueError(f"position_ids: packed sequences stand in one row, got {len(positions)}")
    return {"cu_seq_lens_q": F.pad(F.pad(begins[:, 1] + 1, (1, 0)), (0, 1), value=positions.shape[1]).int()}


def _check_padding(seen: Tensor, labels: Tensor | None) -> None:
    if seen.ndim != 2 or bool((seen[:, 1:] & ~seen[:, :-1]).any()):
        raise ValueError("batch: attention_mask hides more than the ends of texts; split texts are padded there only")
    if labels is not None and bool((labels[~seen] != IGNORED).any()):
        raise ValueError(f"batch: labels of padding must be {IGNORED}")


def share_batches(loader: Any, group: Any) -> Any:
    """Let the processes of ``group`` read the same texts from ``loader``, each its share of them, in place.

    ``loader`` is accelerate's, as ``accelerator.prepare`` and a Trainer return it: it gives every process texts of its
    own, and from now on every group. Groups are of one size and hold consecutive ranks. ValueError for other groups,
    and for a loader that is not cut by process (``dispatch_batches``, a streamed dataset that was sharded).
    """
    group = _process_group(group)
    rank, size, members = dist.get_rank(group), dist.get_world_size(group), dist.get_process_group_ranks(group)
    first = members[0]
    if members != list(range(first, first + size)) or first % size or dist.get_world_size() % size:
        raise ValueError(f"group: groups hold consecutive ranks, {size} each, got {members} of {dist.get_world_size()}")
    inner = getattr(loader, "base_dataloader", loader)
    if isinstance(inner.collate_fn, _Cutting):
        return loader
    parts = [part for part in (inner.batch_sampler, inner.dataset) if hasattr(part, "num_processes")]
    if not parts and dist.get_world_size() > 1:
        raise ValueError("loader: expected one that accelerate shares out by batches, with dispatch_batches=False")
    for part in parts:
        part.num_processes, part.process_index = dist.get_world_size() // size, first // size
        if part.num_processes == 1:
            part.even_batches = False  # the last batch need not be as long as those of other groups
    inner.collate_fn = _Cutting(inner.collate_fn, rank, size)
    return loader


class _Cutting(NamedTuple):
    """Makes a batch as ``collate`` does, and cuts it; also in the processes of a loader, which have no group."""

    collate: Callable[[Any], dict[str, Tensor]]
    rank: int
    size: int

    def __call__(self, samples: Any) -> dict[str, Any]:
        return _cut(self.collate(samples), self.rank, self.size)


class SequenceParallelMixin:
    """In front of a Trainer, whose model was given to ``sequence_parallel``: its processes read shares of texts::

        class LongTextTrainer(SequenceParallelMixin, Trainer): ...

    Losses in its log, gradients and steps are those of one process with the same batch. Evaluation gives the loss
    alone. ValueError for what looks at whole texts: label smoothing, a loss function or metrics of one's own.
    """

    model: Any
    args: Any
    accelerator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sequence_group = Layer.of(attention_modules(self.model)[0]).group
        if self.sequence_group is None:
            raise ValueError("model: call ka_attention.hf.sequence_parallel(model, group) first")
        asked = {name: getattr(self, name) for name in ("label_smoother", "compute_loss_func", "compute_metrics")}
        if wrong := [name for name, value in asked.items() if value is not None]:
            raise ValueError(f"{wrong[0]}: a process holds shares of texts, of which the model computes the loss")
        if not self.args.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices must be True: shares have different numbers of labels")

    def get_train_dataloader(self) -> Any:
        return share_batches(super().get_train_dataloader(), self.sequence_group)  # type: ignore[misc]

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return share_batches(super().get_eval_dataloader(*args, **kwargs), self.sequence_group)  # type: ignore[misc]

    def get_total_train_batch_size(self, args: Any) -> int:
        total = super().get_total_train_batch_size(args)  # type: ignore[misc]
        return total // dist.get_world_size(self.sequence_group)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.gather_function = self._gather_once
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def _gather_once(self, losses: Tensor) -> Tensor:
        """One loss a text, of one process a group; a last batch that is not full was filled up with other texts."""
        size = dist.get_world_size(self.sequence_group)
        state = self.accelerator.gradient_state
        found = self.accelerator.gather(losses).unflatten(0, (-1, len(losses)))[::size].flatten()
        return found[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else found

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Any, None, None]:
        loss, _, _ = super().prediction_step(*args, **kwargs)  # type: ignore[misc]
        dist.all_reduce(loss, group=self.sequence_group)
        return loss / dist.get_world_size(self.sequence_group), None, None


def _process_group(group: Any) -> Any:
    is_mesh = hasattr(group, "get_group")
    if (is_mesh and group.ndim != 1) or not (group is None or hasattr(group, "size")):
        raise ValueError(f"group: expected a ProcessGroup or one dimension of a DeviceMesh, got {group!r}")
    return group.get_group() if is_mesh else group


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
    if mask is None or mask.numel() > 1:  # without that of `share` every process may have a text of its own
        raise ValueError(
            "attention_mask: expected that of ka_attention.hf.share, which cuts a text for a model over processes and "
            "has its sequences packed; with a Trainer use SequenceParallelMixin"
        )
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale, window, softcap, _, ends = options
    if not layer.is_ka and window is softcap is ends is None:
        from ka_attention.ops import ranks  # a PyTorch may be built without collectives

        out = ranks.by_heads(layer.group, partial(_softmax, scale=scale), q, k, v)
    else:
        gate = layer.gate_of(module, v) if layer.is_ka else 0.0
        out = ka_attention(
            q, k, v, gate=gate, scale=scale, window=window, cu_seqlens=ends, softcap=softcap, group=layer.group
        )
    return out.transpose(1, 2).contiguous()


def _softmax(q: Tensor, k: Tensor, v: Tensor, *, scale: float, **_: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
