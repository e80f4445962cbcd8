"""Windows on the blocked backend: blocks and a scan over them, at every size around those of the blocks."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem

from ka_attention import cache_values, ka_attention
from ka_attention.ops.blocked import band

SIZES = sorted({n + d for n in (16, 32, 64, 128) for d in (-1, 0, 1)})


def assert_agree(problem: Problem):
    out, truth = problem.run("blocked"), problem.run("reference")
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-11)
    for grad, want in zip(problem.gradients(out), problem.gradients(truth), strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-10)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=st.fixed_dictionaries(
        {
            "B": st.integers(1, 3),
            "Hkv": st.sampled_from((1, 2, 4)),
            "T": st.sampled_from((1, 3, *SIZES, 200)),
            "D": st.sampled_from((1, 8)),
            "P": st.sampled_from((0, 0, 1, 15, 16, 100)),
            "gate": st.sampled_from(("one", "zero", "number", "head", "token", "signed")),
            "mask": st.sampled_from(("none", "none", "none", "left", "right", "any", "full")),
            "window": st.sampled_from((1, 2, 3, 4, 8, *SIZES[:-3])),
            "softcap": st.sampled_from((None, None, 1.5)),
            "lengths": st.sampled_from(((), (), (), (7, 63, 1), (0, 65, 0, 16))),
        }
    ),
    scores=st.sampled_from((100, 10_000, 1 << 20)),
)
def test_options_combine(shape, scores):
    with mock.patch.multiple(band, NUMBERS=scores):
        assert_agree(Problem(**shape))


@pytest.mark.parametrize("gate", ["one", "zero", "signed"])
@pytest.mark.parametrize("window", [1, 3, 18])
def test_gradcheck(window, gate):
    problem = Problem(B=1, Hq=2, Hkv=1, T=34, P=2, D=2, gate=gate, window=window)

    def call(q, k, v, *others):
        *gates, k_past, u_past = others
        return ka_attention(
            q, k, v, gate=gates[0] if gates else problem.options["gate"], past=(k_past, u_past), window=window
        )

    assert torch.autograd.gradcheck(call, problem.leaves, fast_mode=True)


@pytest.mark.parametrize("window", [2, 17, 40])
@pytest.mark.parametrize("chunks", [[1, 99], [17, 16, 1, 66], [33, 33, 34]])
def test_chunks_equal_the_whole_through_a_cache_of_the_window(window, chunks):
    problem = Problem(T=100, gate="token", window=window)
    gate = problem.options["gate"]
    whole, past, parts = problem.run("blocked"), None, []
    for q, k, v, g in zip(*(x.split(chunks, dim=2) for x in (problem.q, problem.k, problem.v, gate)), strict=True):
        parts.append(ka_attention(q, k, v, gate=g, window=window, past=past))
        u = cache_values(v, parts[-1], g)
        past = (k, u) if past is None else (torch.cat([past[0], k], 2), torch.cat([past[1], u], 2))
        past = past[0][:, :, 1 - window :], past[1][:, :, 1 - window :]
    parts = torch.cat(parts, 2)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(problem.gradients(parts), problem.gradients(whole))


@pytest.mark.parametrize("gate", ["one", "zero", "token"])
def test_calls_repeat_bit_by_bit(gate):
    problem = Problem(T=300, window=9, gate=gate, dtype=torch.float32)
    first, second = ([out, *problem.gradients(out)] for out in (problem.run("blocked") for _ in range(2)))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [4, 40])
def test_error_budget(window, dtype):
    """A few roundings of the dtype, the same as for all weights: a scan adds none that grow with the length."""
    problem = Problem(B=1, T=500, D=32, window=window, gate="token", dtype=dtype)
    exact = Problem(B=1, T=500, D=32, window=window, gate="token")
    for mine, other in zip(exact.leaves, problem.leaves, strict=True):
        mine.data.copy_(other.data)
    out, truth = problem.run("blocked"), exact.run("reference")
    da = torch.randn(out.shape).to(dtype)
    pairs = [(out, truth), *zip(problem.gradients(out, da), exact.gradients(truth, da.double()), strict=True)]
    assert out.dtype == dtype
    for ours, want in pairs:
        assert (ours.double() - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()
