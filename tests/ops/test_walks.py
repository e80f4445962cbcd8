"""The walk behind the operator, and its truncation."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from problems import OPTIONS, Problem

from ka_attention import ka_attention, truncated, walk

# PyTorch's attention, which a hop is, has neither a soft cap nor packed sequences.
CASES = {name: case for name, case in OPTIONS.items() if not {"lengths", "softcap"} & case.keys()}


@pytest.mark.parametrize("name", CASES)
def test_all_hops_are_exact(name):
    problem = Problem(**CASES[name])
    options = {key: x for key, x in problem.options.items() if key != "softcap"}
    out = truncated(problem.q, problem.k, problem.v, hops=problem.T, **options)
    truth = problem.run("reference")
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(problem.gradients(out), problem.gradients(truth))


def test_one_hop_is_softmax_attention():
    problem = Problem()
    out = truncated(problem.q, problem.k, problem.v, hops=1)
    truth = F.scaled_dot_product_attention(problem.q, problem.k, problem.v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, truth)


def test_error_falls_with_hops():
    problem = Problem(T=40)
    truth = problem.run("reference")
    errors = [(truncated(problem.q, problem.k, problem.v, hops=n) - truth).norm() for n in (1, 2, 4, 8, 16)]
    assert all(later < earlier for earlier, later in pairwise(errors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The diagonal of W, read out of a half-precision attention call, is good to two roundings."""
    problem = Problem(T=33, D=64, dtype=dtype)
    problem.q.data.add_(4)  # large scores of all tokens, so that a score rounded once would move d
    problem.k.data.add_(4)
    with torch.autocast("cpu", torch.bfloat16):
        out = truncated(problem.q, problem.k, problem.v, hops=33)
    truth = problem.run("reference").double()
    assert out.dtype == dtype
    assert (out.double() - truth).norm() <= 2 * torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("given", [{}, {"window": 4}])
def test_negative_scale(given):
    problem = Problem(**given)
    options = {"scale": -0.7, "window": problem.options["window"]}
    out = truncated(problem.q, problem.k, problem.v, hops=problem.T, **options)
    torch.testing.assert_close(out, ka_attention(problem.q, problem.k, problem.v, backend="reference", **options))


@pytest.mark.parametrize("shape", [(1, 2, 0, 4), (1, 2, 3, 0)])
def test_nothing_to_attend(shape):
    empty = torch.randn(shape)
    assert truncated(empty, empty, empty, hops=2).shape == empty.shape
    assert ka_attention(empty, empty, empty).shape == empty.shape


@pytest.mark.parametrize("k_past", ["a", (1, 2), torch.zeros(3), torch.zeros(1, 2, 3)])
def test_walk_names_a_wrong_past(k_past):
    with pytest.raises((TypeError, ValueError), match=r"k_past\) must be"):
        walk(*torch.randn(2, 1, 2, 5, 4), k_past=k_past)
    with pytest.raises(ValueError, match=r"q must be \[B, H, T, D\]"):
        walk(torch.randn(5, 4), torch.randn(5, 4), k_past=torch.randn(1, 2, 3, 4))


@pytest.mark.parametrize("name", [name for name in OPTIONS if "packed" not in name])
def test_walk_explains_the_output(name):
    problem = Problem(**OPTIONS[name])
    options = dict(problem.options)
    k_past, u_past = options.pop("past", (None, problem.v[:, :, :0].repeat_interleave(2, 1)))
    walked = walk(problem.q, problem.k, k_past=k_past, **options)
    values = problem.v.repeat_interleave(problem.Hq // problem.Hkv, dim=1)
    values = values if k_past is None else torch.cat([u_past, values], dim=2)
    out = problem.run("reference")
    torch.testing.assert_close(walked.matrix @ values, out)
    alive = walked.matrix.abs().sum(-1) > 0
    if "full mask" not in name and "anywhere" not in name and "all" not in name:
        torch.testing.assert_close(walked.matrix.sum(-1), alive.double())


def test_a_step_into_the_past_is_a_hop():
    problem = Problem(P=3)
    k_past, _ = problem.options["past"]
    with torch.autocast("cpu", torch.bfloat16):
        hops = walk(problem.q, problem.k, k_past=k_past).hops
    q, k = problem.q, torch.cat([k_past, problem.k], dim=2).repeat_interleave(problem.Hq // problem.Hkv, dim=1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~torch.ones(9, 12, dtype=torch.bool).tril(3), -torch.inf)
    weights = scores.softmax(-1)
    expected = torch.zeros(*q.shape[:2], 12, dtype=torch.float64)  # a cached token is the end of a walk
    for i in range(9):
        expected[..., 3 + i] = (weights[:, :, i, : 3 + i] * (1 + expected[..., : 3 + i])).sum(-1)
    torch.testing.assert_close(hops, expected[..., 3:])


def test_walk_counts_hops():
    """On a chain in which token i always steps to i − 1, every walk from i takes i hops and ends at token 0."""
    T = 6
    q, k = 60 * torch.eye(T, dtype=torch.float64)[None, None], torch.eye(T, dtype=torch.float64).roll(1, 1)[None, None]
    walked = walk(q, k, scale=1.0)
    torch.testing.assert_close(walked.hops[0, 0], torch.arange(T, dtype=torch.float64))
    torch.testing.assert_close(walked.first[0, 0], torch.ones(T, dtype=torch.float64))
    assert walk(q, k, scale=1.0, gate=0.0).hops.max() <= 1
