"""Every way of computing the operator gives the same outputs and gradients."""

import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import OPTIONS, Problem

from ka_attention import cache_values, ka_attention
from ka_attention.ops.blocked import full


def assert_agree(problem: Problem, exact: str = "reference"):
    out, truth = problem.run("blocked"), problem.run(exact)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-11)
    for grad, want in zip(problem.gradients(out), problem.gradients(truth), strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", OPTIONS)
def test_token_loop_is_dense_solve_is_blocked(name):
    problem = Problem(**OPTIONS[name])
    torch.testing.assert_close(problem.run("reference"), problem.run("token loop"), rtol=1e-12, atol=1e-12)
    with mock.patch.multiple(full, ROWS=4, SCORES=40):
        assert_agree(problem, "token loop")


@pytest.mark.parametrize("gate", ["number", "token"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"Hkv": 4, "mask": "any"},
        {"window": 3, "mask": "full"},
        *({"window": w} for w in (1, 5, 6)),
        {"softcap": 1.5, "mask": "left"},
    ],
)
def test_one_token_after_a_past(options, gate):
    problem = Problem(B=4, T=1, P=5, gate=gate, **options)
    out, truth = problem.run(None), problem.run("reference")
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(problem.gradients(out), problem.gradients(truth))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.fixed_dictionaries(
        {
            "B": st.integers(1, 3),
            "Hkv": st.sampled_from((1, 2, 4)),
            "T": st.sampled_from((1, 2, 7, 63, 64, 65, 127)),
            "D": st.sampled_from((1, 8)),
            "P": st.sampled_from((0, 0, 1, 33)),
            "gate": st.sampled_from(("one", "zero", "number", "head", "token", "signed")),
            "mask": st.sampled_from(("none", "none", "left", "right", "any", "full")),
            "window": st.sampled_from((None, None, 1, 2, 7, 40, 500)),
            "softcap": st.sampled_from((None, None, 1.5)),
            "lengths": st.sampled_from(((), (), (), (7, 63, 1), (0, 65, 0), (5, 0, 20))),
        }
    ),
    rows=st.sampled_from((16, 48, 128)),
    scores=st.sampled_from((100, 10_000, 1 << 20)),
)
def test_options_combine(shape, rows, scores):
    with mock.patch.multiple(full, ROWS=rows, SCORES=scores):
        assert_agree(Problem(**shape))


@pytest.mark.parametrize(
    "options", [{}, {"gate": "token", "P": 150}, {"window": 200}, {"mask": "left", "softcap": 2.0}]
)
def test_long_sequences_with_the_block_sizes_in_use(options):
    assert_agree(Problem(B=1, Hq=2, T=600, **options))


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name):
    problem = Problem(**{"T": 5, "D": 2, "B": 1, "Hq": 2, "Hkv": 1} | OPTIONS[name] | {"Hkv": 1})
    problem.options.setdefault("past", None)
    names = ["q", "k", "v"] + ["gate"] * isinstance(problem.options["gate"], torch.Tensor)

    def call(*leaves):
        given = dict(zip(names, leaves, strict=False))
        past = leaves[len(names) :] or None
        return ka_attention(**problem.options | given | {"past": past}, backend="blocked")

    with mock.patch.multiple(full, ROWS=2):
        assert torch.autograd.gradcheck(call, problem.leaves)


