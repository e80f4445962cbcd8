"""What transformers prepares for every batch of requests, without what nobody reads here (read in 5.17 to 5.24)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ka_attention.hf.paged import Group


def prepare_less(inputs: Any, groups: Iterable[Group], device: torch.device) -> None:
    """Let the ``inputs`` of a batch processor, one set or two that take turns, leave out

    - the mask of all tokens with all: the model gets one that stands for none;
    - lists of places to read with room for all tokens of the cache, as blocks need less: all of a list goes to the GPU
      with every batch;
    - a list in Python of as many numbers as a batch may have tokens.
    """
    arguments, none = inputs.get_model_kwargs, torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    inputs.get_model_kwargs = lambda *args, **kwargs: {**arguments(*args, **kwargs), "attention_mask": none}
    pairs = getattr(inputs, "io_pairs", None)
    if pairs is not None:
        inputs.infer_carry_over_ids = partial(carried_over, inputs)
    for io in [inputs] if pairs is None else [io for pair in pairs for io in (pair.host_io, pair.device_io)]:
        held = io.read_index_storage
        longest = max(group.longest(io.max_requests_per_batch, held.shape[1]) for group in groups)
        io.read_index_storage = held[:, :longest].clone()
        if held.is_pinned():
            io.read_index_storage = io.read_index_storage.pin_memory()


def carried_over(inputs: Any) -> Tensor:
    """What `infer_carry_over_ids` gives, int32 [tokens]: for each token of the next batch that the one before, still on
    its way, is about to give, which of its outputs that is; −1 for the others.
    """
    now, before = (
        inputs.io_pairs[i].host_io.req_id_to_new_token_position for i in (inputs.current_pair, 1 - inputs.current_pair)
    )
    outputs = [(now[name], i) for i, name in enumerate(before) if name in now]
    ids = torch.full((inputs.max_batch_tokens,), -1, dtype=torch.int32)
    if outputs:
        at, which = torch.tensor(outputs).T
        ids[at] = which.int()
    return ids
