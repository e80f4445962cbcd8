"""The operator inside torch.compile, autocast, checkpointing and the library operator checks."""

import doctest

import pytest
import torch
from problems import Problem
from torch._inductor.utils import fresh_cache
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ka_attention import ka_attention
from ka_attention.ops import api, blocked, dispatch
from ka_attention.ops.api import normalise
from ka_attention.ops.blocked import full

CASES = {
    "plain": {},
    "everything": {"gate": "token", "P": 3, "window": 4, "mask": "left", "softcap": 2.0},
    "packed": {"gate": "head", "lengths": (4, 5)},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_compiles_whole(name, backend):
    problem = Problem(**CASES[name], dtype=torch.float32)
    eager = problem.run(backend)
    torch._dynamo.reset()
    compiled = torch.compile(ka_attention, fullgraph=True, backend="aot_eager")
    out = compiled(problem.q, problem.k, problem.v, backend=backend, **problem.options)
    torch.testing.assert_close(out, eager)
    torch.testing.assert_close(problem.gradients(out), problem.gradients(eager))


def test_compiles_with_inductor():
    problem = Problem(dtype=torch.float32)
    torch._dynamo.reset()
    out = torch.compile(ka_attention, fullgraph=True)(problem.q, problem.k, problem.v)
    torch.testing.assert_close(out, problem.run(None))
    torch.testing.assert_close(problem.gradients(out), problem.gradients(problem.run(None)))


def test_compiles_for_sizes_and_numbers_that_change():
    torch._dynamo.reset()
    compiled = torch.compile(ka_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, number in ((9, 0.1), (13, 0.2), (14, 0.3)):
        q, k, v = torch.randn(3, 1, 2, T, 8)
        options = {"gate": number, "scale": number, "softcap": 1 + number}
        torch.testing.assert_close(compiled(q, k, v, **options), ka_attention(q, k, v, **options))


def test_inductor_keeps_graphs_of_few_tokens_from_many():
    """It finds graphs again by their operators, not by the shapes that these return; layouts are the backend's."""
    torch._dynamo.reset()
    with fresh_cache():
        compiled = torch.compile(ka_attention, fullgraph=True, dynamic=True)
        for T in (9, 100, 150, 300):
            q, k, v = torch.randn(3, 2, 2, 8, T).mT.unbind()
            q = q.detach().requires_grad_()
            mask = torch.rand(2, 1, T, T) < 0.7
            out, truth = (attend(q, k, v, attn_mask=mask) for attend in (compiled, ka_attention))
            torch.testing.assert_close(out, truth)
            (grad,), (want,) = (torch.autograd.grad(x.sum(), q) for x in (out, truth))
            torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("ends", [(0, 4), (0, 4, 12), (0, 7, 4, 10), (1, 10)])
def test_compiled_calls_check_cu_seqlens(ends):
    torch._dynamo.reset()
    compiled = torch.compile(ka_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to T = 10 without falling"):
        compiled(*torch.randn(3, 1, 2, 10, 8), cu_seqlens=torch.tensor(ends, dtype=torch.int32))


def test_a_graph_of_another_revision_is_not_found_on_disk(monkeypatch):
    """As after an update: the earlier version saved nothing for the backward, so its graph returns other shapes."""

    def compiled():
        torch._dynamo.reset()
        return torch.compile(ka_attention, fullgraph=True)(problem.q, problem.k, problem.v)

    problem = Problem(dtype=torch.float32)
    with fresh_cache():
        with monkeypatch.context() as earlier:
            earlier.setattr(dispatch, "REVISION", "an earlier one")
            earlier.setattr(full, "_saved", lambda q, save: q.new_empty(0))
            compiled()
        torch.testing.assert_close(problem.gradients(compiled()), problem.gradients(problem.run("blocked")))


@pytest.mark.parametrize("name", CASES)
def test_library_operator(name):
    problem = Problem(**CASES[name], dtype=torch.float32)
    o = {"past": None, "attn_mask": None, "cu_seqlens": None} | problem.options
    call = normalise(
        problem.q,
        problem.k,
        problem.v,
        o["gate"],
        None,
        o["window"],
        o["past"],
        o["attn_mask"],
        o["cu_seqlens"],
        o["softcap"],
    )
    torch.library.opcheck(
        dispatch.forward,
        (*call.tensors, *call.options.values(), True, "blocked", dispatch.REVISION),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("backend", "options"), [("reference", {"gate": "token"}), ("blocked", {"gate": "token"}), (None, {"T": 1, "P": 5})]
)
def test_autocast_leaves_it_alone(backend, options):
    problem = Problem(dtype=torch.float32, **options)
    truth = problem.run(backend)
    with torch.autocast("cpu", torch.bfloat16):
        out = problem.run(backend)
        torch.testing.assert_close(out, truth, rtol=0, atol=0)
        torch.testing.assert_close(problem.gradients(out), problem.gradients(truth), rtol=0, atol=0)


def test_checkpoint():
    problem = Problem(gate="head")
    truth = problem.run("blocked")
    out = checkpoint(problem.run, "blocked", use_reentrant=False)
    torch.testing.assert_close(problem.gradients(out), problem.gradients(truth), rtol=0, atol=0)


def test_inference_saves_nothing():
    problem = Problem()
    with torch.no_grad():
        assert problem.run("blocked").grad_fn is None


def test_work_is_saved_only_for_a_backward_pass_that_may_come(monkeypatch):
    saved, forward = [], blocked.forward

    def noting(*tensors, **options):
        results = forward(*tensors, **options)
        saved.append(results[2].numel() > 0)
        return results

    monkeypatch.setattr(blocked, "forward", noting)
    problem = Problem()
    problem.run("blocked")
    with torch.no_grad():
        problem.run("blocked")
    ka_attention(problem.q.detach(), problem.k.detach(), problem.v.detach(), backend="blocked")
    assert saved == [True, False, False]


def test_there_is_no_second_derivative():
    problem = Problem()
    out = problem.run("blocked")
    (grad,) = torch.autograd.grad(out.sum(), problem.q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative with backend='reference' only"):
        grad.sum().backward()


def test_the_reference_has_a_second_derivative():
    problem = Problem(B=1, T=4, Hq=2, Hkv=1, D=2, gate="token")
    gate = problem.leaves.pop()

    def attend(q, k, v, gate):
        return ka_attention(q, k, v, gate=gate, backend="reference")

    assert torch.autograd.gradgradcheck(attend, (*problem.leaves, gate))


class Seen(TorchDispatchMode):
    """Notes the operators of this package that pass through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ka_attention":
            self.names.append(function.name())
        return function(*args, **kwargs or {})


def test_dispatch_modes_see_one_operator_a_pass():
    problem = Problem(gate="head")
    with Seen() as seen:
        problem.gradients(problem.run("blocked"))
    assert seen.names == ["ka_attention::forward", "ka_attention::backward"]
    torch.testing.assert_close(problem.run("blocked"), problem.run("reference"))


@pytest.mark.parametrize("shapes_alone", [FakeTensorMode, lambda: torch.device("meta")])
def test_shapes_alone(shapes_alone):
    with shapes_alone():
        q, k, v = torch.empty(2, 4, 5, 8, requires_grad=True), torch.empty(2, 2, 5, 8), torch.empty(2, 2, 5, 8)
        out = ka_attention(q, k, v)
        assert out.shape == torch.autograd.grad(out.sum(), q)[0].shape == q.shape


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_derivatives_of_torch_func_need_the_reference(backend):
    """Anything but an error would be zeros."""

    def attend(q):
        return ka_attention(q, k, v, backend=backend)

    def dual(q, tangent):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(attend(forward_ad.make_dual(q, tangent))).tangent

    q, k, v, tangent = torch.randn(4, 1, 2, 5, 8, dtype=torch.float64)
    ways = [
        lambda: torch.func.jvp(attend, (q,), (tangent,))[1],
        lambda: dual(q, tangent),
        lambda: torch.func.grad(lambda q: (attend(q) * tangent).sum())(q),
        lambda: torch.vmap(torch.func.grad(lambda q: attend(q).sum()))(q[None]),
    ]
    if backend == "blocked":
        for way in ways:
            with pytest.raises(RuntimeError, match="forward-mode derivatives need backend='reference'"):
                way()
        return
    step = 1e-6
    differences = (attend(q + step * tangent) - attend(q - step * tangent)) / (2 * step)
    torch.testing.assert_close(ways[0](), differences, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ways[1](), ways[0]())
    x = q.clone().requires_grad_()
    torch.testing.assert_close(ways[2](), torch.autograd.grad(attend(x), x, tangent)[0])
    assert ways[3]().isfinite().all()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap():
    q, k, v = torch.randn(3, 2, 1, 2, 5, 8)
    q.requires_grad_()
    whole = torch.stack([ka_attention(*x) for x in zip(q, k, v, strict=True)])
    out = torch.vmap(ka_attention)(q, k, v)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), q) for x in (out, whole)))


def test_the_examples_of_the_docstring():
    assert doctest.testmod(api).attempted > 10
    assert doctest.testmod(api).failed == 0
