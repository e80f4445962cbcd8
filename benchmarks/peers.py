"""Relatives of KA-attention beside it on one GPU: the token loop, and two operators of flash-linear-attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.goals import Record
from benchmarks.timing import both_passes, called, inputs, replayed
from ka_attention import ka_attention

LOOPS = [(32, 8, 128, 64), (8, 8, 2048, 64)]
DELTAFORMERS = [(16, 8, 512, 64), (8, 8, 2048, 64), (1, 32, 8192, 128)]
DELTA_RULE = (1, 32, 8192, 64)
WINDOWS = (16, 64)


def token_loops() -> Iterator[Record]:
    """The reports' implementation, forward, as called."""
    for shape in LOOPS:
        q, k, v, _ = inputs(*shape)
        with torch.no_grad():
            took = {"loop": called(partial(token_loop, q, k, v)), "KA": called(partial(ka_attention, q, k, v))}
        yield {"section": "token loop", "case": "token loop", "shape": list(shape), "pass": "forward", "ms": took}


def token_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A_i = Σ_{j<i} W_ij A_j + W_ii V_i, one token after the other; q, k, v ``[B, H, T, D]``."""
    T, D = q.shape[2:]
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    w = (q @ k.mT * D**-0.5).float().masked_fill(later, -torch.inf).softmax(-1).to(q.dtype)
    a = torch.empty_like(v)
    for i in range(T):
        a[:, :, i] = (w[:, :, i, None, :i] @ a[:, :, :i])[:, :, 0] + w[:, :, i, i, None] * v[:, :, i]
    return a


def deltaformers() -> Iterator[Record]:
    """DeltaFormer's u_i = v_i − β_i Σ_{j<i} softmax(…)_ij u_j without the attention over u, which is what KA-attention
    computes in all. As called, for both: it is a loop over sequences and chunks in Python.
    """
    for shape in DELTAFORMERS:
        row = {"section": "DeltaFormer", "case": "fla DeltaFormer, its recursion", "shape": list(shape), "pass": "both"}
        yield row | _beside(_deltaformer, shape, None, called)


def delta_rules() -> Iterator[Record]:
    """The chunked delta rule beside KA-attention with a window: both keep a state of constant size."""
    for window in WINDOWS:
        row = {"section": "delta rule", "case": f"fla chunk_delta_rule, KA window {window}", "pass": "both"}
        yield row | {"shape": list(DELTA_RULE)} | _beside(_delta_rule, DELTA_RULE, window, replayed)


def _beside(
    peer: Callable[[], Callable[..., Any]],
    shape: tuple[int, int, int, int],
    window: int | None,
    timed: Callable[[Callable[[], object]], float],
) -> Record:
    """Milliseconds of forward and backward of both; or why the peer has none."""
    q, k, v, grad = inputs(*shape)
    try:
        took = timed(both_passes(peer(), *layer_inputs(q, k, v, grad)))
    except Exception as error:  # an optional library that is absent, or that this GPU or shape is too much for
        return {"ms": {}, "skipped": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
    ours = timed(both_passes(partial(ka_attention, window=window), (q, k, v), grad))
    return {"ms": {"peer": took, "KA": ours}}


def layer_inputs(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[list[Tensor], Tensor]:
    """Normalised q and k, v and β in (0, 1) as flash-linear-attention has them, ``[B, T, H, D]`` and ``[B, T, H]``."""
    x = [F.normalize(x.detach().float(), dim=-1).to(x.dtype) for x in (q, k)] + [v.detach()]
    x = [x.transpose(1, 2).contiguous() for x in x]
    beta = torch.rand(x[0].shape[:3], device=q.device).to(q.dtype)
    return [x.requires_grad_() for x in (*x, beta)], grad.transpose(1, 2).contiguous()


def _deltaformer() -> Callable[..., Tensor]:
    module: Any = importlib.import_module("fla.ops.deltaformer.parallel")

    def recursion(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        chunk = min(module.BLOCK_SIZE_C, q.shape[1])
        return module.ParallelDeltaformerFunction.apply(q, k, v, beta, chunk, None)

    return recursion


def _delta_rule() -> Callable[..., Any]:
    return importlib.import_module("fla.ops.delta_rule").chunk_delta_rule
