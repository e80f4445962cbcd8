"""Fitting adapters to a frozen softmax model, from what its attention layers compute (docs/maths.md, the KA cache)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ka_attention.conversion.finite import NotFiniteError, require_finite
from ka_attention.errors import UserError
from ka_attention.hf.adapters import build_adapter
from ka_attention.hf.attach import use
from ka_attention.hf.heads import Heads
from ka_attention.hf.support import attention_modules, check_supported, text_config
from ka_attention.ops import reference

Loss = Literal["value", "output", "lm"]
Visit = Callable[[int, Tensor, Tensor, Tensor], None]


def new_adapters(model: Any, kind: str) -> dict[int, nn.Module]:
    """Fresh adapters, "linear" or "mlp" (bottleneck D / 2), for every layer of ``model``: the plain swap."""
    heads = Heads.of(text_config(model))
    spec = {"kind": kind, "heads": heads.query, "head_dim": heads.dim}
    if kind == "mlp":
        spec["width"] = max(1, heads.dim // 2)
    return {m.layer_idx: build_adapter(spec).to(next(m.parameters()).device) for m in attention_modules(model)}


@contextmanager
def states(model: Any, visit: Visit) -> Iterator[None]:
    """While open, every softmax layer calls ``visit(layer, W, V, A)`` in a forward pass without a cache.

    W ``[B, Hq, T, T]``, V and A = W V ``[B, Hq, T, D]``, float32 or better; V is repeated to the query heads.
    """

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        scale = options.get("scaling")
        w = reference.weights(
            q,
            k,
            None,
            mask,
            None,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            window=options.get("sliding_window"),
            softcap=options.get("softcap"),
        )
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).to(w.dtype)
        a = w @ v
        visit(module.layer_idx, w, v, a)
        return a.to(q.dtype).transpose(1, 2).contiguous(), None

    check_supported(model)
    AttentionInterface.register("ka_states", attend)
    AttentionMaskInterface.register("ka_states", sdpa_mask)
    text = text_config(model)
    before = text._attn_implementation
    text._attn_implementation = "ka_states"
    try:
        yield
    finally:
        text._attn_implementation = before


class LeastSquares:
    """Ridge regression y ≈ M x + b c for every head, from sums in float64, so that data may come in pieces.

    Minimises Σ ‖M x + b c − y‖² + λ ‖M − I‖². c is one number per row, 1 for an ordinary offset; λ is ``strength``
    times the mean of the diagonal of Σ x xᵀ. A large λ stays at the plain swap.
    """

    def __init__(self) -> None:
        self.xx: Any = 0.0  # [H, D + 1, D + 1]
        self.xy: Any = 0.0  # [H, D + 1, D]

    def add(self, x: Tensor, c: Tensor, y: Tensor) -> None:
        """x and y ``[B, H, T, D]``, c ``[B, H, T, 1]``."""
        rows = torch.cat([x, c], dim=-1).double().transpose(0, 1).flatten(1, 2)  # [H, B T, D + 1]
        self.xx = self.xx + rows.mT @ rows
        self.xy = self.xy + rows.mT @ y.double().transpose(0, 1).flatten(1, 2)

    def solve(self, strength: float) -> tuple[Tensor, Tensor]:
        """M ``[H, D, D]`` and b ``[H, D]``, float64."""
        scale = self.xx.diagonal(dim1=-2, dim2=-1)[:, :-1]
        penalty = F.pad(strength * scale.mean(-1, keepdim=True).expand_as(scale), (0, 1))  # the offset is free
        penalty = torch.diag_embed(penalty)
        solution = torch.linalg.solve(self.xx + penalty, self.xy + penalty[..., :-1])
        return solution[:, :-1].mT, solution[:, -1]


@torch.no_grad()
def fit_ridge(
    model: Any, sequences: Tensor, *, loss: Loss = "output", strength: float = 1e-4, batch_size: int = 16
) -> dict[int, nn.Module]:
    """Linear adapters in closed form, from the states of the softmax model over ``sequences`` (token ids ``[N, T]``).

    loss: "value" regresses V_j on A_j, every token alike. "output" minimises what a cache of V̂ would add to the
          attention outputs, Σ_i ‖Σ_{j<i} W_ij (V̂_j − V_j)‖²: M commutes with the weights, so this is the regression
          of (L V)_i on (L A)_i, where L is the strictly lower part of W.
    """
    if loss not in ("value", "output"):
        raise ValueError(f"loss: expected 'value' or 'output' for the closed form, got {loss!r}")
    problems = {m.layer_idx: LeastSquares() for m in attention_modules(model)}

    def visit(layer: int, w: Tensor, v: Tensor, a: Tensor) -> None:
        if loss == "value":
            problems[layer].add(a, torch.ones_like(a[..., :1]), v)
        else:
            past = w.tril(-1)
            problems[layer].add(past @ a, past.sum(-1, keepdim=True), past @ v)

    with states(model, visit):
        for batch in sequences.split(batch_size):
            model(input_ids=batch.to(model.device), use_cache=False)
    adapters = new_adapters(model, "linear")
    for layer, problem in problems.items():
        weight, bias = problem.solve(strength)
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise UserError(f"adapt: layer {layer} has no finite solution, its states are not finite")
        adapters[layer].load_state_dict({"weight": weight, "bias": bias})
    return adapters


def fit_gradient(
    model: Any,
    sequences: Tensor,
    adapters: dict[int, nn.Module],
    *,
    loss: Loss = "output",
    steps: int,
    batch_size: int = 16,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> list[float]:
    """Train ``adapters`` in place with AdamW (cosine schedule) on random batches; the model is frozen. Losses per step.

    loss: "value" and "output" as in `fit_ridge`, relative to ‖V‖² and ‖A‖², summed over layers, on the model's states.
          "lm" is the language-model loss with the adapters inside the token loop, end to end: exact and slow.

    UserError where a loss or a gradient is not finite; ``adapters`` are then those of the step before.
    """
    parameters = [p for adapter in adapters.values() for p in adapter.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.randint(len(sequences), (steps, batch_size), generator=torch.Generator().manual_seed(seed))
    errors: list[Tensor] = []

    def visit(layer: int, w: Tensor, v: Tensor, a: Tensor) -> None:
        with torch.enable_grad():
            error, of = adapters[layer](a) - v, v
            if loss == "output":
                error, of = w.tril(-1) @ error, a
            errors.append(error.square().sum() / of.square().sum())

    wanted = [(p, p.requires_grad) for p in model.parameters()]
    history: list[float] = []
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        for rows in order:
            batch = sequences[rows].to(model.device)
            if loss == "lm":
                with use(model, adapter=adapters):
                    total = model(input_ids=batch, labels=batch, use_cache=False).loss
            else:
                errors.clear()
                with states(model, visit), torch.no_grad():
                    model(input_ids=batch, use_cache=False)
                total = torch.stack(errors).sum()
            optimizer.zero_grad()
            try:
                require_finite(loss=total)
                total.backward()
                require_finite(gradient=[p.grad for p in parameters if p.grad is not None])
            except NotFiniteError as error:
                raise UserError(
                    f"adapt: {error} in step {len(history) + 1}, the adapters are those of the step before; "
                    f"try a learning rate below {learning_rate:g}"
                ) from None
            optimizer.step()
            schedule.step()
            history.append(total.item())
    finally:
        for parameter, required in wanted:
            parameter.requires_grad_(required)
    return history
