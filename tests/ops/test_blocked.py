"""The blocked backend whatever the layout of its arguments, and with numbers that are not finite."""

import itertools

import pytest
import torch
from problems import Problem

from ka_attention import ka_attention

LAYOUTS = {
    "heads last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dims transposed": lambda x: x.mT.contiguous().mT,
    "every other number": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "part of more": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "first dim last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "one number for all": lambda x: x[:1, :1, :1, :1].expand(x.shape),
    "one row for all": lambda x: x[:, :, :1].expand(x.shape),
}


def results(problem: Problem, leaves, da, backend="blocked"):
    """Output and gradients with these tensors in the place of the problem's."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    options = dict(problem.options)
    if problem.P:
        options["past"] = tuple(leaves[-2:])
    if isinstance(options["gate"], torch.Tensor):
        options["gate"] = leaves[3]
    out = ka_attention(*leaves[:3], backend=backend, **options)
    return [out, *torch.autograd.grad(out, leaves, da)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [{"T": 300, "gate": "token"}, {"T": 3, "P": 140}, {"T": 140, "window": 9, "gate": "token"}],
    ids=["whole", "past", "window"],
)
def test_layouts(layout, options):
    """Of one argument after the other, of the output's gradient too."""
    problem = Problem(B=2, Hq=2, Hkv=2, D=4, **options)
    tensors = [*problem.leaves, torch.randn(problem.q.shape, dtype=torch.float64)]
    change = LAYOUTS[layout]
    for which, x in enumerate(tensors):
        if x.ndim < 4:
            x = x[..., None]
        changed = change(x.detach()).view(tensors[which].shape) if tensors[which].ndim == 4 else change(x)[..., 0]
        given = [*tensors[:which], changed, *tensors[which + 1 :]]
        got = results(problem, given[:-1], given[-1])
        plain = [x.detach().clone(memory_format=torch.contiguous_format) for x in given]
        want = results(problem, plain[:-1], plain[-1], "reference")
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:gate goes from")
@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_no_earlier_row(window, value):
    """Rows before it are as they were; row 140 and those that read it are not finite, with its gradient or without."""
    problem = Problem(B=1, Hq=2, Hkv=1, T=170, gate="token", window=window)
    first = {"q": 140, "k": 140, "v": 140, "gate": 141}
    whole = problem.run("blocked")
    for name, which in itertools.product(first, (0, -1)):
        leaves = [x.detach().clone() for x in problem.leaves]
        leaves[list(first).index(name)][:, which, 140] = value
        da = torch.randn(whole.shape, dtype=whole.dtype)
        da[:, :, first[name] :] = 0
        out, *grads = results(problem, leaves, da)
        torch.testing.assert_close(out[:, :, : first[name]], whole[:, :, : first[name]], rtol=0, atol=0)
        assert not out[:, which, first[name] :].isfinite().all(-1).any()
        for grad, want in zip(grads, problem.gradients(whole.clone(), da), strict=True):
            torch.testing.assert_close(grad[:, :, :140], want[:, :, :140])
        whole = problem.run("blocked")
        loss = results(problem, leaves, torch.ones_like(whole))
        assert all(not x.isfinite().all() for x in loss)


def test_what_is_not_finite_stays_in_its_sequence_and_behind_its_mask():
    packed = Problem(lengths=(30, 140, 20))
    left = Problem(B=2, T=150, P=3, mask="left", gate="signed")
    pads = ~left.options["attn_mask"][:, None, :, None]
    for problem, hidden in ((packed, slice(30, 170)), (left, None)):
        whole = problem.run("blocked")
        da = torch.randn(whole.shape, dtype=whole.dtype)
        if hidden is not None:
            da[:, :, hidden] = 0
        want = problem.gradients(whole, da)
        leaves = [x.detach().clone() for x in problem.leaves]
        for x in leaves:
            if hidden is not None:
                x[:, :, hidden] = torch.nan
            elif x.ndim == 4:
                x.masked_fill_(pads[:, :, 3:] if x.shape[2] == 150 else pads[:, :, :3], torch.nan)
        out, *grads = results(problem, leaves, da)
        seen = torch.ones_like(out, dtype=torch.bool)
        if hidden is not None:
            seen[:, :, hidden] = False
        torch.testing.assert_close(out[seen], whole[seen], rtol=0, atol=0)
        torch.testing.assert_close(grads, want)


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_with_gates_of_0_what_is_not_finite_stays_in_its_window(gate):
    q, k, v = torch.randn(3, 1, 2, 40, 4)
    for x in (q, k, v):
        x[:, :, 10] = torch.nan
        out = ka_attention(q, k, v, gate=gate, window=5)
        last = 40 if gate else 11 if x is q else 15
        assert not out[:, :, 10:last].isfinite().any()
        assert torch.cat([out[:, :, :10], out[:, :, last:]], 2).isfinite().all()
        x[:, :, 10] = 0
