"""The blocked backend beside `scaled_dot_product_attention`: training, decoding, peak memory; float32, two threads."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.harness import medians, peak_memory, table
from ka_attention import ka_attention

THREADS = 2
TRAINING = [(32, 8, 128, 64), (4, 8, 512, 64), (1, 8, 2048, 64), (1, 8, 8192, 64)]
DECODING = [(8, 8, 128, 64), (1, 8, 2048, 64), (8, 8, 2048, 64)]
PEERS: dict[str, Callable] = {
    "SDPA": partial(F.scaled_dot_product_attention, is_causal=True),
    "KA": partial(ka_attention, backend="blocked"),
}


def run() -> Iterator[str]:
    """The tables, each as soon as it is there."""
    torch.set_num_threads(THREADS)
    q, k, v = (torch.randn(2, 2, 300, 16) for _ in range(3))
    torch.testing.assert_close(ka_attention(q, k, v), ka_attention(q, k, v, backend="reference"))  # wrong is not timed
    header = ["B, H, T, D", "pass", "SDPA ms", "KA ms", "KA / SDPA", "SDPA MiB", "KA MiB"]
    for shape in TRAINING:
        yield table(header, [_row(shape, backward) for backward in (False, True)])
    yield table(["B, H, past, D", "pass", "SDPA ms", "KA ms", "KA / SDPA"], [_decode(shape) for shape in DECODING])


def training_step(peer: str, shape: tuple[int, ...], backward: bool) -> Callable[[], object]:
    """A call of the forward pass, or of both, on inputs that are there already."""
    torch.set_num_threads(THREADS)

    def step(shape: tuple[int, ...]) -> Callable[[], object]:
        inputs = [torch.randn(shape, requires_grad=backward) for _ in range(3)]
        grad = torch.randn(shape)
        return lambda: torch.autograd.grad(PEERS[peer](*inputs), inputs, grad) if backward else PEERS[peer](*inputs)

    step((1, 1, 64, 16))()  # the first call with a gradient imports 30 MiB of modules
    return step(shape)


def _row(shape: tuple[int, ...], backward: bool) -> list[str]:
    took = medians({peer: training_step(peer, shape, backward) for peer in PEERS})
    memory = [peak_memory(training_step, peer, shape, backward) for peer in PEERS]
    return [
        *_compared(shape, "forward + backward" if backward else "forward", took),
        *("n/a" if used is None else f"{used:.0f}" for used in memory),
    ]


def _decode(shape: tuple[int, ...]) -> list[str]:
    """One new token after a cached past. A KV cache costs SDPA no more than a KA cache costs here: neither is grown."""
    k, u = torch.randn(2, *shape)
    q, k_new, v_new = torch.randn(3, *shape[:2], 1, shape[3])
    keys, values = torch.cat([k, k_new], 2), torch.cat([u, v_new], 2)
    took = medians(
        {
            "SDPA": lambda: F.scaled_dot_product_attention(q, keys, values),
            "KA": lambda: ka_attention(q, k_new, v_new, past=(k, u), backend="blocked"),
        }
    )
    return _compared(shape, "decode", took)


def _compared(shape: tuple[int, ...], what: str, took: dict[str, float]) -> list[str]:
    sdpa, ka = took["SDPA"], took["KA"]
    return [", ".join(map(str, shape)), what, f"{sdpa:.2f}", f"{ka:.2f}", f"{ka / sdpa:.2f}"]
