"""The Triton kernels where only a GPU shows the fault: many combinations, other work on the device, graphs, length,
PyTorch's compiler and parallel wrappers.
"""

import random
from functools import partial

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from ka_attention import ka_attention
from ka_attention.ops import blocked

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}
OPTIONS = {"scale": 0.125, "window": None, "softcap": None}


def budget(truth: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest error, as a norm, of a result whose operands are of size 1. Gradients of a token that reads one token
    alone are differences |dA| |V| |K| of equal numbers, so that last bits of float32 remain where the truth is 0.
    """
    last_bits = max(1e-3 * TOLERANCE[dtype], 8 * torch.finfo(torch.float32).eps)
    return max(TOLERANCE[dtype] * float(truth.norm()), last_bits * truth.numel() ** 0.5)


def random_call(seed: int):
    """The tensors and options of a backend, on the GPU, in head-first or in a model's layout."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    dtype = r.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    B, Hkv, group, D = r.choice([1, 2, 3]), r.choice([1, 2]), r.choice([1, 1, 4]), r.choice([32, 64, 80, 96, 128, 256])
    T, P = r.choice([1, 2, 7, 63, 64, 65, 127, 128, 129, 300, 1000]), r.choice([0, 0, 1, 33, 200])
    mask, cu, H = r.choice([None, None, "padding", "full"]), None, Hkv * group
    if r.random() < 0.25:
        lengths = [r.choice([1, 64, 200])] + [r.choice([0, 1, 5, 64, 65, 200, 513]) for _ in range(r.randint(0, 6))]
        B, P, mask, T = 1, 0, None, sum(lengths)
        cu = torch.tensor((0, *lengths)).cumsum(0).int().cuda()

    def tensor(heads: int, length: int) -> torch.Tensor:
        if r.random() < 0.5:
            return torch.randn(B, length, heads, D, device="cuda", dtype=dtype).transpose(1, 2)
        return torch.randn(B, heads, length, D, device="cuda", dtype=dtype)

    q, k, v = tensor(H, T), tensor(Hkv, T), tensor(Hkv, T)
    k_past, u_past = (tensor(Hkv, P), tensor(H, P)) if P else (None, None)
    gate = r.choice([None, None, torch.rand(1, H, 1).expand(B, H, T).cuda(), torch.rand(B, H, T).cuda()])
    if mask == "padding":
        mask = (torch.arange(P + T) >= torch.arange(B)[:, None] * (P + T) // (2 * B))[:, None, None].cuda()
    elif mask == "full":
        mask = (torch.rand(B, 1, T, P + T) < 0.7).cuda()
    window, softcap = r.choice([None, None, 1, 2, 5, 8, 16, 17, 33, 64, 65, 66, 200]), r.choice([None, None, 3.0])
    return (q, k, v, gate, k_past, u_past, mask, cu), {"scale": D**-0.5, "window": window, "softcap": softcap}


def run(backend, tensors, options, da):
    results = backend.forward(*tensors, **options, save=True)
    return [results[0], *(grad for grad in backend.backward(da, *tensors, *results, **options) if grad is not None)]


@pytest.mark.parametrize("seed", range(60))
def test_random_calls_agree_with_blocked_and_repeat_bit_by_bit(seed):
    from ka_attention.ops import triton

    tensors, options = random_call(seed)
    da = torch.randn_like(tensors[0])
    ours, again = run(triton, tensors, options, da), run(triton, tensors, options, da)
    exact = [None if x is None else x.double() for x in tensors[:6]]
    for x, y, z in zip(ours, again, run(blocked, (*exact, *tensors[6:]), options, da.double()), strict=True):
        assert torch.equal(x, y)
        assert (x - z).norm() <= budget(z, da.dtype)


def plain_call(T: int, H: int = 4):
    q, k, v, da = (torch.randn(1, H, T, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    return (q, k, v, *[None] * 5), da


def test_another_kernel_on_the_device_changes_nothing():
    from ka_attention.ops import triton

    tensors, da = plain_call(4096, H=8)
    alone = run(triton, tensors, OPTIONS, da)
    x, side = torch.randn(8192, 8192, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(20):
            x @ x
    beside = run(triton, tensors, OPTIONS, da)
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(alone, beside, strict=True))


def test_a_captured_graph_replays_on_new_inputs():
    from ka_attention.ops import triton

    tensors, da = plain_call(300)
    run(triton, tensors, OPTIONS, da)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(triton, tensors, OPTIONS, da)
    tensors[0].normal_()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, run(triton, tensors, OPTIONS, da), strict=True))


def test_a_million_tokens():
    from ka_attention.ops import triton

    tensors, _ = plain_call(1_000_000, H=1)
    a, lse, _ = triton.forward(*tensors, **OPTIONS | {"window": 512}, save=False)
    part = [x[:, :, :2048] if x is not None else None for x in tensors]
    head, *_ = triton.forward(*part, **OPTIONS | {"window": 512}, save=False)
    assert torch.equal(a[:, :, :2048], head)
    assert torch.isfinite(a).all()
    assert torch.isfinite(lse).all()


class Attention(torch.nn.Module):
    """Projections around the operator, with a gate per head."""

    def __init__(self, heads: int = 4, size: int = 64):
        super().__init__()
        self.heads = heads
        self.inside, self.outside = torch.nn.Linear(size, 3 * size), torch.nn.Linear(size, size)
        self.gate = torch.nn.Parameter(torch.linspace(0.2, 1, heads))

    def forward(self, x):
        q, k, v = self.inside(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.outside(ka_attention(q, k, v, gate=self.gate, backend="triton").transpose(1, 2).flatten(2))


def step(run, module, x):
    """The output and the gradients of all parameters."""
    module.zero_grad()
    out = run(x)
    out.square().sum().backward()
    full = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in module.parameters()]
    return [out.detach(), *(grad.clone() for grad in full)]


def assert_same(ours, truth, **tolerance):
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Attention().cuda()


def test_one_graph_under_the_compiler(module):
    x = torch.randn(2, 200, 64, device="cuda")
    truth = step(module, module, x)
    assert_same(step(torch.compile(module, fullgraph=True), module, x), truth, rtol=1e-3, atol=1e-3)


def test_checkpoint(module):
    x = torch.randn(2, 200, 64, device="cuda")
    truth = step(module, module, x)
    for reentrant in (False, True):
        run = partial(checkpoint, module, use_reentrant=reentrant)
        assert_same(step(run, module, x.clone().requires_grad_()), truth, rtol=0, atol=0)


def test_data_parallel_and_sharded(module, tmp_path):
    x = torch.randn(2, 200, 64, device="cuda")
    truth = step(module, module, x)
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert_same(step(torch.nn.parallel.DistributedDataParallel(module), module, x), truth, rtol=0, atol=0)
        module.zero_grad()
        assert_same(step(fully_shard(module), module, x), truth, rtol=0, atol=0)
    finally:
        torch.distributed.destroy_process_group()
