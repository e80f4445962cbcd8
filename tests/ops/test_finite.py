"""NaN and infinity reach the rows that read them, and no other, forward and backward."""

import pytest
import torch
from problems import Problem

from ka_attention import ka_attention

CASES = {
    "whole": {"T": 40},
    "gates": {"T": 20, "gate": "signed"},
    "gates of 0": {"T": 20, "gate": "zero", "window": 5},
    "window": {"T": 40, "window": 4},
    "past": {"T": 12, "P": 20},
    "left padding": {"T": 20, "P": 3, "mask": "left"},
    "full mask": {"T": 20, "mask": "full"},
    "packed": {"lengths": (10, 20, 7)},
    "one token": {"T": 1, "P": 20, "mask": "any", "B": 8},
}


def readers(problem: Problem, name: str, at: int) -> torch.Tensor:
    """Rows that read token `at` of this tensor, in batch entry 0, by the definition: bool [B, Hq, T]."""
    P, T, o = problem.P, problem.T, problem.options
    i, j = torch.arange(P, P + T)[:, None], torch.arange(P + T)
    sees = (j <= i) & (j > i - (o["window"] or P + T))
    if "cu_seqlens" in o:
        sequence = torch.searchsorted(o["cu_seqlens"][1:], j, right=True)
        sees = sees & (sequence[i] == sequence)
    mask = o.get("attn_mask", torch.ones(1, 1, 1, 1, dtype=torch.bool))
    sees = (sees & (mask[:, None, None] if mask.ndim == 2 else mask)).expand(problem.B, problem.Hq, T, P + T)
    reached = torch.zeros(problem.B, problem.Hq, T, dtype=torch.bool)
    column = at if name in ("k_past", "u_past") else P + at
    reads_outputs = problem.gate != "zero"
    for t in range(T):
        hit = sees[0, :, t, column] if name != "q" else sees[0, :, t].any(-1) & (t == at)
        through = (sees[0, :, t, P : P + t] & reached[0, :, :t]).any(-1)
        reached[0, :, t] = hit | through & reads_outputs
    return reached


def results(problem, leaves, da, backend):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    given = dict(problem.options)
    if problem.P:
        given["past"] = tuple(leaves[-2:])
    if isinstance(given["gate"], torch.Tensor):
        given["gate"] = leaves[3]
    out = ka_attention(*leaves[:3], backend=backend, **given)
    with torch.no_grad():
        torch.testing.assert_close(ka_attention(*leaves[:3], backend=backend, **given), out, equal_nan=True)
    return [out.detach(), *torch.autograd.grad(out, leaves, da)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["reference", "blocked", None])
@pytest.mark.parametrize("case", CASES)
def test_only_who_reads_it_is_reached(case, backend, value):
    problem = Problem(**CASES[case])
    names = ["q", "k", "v"] + ["gate"] * (problem.gate == "signed") + ["k_past", "u_past"] * (problem.P > 0)
    for name in (name for name in names if name != "gate"):
        at = problem.P // 2 if "past" in name else problem.T // 3
        leaves = [x.detach().clone() for x in problem.leaves]
        leaves[names.index(name)][0, :, at] = 0
        hidden = readers(problem, name, at)
        if backend is None and problem.T == 1 and hidden.any():
            continue  # PyTorch's own attention: its gradient there is NaN even for a gradient of 0
        da = torch.randn(problem.q.shape, dtype=torch.float64).masked_fill(hidden[..., None], 0)
        clean = results(problem, leaves, da, "reference")
        leaves[names.index(name)][0, :, at] = value
        out, *grads = results(problem, leaves, da, backend)
        torch.testing.assert_close(out[~hidden], clean[0][~hidden])
        if value is torch.nan:
            assert out[hidden].isnan().all()
        for grad, want in zip(grads, clean[1:], strict=True):
            torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_the_gradient_of_nan_is_nan(backend):
    """A loss that reads a spoilt row trains nothing in silence."""
    problem = Problem()
    leaves = [x.detach().clone() for x in problem.leaves]
    leaves[2][0, 0, 3] = torch.nan
    _, *grads = results(problem, leaves, torch.ones_like(problem.q), backend)
    assert all(not grad[0].isfinite().all() for grad in grads)