def test_what_the_forward_saves_outlives_a_backward():
    problem = Problem(T=130, gate="token", P=3)
    out = problem.run("blocked")
    first, second = (torch.autograd.grad(out.sum(), problem.leaves, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_long_sequence():
    problem = Problem(B=1, Hq=2, Hkv=1, T=300, gate="token", D=16)
    assert_agree(problem)


def low_precision(problem: Problem) -> torch.Tensor:
    """The operator as one would write it down, every step in the dtype of the inputs."""
    q, k, v = problem.q, *(x.repeat_interleave(problem.Hq // problem.Hkv, 1) for x in (problem.k, problem.v))
    scores = (q @ k.mT * problem.D**-0.5).masked_fill(torch.ones(problem.T, problem.T).triu(1).bool(), -torch.inf)
    w, rows = scores.softmax(-1), []
    for i in range(problem.T):
        values = torch.cat([*rows, v[:, :, i : i + 1]], dim=2)
        rows.append(w[:, :, i : i + 1, : i + 1] @ values)
    return torch.cat(rows, dim=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_budget(dtype):
    """Error against float64 of at most twice that of plain PyTorch in the same dtype, plus one rounding."""
    problem = Problem(T=65, D=32, dtype=dtype)
    exact = Problem(T=65, D=32)
    for mine, other in zip(exact.leaves, problem.leaves, strict=True):
        mine.data.copy_(other.data)
    results = []
    for p, compute in (
        (exact, lambda p: p.run("reference")),
        (problem, low_precision),
        (problem, lambda p: p.run("blocked")),
    ):
        out = compute(p)
        grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype).to(out.dtype)
        results.append([x.double() for x in (out.detach(), *p.gradients(out, grad))])
    assert problem.run("blocked").dtype == dtype
    for truth, plain, ours in zip(*results, strict=True):
        rounding = torch.finfo(dtype).eps * truth.norm()
        assert (ours - truth).norm() <= 2 * (plain - truth).norm() + rounding


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gate_zero_is_softmax_attention(backend):
    problem = Problem(gate="zero", T=65)
    out, truth = problem.run(backend), F.scaled_dot_product_attention(
        problem.q, problem.k, problem.v, is_causal=True, enable_gqa=True
    )  # fmt: skip
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(problem.gradients(out), problem.gradients(truth))


def test_gate_zero_in_a_window_is_softmax_attention_in_a_band():
    """Exactly, and by the band alone, whose blocks are independent then."""
    problem = Problem(gate="zero", T=300, window=7)
    i = torch.arange(300)
    seen = (i <= i[:, None]) & (i > i[:, None] - 7)
    with mock.patch.object(full, "forward", side_effect=AssertionError):
        out = problem.run("blocked")
    truth = F.scaled_dot_product_attention(problem.q, problem.k, problem.v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(problem.gradients(out), problem.gradients(truth))


def test_layouts_and_gate_dtypes():
    """Transposed inputs, a broadcast gradient and a gate of another dtype change nothing."""
    problem = Problem(dtype=torch.float32, gate="token")
    gate = problem.options["gate"].detach().bfloat16()
    truth = ka_attention(problem.q, problem.k, problem.v, gate=gate.float())
    swapped = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in problem.leaves[:3]]
    out = ka_attention(*swapped, gate=gate)
    torch.testing.assert_close(out, truth)
    wanted = torch.autograd.grad(truth.sum(), problem.leaves[:3])
    torch.testing.assert_close(torch.autograd.grad(out.sum(), swapped), wanted)


@pytest.mark.parametrize("backend", ["reference", "blocked", None])
@pytest.mark.parametrize("shape", [{"B": 0}, {"T": 0}, {"D": 0}, {"Hq": 0, "Hkv": 2}])
def test_nothing_in_nothing_out(backend, shape):
    """And gradients of zeros, not None, for all that went in."""
    problem = Problem(**{"gate": "token", "P": 3} | shape)
    out = problem.run(backend)
    assert out.shape == problem.q.shape
    out.sum().backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in problem.leaves)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_a_number_as_gate_is_as_exact_as_the_queries(backend):
    problem = Problem()
    wide = torch.full((problem.Hq,), 0.1, dtype=torch.float64)
    for number, tensor in ((0.1, wide), (-0.7, -7 * wide)):
        out, truth = (ka_attention(*problem.leaves, gate=gate, backend=backend) for gate in (number, tensor))
        torch.testing.assert_close(out, truth, rtol=1e-15, atol=1e-15)
    a = problem.q
    torch.testing.assert_close(cache_values(problem.v, a, 0.1), cache_values(problem.v, a, wide), rtol=0, atol=0)


def test_scale():
    problem = Problem()
    for backend, scale in itertools.product(("reference", "blocked"), (0.0, 0.3, -0.5)):
        out = ka_attention(problem.q, problem.k, problem.v, scale=scale, backend=backend)
        truth = ka_attention(problem.q * scale * problem.D**0.5, problem.k, problem.v, backend="reference")
        torch.testing.assert_close(out, truth)
