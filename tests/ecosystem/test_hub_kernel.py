"""The operator as a kernel of the Hub, made, loaded and compared with the package."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ka_attention import ka_attention

kernels = pytest.importorskip("kernels", reason="nothing to load kernels with")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, kernel), loaded where the package cannot be imported."""
    folder = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, Path(__file__).parents[2] / "hub/make.py", folder], check=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] == "ka_attention"]:
            patch.setitem(sys.modules, name, None)
        patch.setenv("HF_HUB_OFFLINE", "1")
        kernel = kernels.get_local_kernel(folder, backend="cpu")
        kernel.ka_attention(*torch.randn(3, 1, 2, 4, 8))  # backends are imported when needed
    return folder, kernel


def test_its_settings_are_what_the_builder_takes(made):
    kernels._rust.Build.open(made[0])  # ValueError where it is not
    metadata = kernels._rust.Metadata.read_from_file(made[0] / "build/torch-cuda/metadata.json")
    assert (metadata.name.python_name, metadata.version, metadata.license) == ("ka_attention", 1, "MIT")


def test_it_computes_what_the_package_does(made):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 70, 8, requires_grad=True) for heads in (4, 2, 2))
    gate = torch.rand(4, requires_grad=True)
    for options in ({}, {"window": 5}, {"cu_seqlens": torch.tensor([0, 30, 70], dtype=torch.int32)}):
        found = []
        for operator in (made[1].ka_attention, ka_attention):
            a = operator(q, k, v, gate=gate, **options)
            found.append([a, *torch.autograd.grad(a.square().sum(), (q, k, v, gate))])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_pasts_in_pages(made):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 4, 8) for heads in (4, 2, 2))
    tables = {
        "past": (torch.randn(3, 2, 4, 8), torch.randn(3, 4, 4, 8)),
        "cu_seqlens": torch.tensor([0, 3, 4], dtype=torch.int32),
        "block_table": torch.tensor([[2, 0], [1, 1]], dtype=torch.int32),
        "cache_seqlens": torch.tensor([5, 0], dtype=torch.int32),
    }
    assert torch.equal(made[1].ka_attention(q, k, v, **tables), ka_attention(q, k, v, **tables))


def test_its_operators_have_a_namespace_of_their_own(made):
    names = [name for name in torch.ops._dir if name.startswith("_ka_attention_cpu_")]
    compiled = torch.compile(made[1].ka_attention, backend="eager", fullgraph=True)
    x = torch.randn(3, 1, 2, 6, 8)
    assert torch.equal(compiled(*x), ka_attention(*x))
    assert len(names) == 1
    assert hasattr(getattr(torch.ops, names[0]), "forward")
