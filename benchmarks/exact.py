"""Whether shares give what one process gives: outputs and gradients of the operator, and losses of a training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from ka_attention import ka_attention
from ka_attention.hf import KAConfig, attach, sequence_parallel, share

Row = dict[str, Any]
HEADS, D = 8, 64
STEPS = 20
LLAMA: Any = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 8}  # fmt: skip

HYBRID: Any = {"pattern": "3:1", "window": 8, "gate": "head", "gate_init": 0.5}


def losses(device: torch.device, length: int) -> Row:
    """The same training of a hybrid in one process and over all, in float32: first and last loss, how far apart."""
    found = []
    group = dist.group.WORLD
    for split in (False, True):
        torch.manual_seed(0)
        with device:
            model = attach(LlamaForCausalLM(LlamaConfig(**LLAMA)), KAConfig(**HYBRID))
        run = DistributedDataParallel(sequence_parallel(model, group)) if split else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        random = torch.Generator().manual_seed(1)
        curve = []
        for _ in range(STEPS):
            ids = torch.randint(16, (2, length), generator=random).to(device)
            batch = {"input_ids": ids, "labels": ids}
            loss = run(**(share(batch, group) if split else batch)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.detach())
        found.append(torch.stack(curve))
    dist.all_reduce(found[1])
    one, shares = found[0], found[1] / dist.get_world_size()
    return {"part": "a training", "ranks": dist.get_world_size(), "tokens": length, "first": one[0].item(),
            "last": one[-1].item(), "apart": (one - shares).abs().max().item()}  # fmt: skip


def errors(device: torch.device, length: int, window: int | None, is_packed: bool) -> Iterator[Row]:
    """‖x − float32‖ / ‖float32‖ of outputs and gradients, the largest of them: in shares of ``length``, and in one
    process with the same dtype. A gate a token; packed sequences cross from rank to rank.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    text, own = ranks * length, slice(rank * length, (rank + 1) * length)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, text, D, device=device).requires_grad_() for _ in range(3))
    gate, grad = torch.rand(1, HEADS, text, device=device).requires_grad_(), torch.randn(1, HEADS, text, D).to(device)
    leaves = [q, k, v, gate]
    ends = torch.tensor([0, text // 3, text * 3 // 4, text], dtype=torch.int32, device=device) if is_packed else None

    def run(dtype: torch.dtype, s: slice, group: Any = None) -> list[Tensor]:
        inputs = [x[:, :, s].to(dtype) for x in (q, k, v)]
        a = ka_attention(*inputs, gate=gate[:, :, s], window=window, cu_seqlens=ends, group=group)
        grads = torch.autograd.grad(a, leaves, grad[:, :, s].to(dtype))
        for x in grads if group else ():
            dist.all_reduce(x)
        return [a.float() if group else a[:, :, own].float(), *grads]

    expected = run(torch.float32, slice(None))
    for dtype in (torch.bfloat16, torch.float32):
        apart = {}
        for name, s, group in (("one", slice(None), None), ("shares", own, dist.group.WORLD)):
            found = run(dtype, s, group)
            apart[name] = max(((x - y).norm() / y.norm()).item() for x, y in zip(found, expected, strict=True))
        yield {"part": "exact", "dtype": str(dtype).partition(".")[2], "window": window, "packed": is_packed,
               "ranks": ranks, "tokens": text, **apart}  # fmt: skip
