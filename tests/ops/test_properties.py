"""What must hold of the operator whatever computes it."""

import pytest
import torch
from problems import OPTIONS, Problem

from ka_attention import cache_values, ka_attention, walk

BACKENDS = ["reference", "blocked"]


def heads_first(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(params=BACKENDS)
def attend(request):
    return lambda *args, **options: ka_attention(*args, backend=request.param, **options)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 5], [7, 1, 1]])
def test_cache_equals_whole(attend, window, chunks):
    """Token by token and chunk by chunk, with the gradients that flow through the cache."""
    problem = Problem(gate="token", window=window)
    gate = problem.options["gate"]
    whole = attend(problem.q, problem.k, problem.v, gate=gate, window=window)
    past, parts = None, []
    for q, k, v, g in zip(*(x.split(chunks, dim=2) for x in (problem.q, problem.k, problem.v, gate)), strict=True):
        a = attend(q, k, v, gate=g, window=window, past=past)
        parts.append(a)
        u = cache_values(v, a, g)
        past = (k, u) if past is None else (torch.cat([past[0], k], 2), torch.cat([past[1], u], 2))
        if window is not None:
            past = past[0][:, :, 1 - window :], past[1][:, :, 1 - window :]
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    torch.testing.assert_close(problem.gradients(torch.cat(parts, 2)), problem.gradients(whole))


def test_packed_equals_separate(attend):
    lengths = (5, 0, 1, 8)
    problem = Problem(lengths=lengths, gate="token", window=4)
    whole = attend(problem.q, problem.k, problem.v, **problem.options)
    parts = [
        attend(q, k, v, gate=g, window=4)
        for q, k, v, g in zip(
            *(x.split(lengths, dim=2) for x in (problem.q, problem.k, problem.v, problem.options["gate"])), strict=True
        )
    ]
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    torch.testing.assert_close(problem.gradients(torch.cat(parts, 2)), problem.gradients(whole))


def test_batch_invariant(attend):
    problem = Problem(B=3, mask="left", gate="token", P=3)
    whole = attend(problem.q, problem.k, problem.v, **problem.options)
    for i in range(3):
        one = {name: problem.options[name][i : i + 1] for name in ("gate", "attn_mask")}
        past = tuple(x[i : i + 1] for x in problem.options["past"])
        alone = attend(*(x[i : i + 1] for x in problem.leaves[:3]), past=past, **one)
        torch.testing.assert_close(alone, whole[i : i + 1])


@pytest.mark.parametrize("name", [name for name in OPTIONS if "packed" not in name])
def test_causal(attend, name):
    """Changing token 5 changes its own output and none before."""
    problem = Problem(**OPTIONS[name])
    before = attend(problem.q, problem.k, problem.v, **problem.options)
    with torch.no_grad():
        for x in (problem.q, problem.k, problem.v):
            x[:, :, 5] += 1
    after = attend(problem.q, problem.k, problem.v, **problem.options)
    torch.testing.assert_close(after[:, :, :5], before[:, :, :5], rtol=0, atol=0)
    assert not torch.equal(after[:, :, 5], before[:, :, 5])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(attend, side):
    """Padded rows equal the same rows alone; what pads hold, and their gradients, do not matter."""
    problem = Problem(mask=side, T=10, window=4)
    real = problem.options["attn_mask"]
    out = attend(problem.q, problem.k, problem.v, **problem.options)
    grads = problem.gradients(out, real[:, None, :, None] * torch.ones_like(out))
    for i, keep in enumerate(real):
        row = Problem(B=1, T=int(keep.sum()), window=4)
        for x, whole in zip(row.leaves, problem.leaves, strict=True):
            x.data = whole.detach()[i : i + 1, :, keep]
        alone = attend(row.q, row.k, row.v, window=4)
        torch.testing.assert_close(out[i : i + 1, :, keep], alone)
        for grad, want in zip(grads, row.gradients(alone, torch.ones_like(alone)), strict=True):
            torch.testing.assert_close(grad[i : i + 1, :, keep], want)
            assert grad[i, :, ~keep].abs().sum() == 0
    if side == "left":
        assert out[1, :, ~real[1]].abs().sum() == 0


def test_rows_that_attend_nothing(attend):
    problem = Problem(mask="full", P=2, gate="token")
    problem.options["attn_mask"][0, :, 4] = False
    problem.options["attn_mask"][1] = False
    out = attend(problem.q, problem.k, problem.v, **problem.options)
    assert out[0, :, 4].abs().sum() == out[1].abs().sum() == 0
    grads = problem.gradients(out)
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[0][1].abs().sum() == 0


def test_window_reaches_beyond_itself(attend):
    """With a window of 2 the last token still depends on the first; with softmax attention it does not."""
    q, k, v = (heads_first(1, 1, 12, 4) for _ in range(3))
    far = v.clone()
    far[:, :, 0] += 1
    for gate, reaches in ((1.0, True), (0.0, False)):
        near, moved = (attend(q, k, x, gate=gate, window=2)[0, 0, -1] for x in (v, far))
        assert torch.equal(near, moved) != reaches


def test_averages_stay_within_the_values(attend):
    """Rows of R sum to 1 and are not negative: equal values stay, and no output leaves their range."""
    q, k, v = (heads_first(2, 4, 70, 8) for _ in range(3))
    torch.testing.assert_close(attend(q, k, torch.ones_like(v)), torch.ones_like(v))
    out = attend(q, k, v)
    assert (out <= v.amax(2, keepdim=True) + 1e-12).all()
    assert (out >= v.amin(2, keepdim=True) - 1e-12).all()


def test_signed_gates_are_bounded(attend):
    q, k, v = (heads_first(2, 4, 70, 8) for _ in range(3))
    bound = (1 + 2 * walk(q, k).hops)[..., None] * v.abs().amax(2, keepdim=True)
    assert (attend(q, k, v, gate=-1.0).abs() <= bound + 1e-12).all()


def test_extreme_scores(attend):
    """Weights that underflow, and scores of thousands, give finite outputs and gradients."""
    problem = Problem(T=40, dtype=torch.float32)
    with torch.no_grad():
        problem.q.mul_(300)
    out = attend(problem.q, problem.k, problem.v)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in problem.gradients(out))


def test_cache_values():
    v, a = heads_first(2, 2, 5, 4), heads_first(2, 4, 5, 4)
    wide = v.repeat_interleave(2, 1)
    assert cache_values(v, a) is a
    torch.testing.assert_close(cache_values(v, a, 0.0), wide)
    gate = torch.rand(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(cache_values(v, a, gate), wide + gate[..., None] * (a - wide))
    assert cache_values(v.half(), a.half(), gate).dtype == torch.float16
    with pytest.raises(ValueError, match="v must be"):
        cache_values(v[:, :, :4], a)
