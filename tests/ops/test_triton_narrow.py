"""Narrow windows in the Triton kernels: segments and their maps, and numbers that are not finite.

Runs as tests/ops/test_triton.py does: on the GPU, or in a process of its own in Triton's interpreter.
"""

from types import SimpleNamespace

import pytest
import torch
from problems import Problem
from test_triton import (
    CUDA,
    KERNELS,
    SMALL,
    assert_within_budget,
    in_the_interpreter,
    kernels,
    on_device,
)

from ka_attention.ops.blocked import finite

if not KERNELS:

    def test_narrow_windows_in_the_interpreter():
        in_the_interpreter(__file__)


@pytest.fixture
def divide(monkeypatch):
    """Divides every head into so many segments."""
    pytest.importorskip("triton")
    from ka_attention.ops.triton import backend, tiles

    monkeypatch.setattr(backend, "_plans", {})
    return lambda segments: monkeypatch.setattr(tiles, "segments", lambda *_: segments)


def outputs(tensors, options):
    from ka_attention.ops.triton import forward

    return forward(*tensors, **options, save=False)[0].clone()


@kernels
@pytest.mark.parametrize(
    "given",
    [
        {"window": 2},
        {"window": 17, "gate": "token", "Hkv": 2},
        {"window": 5, "gate": "signed", "P": 21, "mask": "full", "softcap": 2.0},
        {"window": 20, "gate": "token", "P": 4, "D": 24},
        {"window": 40, "P": 70, "T": 130},
        {"window": 7, "lengths": (33, 0, 1, 40), "gate": "token"},
    ],
)
def test_segments(given, divide):
    divide(3)
    assert_within_budget(Problem(**SMALL | given, dtype=torch.float32))


@kernels
@pytest.mark.parametrize(
    "given",
    [
        {"window": 8, "gate": "token", "P": 7},
        {"window": 16, "P": 4, "Hkv": 2},
        {"window": 20, "gate": "token", "P": 19, "dtype": torch.float16},
    ],
)
def test_a_share_stops_between_kernels(given, divide):
    """For what comes before to be known then: its map gives the U that the whole has, and b its gradient."""
    from ka_attention.ops.triton import backward, forward, state_gradient
    from ka_attention.ops.triton import open as start

    divide(3)
    tensors, options = on_device(Problem(**SMALL | {"T": 64, "dtype": torch.float32} | given))
    error = 1e-5 if tensors[0].dtype == torch.float32 else 4e-3
    q, k, v, gate, k_past, u = tensors[:6]
    a, lse, saved = forward(*tensors, **options, save=True)
    u_past = torch.zeros_like(u)
    M, c, finish = start(q, k, v, gate, k_past, u_past, **options, save=True)
    state, values = options["window"] - 1, v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    expected = (a if gate is None else values + gate[..., None] * (a - values))[:, :, -state:]
    assert (c + M[..., state - u.shape[2] :] @ u.float() - expected).norm() < error * expected.norm()
    u_past.copy_(u)
    found = finish()
    assert (found[0] - a).norm() < error * a.norm()
    da = torch.randn_like(a)
    b = state_gradient(da, q, k, v, gate, k_past, u_past, found[2], **options)
    expected = backward(da, *tensors, a, lse, saved, **options)[5]
    assert (b - expected).norm() < error * expected.norm()
    assert start(q[:, :, :50], k[:, :, :50], v[:, :, :50], None, k_past, u_past, **options, save=True) is None


@kernels
@pytest.mark.parametrize("segments", [1, 7] if CUDA else [7])
@pytest.mark.parametrize(
    ("name", "row", "given"),
    [("q", 30, {}), ("k", 30, {"gate": "token"}), ("v", 30, {"gate": "token"}), ("v", 33, {})],
)
def test_a_mask_keeps_apart_what_is_not_finite(name, row, given, segments, divide):
    divide(segments)
    tensors, options = on_device(Problem(**SMALL | given | {"T": 100, "mask": "full"}, window=3, dtype=torch.float32))
    tensors[6][..., 31:90, :] = True
    tensors[6][..., 90:, :90] = False  # the last tokens do not look back beyond them
    if given.get("gate"):
        tensors[3][:, :, 34:37] = 0  # and here outputs are not read
    clean = outputs(tensors, options)
    tensors["qkv".index(name)][0, 0, row, 5] = float("nan")
    found = outputs(tensors, options)
    lost = finite.reached(tensors[:6], tensors[6], options["window"])
    assert lost[:, :, 31 if given else 64 :].any()  # without gates on and on, from segment to segment
    assert not lost[:, :, 90:].any()
    assert torch.equal(lost, ~found.isfinite().all(-1))
    assert torch.equal(found[~lost], clean[~lost])


@kernels
@pytest.mark.parametrize("lost", [False, True], ids=["", "not finite"])
@pytest.mark.parametrize("given", [{"window": 9, "gate": "token"}, {"window": 20, "gate": "head", "D": 24}])
def test_many_segments_are_scanned_in_groups(given, lost, divide, monkeypatch):
    from ka_attention.ops.triton import forward, tiles

    divide(7)
    monkeypatch.setattr(tiles, "MANY", 4)
    tensors, options = on_device(Problem(**SMALL | given | {"lengths": (75, 3, 22)}, dtype=torch.float32))
    if lost:
        tensors[2][:, :, 66] = float("nan")
    expected = forward(*tensors, **options, save=True)[0]  # for a backward there is one scan
    found = outputs(tensors, options)
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert expected.isfinite().all() != lost
    assert (found - expected).nan_to_num().norm() < 1e-6 * expected.nan_to_num().norm()


@kernels
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(("window", "dtype"), [(9, torch.float32), (20, torch.float16)])
def test_packed_sequences_stay_apart(window, dtype, segments, divide):
    divide(segments)
    tensors, options = on_device(Problem(**SMALL | {"lengths": (21, 30, 19)}, window=window, dtype=dtype))
    clean = outputs(tensors, options)
    for x in tensors[:3]:
        x[:, :, 25] = float("nan")
    found = outputs(tensors, options)
    assert found[:, :, 25:51].isnan().all()
    assert torch.equal(found[:, :, :25], clean[:, :, :25])
    assert torch.equal(found[:, :, 51:], clean[:, :, 51:])


@pytest.mark.parametrize(
    ("window", "D", "dtype", "before"),
    [
        (None, 64, torch.float16, None),
        (1, 64, torch.float16, None),
        (2, 64, torch.float16, 16),
        (17, 256, torch.bfloat16, 16),
        (18, 128, torch.bfloat16, 32),
        (33, 96, torch.bfloat16, 32),
        (34, 128, torch.bfloat16, 64),
        (65, 64, torch.bfloat16, 64),
        (65, 256, torch.bfloat16, None),
        (66, 64, torch.bfloat16, None),
        (17, 64, torch.float32, 16),
        (18, 64, torch.float32, None),
    ],
)
def test_which_windows_are_narrow(window, D, dtype, before):
    pytest.importorskip("triton")
    from ka_attention.ops.triton import tiles

    q = SimpleNamespace(
        device=torch.device("cuda"), dtype=dtype, shape=(1, 1, 8, D), element_size=lambda: dtype.itemsize
    )
    assert tiles.narrow_reach(q, window) == before
