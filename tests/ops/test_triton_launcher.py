"""How kernels are launched: once a call is known, past Triton's look at every argument. Needs no GPU.

What is private to Triton is compared with what the installed Triton itself does.
"""

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from ka_attention.ops.triton import launcher  # noqa: E402

ACTIVE = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: ("stream", device))


class Compiled:
    """Notes how it is launched."""

    function, packed_metadata = "function", "metadata"
    calls: list[tuple]

    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append(("compiled", grid, arguments))

    def run(self, x, y, z, stream, *arguments):
        assert (stream, *arguments[:5]) == (("stream", 3), "function", "metadata", None, None, None)
        self.calls.append(("run", (x, y, z), arguments[5:]))


class Kernel:
    """A kernel whose compiled form is `compiled`."""

    arg_names = ("X", "Y", "T", "scale", "D", "BM")

    def __init__(self, calls, compiled):
        self.calls, self.compiled = calls, compiled

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.calls.append(("kernel", grid, arguments, constants))
            return self.compiled

        return launch


def a_launch(calls, compiled):
    return launcher.Launch(Kernel(calls, compiled), (5, 2), 70, 0.5, num_warps=4, BM=64, D=16)


def aligned() -> torch.Tensor:
    x = torch.zeros(64, dtype=torch.uint8)
    return x[-x.data_ptr() % 16 :]


@pytest.fixture
def launched(monkeypatch):
    """A launch, and the notes of how its kernel is called."""
    calls: list[tuple] = []
    monkeypatch.setattr(launcher, "private_names", lambda: (Compiled, SimpleNamespace(active=ACTIVE)))
    return a_launch(calls, Compiled(calls)), calls


def test_a_known_launch_gives_the_compiled_kernel_what_it_takes(launched):
    """Bare pointers in the order of its signature, if all are multiples of 16; absent tensors are null pointers."""
    run, calls = launched
    x = aligned()
    for tensors in ((x[1:], None), (x, None), (x, None), (x[16:], None), (x[1:], None)):
        run(*tensors)
    assert [call[0] for call in calls] == ["kernel", "kernel", "run", "run", "kernel"]
    assert all(call[1] == (5, 2, 1) for call in calls)
    assert calls[3][2] == (x.data_ptr() + 16, 0, 70, 0.5, 16, 64)
    assert calls[4][2][2:] == (70, 0.5)
    assert calls[4][3] == {"num_warps": 4, "BM": 64, "D": 16}


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_known_launch_is_seen_by_hooks(launched, monkeypatch, name):
    run, calls = launched
    hook = triton.knobs.HookChain()
    monkeypatch.setattr(triton.knobs.runtime, name, hook)
    x = torch.zeros(0)
    for change in (int, int, lambda: hook.add(print), lambda: hook.remove(print)):
        change()
        run(x, None)
    monkeypatch.setattr(triton.knobs.runtime, name, print)
    run(x, None)
    assert [call[0] for call in calls] == ["kernel", "run", "compiled", "run", "compiled"]
    assert calls[1][1:] == calls[2][1:] == calls[4][1:]


def test_the_installed_triton_runs_a_compiled_kernel_as_the_launcher_does(monkeypatch):
    """`compiled[grid]` of the installed Triton and the launcher hand the driver the same."""
    assert launcher.private_names() is not None, f"compare Triton {triton.__version__}, and name it in VERSIONS"
    from triton.compiler import compiler
    from triton.runtime import driver

    handed: list[tuple] = []
    compiled = compiler.CompiledKernel.__new__(compiler.CompiledKernel)
    vars(compiled).update(
        module="loaded",
        function="function",
        packed_metadata="metadata",
        _run=lambda *arguments: handed.append(arguments),
    )
    monkeypatch.setattr(compiler.CompiledKernel, "launch_metadata", lambda *_: None)
    monkeypatch.setattr(driver, "_active", ACTIVE)
    run = a_launch([], compiled)
    x = aligned()
    for _ in range(2):
        run(x, None)
    compiled[5, 2, 1](x.data_ptr(), 0, 70, 0.5, 16, 64)
    bare, public = handed
    *_, enter, leave = public[:9]
    assert not enter.calls
    assert not leave.calls
    assert bare == (*public[:7], None, None, *public[9:])
    compiled.module = None  # nothing is loaded that Triton 3.8 could unload


@pytest.mark.parametrize("gone", ["version", "run", "function", "packed_metadata", "driver", "class"])
def test_without_a_private_name_every_launch_is_the_public_one(monkeypatch, gone):
    calls: list[tuple] = []

    class Lacking:
        def __getitem__(self, grid):
            raise AssertionError("not public")

    compiled = Lacking()
    for name in {"run", "function", "packed_metadata"} - {gone}:
        setattr(compiled, name, name)
    kind, active = type(compiled), SimpleNamespace() if gone == "driver" else ACTIVE
    if gone in ("version", "class"):
        monkeypatch.setattr(triton, "__version__", "9.9.0" if gone == "version" else triton.__version__)
        if gone == "class":
            monkeypatch.delattr("triton.compiler.CompiledKernel")
    else:
        monkeypatch.setattr(launcher, "private_names", lambda: (kind, SimpleNamespace(active=active)))
    run = a_launch(calls, compiled)
    x = aligned()
    for _ in range(3):
        run(x, None)
    assert [call[0] for call in calls] == ["kernel"] * 3
