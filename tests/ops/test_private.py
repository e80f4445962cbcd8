"""Without PyTorch's private names, one at a time or all, everything still works, and nothing goes on in silence."""

import operator
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from problems import Problem
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from ka_attention import ka_attention
from ka_attention.ops import dispatch, private

SOURCE = Path(private.__file__).read_text()
PATHS = re.findall(r'_find\("([\w.]+)"\)', SOURCE)


@pytest.fixture(params=["all", *PATHS])
def missing(request, monkeypatch):
    """As if this PyTorch did not have the name."""
    find = operator.attrgetter

    def attrgetter(path):
        if path in (PATHS if request.param == "all" else [request.param]):
            raise AttributeError(path)
        return find(path)

    monkeypatch.setattr(operator, "attrgetter", attrgetter)
    public = ModuleType(private.__name__)
    exec(compile(SOURCE, private.__file__, "exec"), vars(public))
    for name, value in vars(public).items():
        if not name.startswith("__"):
            monkeypatch.setattr(private, name, value)
    monkeypatch.setattr(dispatch, "_apply", private.apply_of(dispatch._Eager))
    return request.param


def test_every_private_name_is_here():
    """No other file of the package names what begins with an underscore in torch."""
    package = Path(private.__file__).parents[1]
    uses = re.compile(r"\btorch(\.\w+)*\._[a-z_]\w*|from torch(\.\w+)*\._|forward_ad\._|\._version\b")
    found = [
        f"{file.relative_to(package)}: {line.strip()}"
        for file in package.rglob("*.py")
        if file.name != "private.py"
        for line in file.read_text().splitlines()
        if uses.search(line)
    ]
    assert not found


def test_the_oldest_compiler_can_trace_it():
    """torch.compile of PyTorch 2.9 knows neither `isinstance(x, A | B)` nor properties of named tuples."""
    sources = {file.name: file.read_text() for file in Path(private.__file__).parent.glob("*.py")}
    assert not [name for name, text in sources.items() if re.search(r"isinstance\([^()]*\|", text)]
    assert not [name for name, text in sources.items() if "NamedTuple)" in text and "@property" in text]


def test_this_pytorch_has_them():
    """A name that an update took away is to be noticed here, since nothing else fails."""
    assert [path for path in PATHS if private._find(path) is None] == []


@pytest.mark.parametrize("options", [{"T": 300, "P": 3, "B": 1}, {"gate": "token", "T": 20}, {"lengths": (4, 5)}])
def test_results_are_the_same(missing, options):
    problem = Problem(**options)
    out, truth = problem.run("blocked"), problem.run("reference")
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(problem.gradients(out), problem.gradients(truth))


def test_autocast_leaves_it_alone(missing):
    problem = Problem(dtype=torch.float32)
    truth = problem.run("reference")
    gradients = problem.gradients(truth)
    with torch.autocast("cpu", torch.bfloat16):
        out = problem.run("blocked")
        torch.testing.assert_close(out, truth)
        torch.testing.assert_close(problem.gradients(out), gradients)
        assert private.any_autocast()


def test_others_see_the_library_operator(missing):
    names = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **kwargs or {})

    problem = Problem(T=4)
    with Seen():
        problem.gradients(problem.run("blocked"))
    assert {"ka_attention::forward", "ka_attention::backward"} <= set(names)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_works_and_other_derivatives_are_refused(missing):
    def attend(q):
        return ka_attention(q, k, v)

    def dual(q):
        with forward_ad.dual_level():
            return attend(forward_ad.make_dual(q, q))

    q, k, v = torch.randn(3, 1, 2, 5, 8)
    torch.testing.assert_close(torch.vmap(attend)(q[None])[0], attend(q))
    for way in (
        lambda: torch.func.jvp(attend, (q,), (q,)),
        lambda: dual(q),
        lambda: torch.func.grad(lambda q: attend(q).sum())(q),
        lambda: torch.vmap(torch.func.grad(lambda q: attend(q).sum()))(q[None]),
    ):
        with pytest.raises(RuntimeError):
            way()


@pytest.mark.parametrize("compiled", [False, True])
def test_cu_seqlens_are_checked(missing, compiled):
    torch._dynamo.reset()
    attend = torch.compile(ka_attention, fullgraph=True, backend="aot_eager") if compiled else ka_attention
    q = torch.randn(1, 2, 5, 8)
    for ends, error in (((0, 2, 5), None), ((0, 2, 4), (RuntimeError, IndexError, ValueError))):
        cu = torch.tensor(ends, dtype=torch.int32)
        if error is None:
            torch.testing.assert_close(attend(q, q, q, cu_seqlens=cu), ka_attention(q, q, q, cu_seqlens=cu))
            continue
        with pytest.raises(error):
            attend(q, q, q, cu_seqlens=cu)


def test_static_addresses_are_a_hint(missing):
    private.mark_static_address(torch.zeros(2))
