"""One training step of Pythia-70M, KA beside softmax attention, and what a call costs the processor.

`python -m benchmarks.training [--json FILE]`; `python -m benchmarks.goals FILE` judges the figures. A step is what the
Trainer does: forward under bfloat16 autocast, backward, clipping, fused AdamW, zeroing. With short sequences a GPU
waits for the processor, so the processor's time of a call of the operator and of PyTorch's attention stand beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.goals import Record, section_table
from benchmarks.harness import device_type, machine, medians, print_tables
from ka_attention import ka_attention
from ka_attention.harness.models.arms import arm, build
from ka_attention.harness.run.settings import ModelSettings
from ka_attention.studies.compare.recipes import COMPARE

PYTHIA = COMPARE["pythia-70m-training"]
ARMS = {"softmax": "softmax", "KA": "ka"}
CALLS = 100  # before waiting for the device: fewer than its queue holds


def run(path: Path | None = None) -> Iterator[str]:
    """The tables, each as soon as it is there; ``path`` gets all figures so far with each of them."""
    records: list[Record] = []
    for section in (steps, processor):
        found = list(section())
        records += found
        if path:
            path.write_text(json.dumps({"machine": machine(), "records": records}))
        yield section_table(found)


def steps(
    settings: ModelSettings = PYTHIA,
    batch: int = PYTHIA.batch_size,
    length: int = PYTHIA.sequence_length,
    seconds: float = 20.0,
) -> Iterator[Record]:
    """Steps of a model with either attention, in turns."""
    took = medians({name: step(attention, settings, batch, length) for name, attention in ARMS.items()}, seconds)
    yield {"section": "training", "case": "Pythia-70M", "shape": [batch, length], "pass": "step", "ms": took}


def step(attention: str, settings: ModelSettings, batch: int, length: int) -> Callable[[], Tensor]:
    """A call that trains a fresh model one step further, always on the same tokens, and returns the loss."""
    device = device_type()
    model: Any = build(arm(attention), settings, seed=0)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(settings.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)

    def call() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        return loss.detach()

    return call


def processor(shape: tuple[int, ...] = (1, 8, 128, 64), seconds: float = 4.0) -> Iterator[Record]:
    """Time of a call until it returns, in a layer's layout; on a CPU it computes as well, so there it says little."""
    B, H, T, D = shape
    inputs = [
        torch.randn(B, T, H, D, device=device_type(), dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]
    grad = torch.randn_like(inputs[0])
    peers: dict[str, Callable] = {"SDPA": partial(F.scaled_dot_product_attention, is_causal=True), "KA": ka_attention}
    forward = medians({name: partial(_calls, partial(peer, *inputs)) for name, peer in peers.items()}, seconds / 2)
    both = medians(
        {name: partial(_calls, partial(_both, peer, inputs, grad)) for name, peer in peers.items()}, seconds / 2
    )
    backward = {name: both[name] - forward[name] for name in peers}
    for label, took in (("forward", forward), ("backward", backward)):
        ms = {name: total / CALLS for name, total in took.items()}
        yield {"section": "processor", "case": "a call", "shape": list(shape), "pass": label, "ms": ms}


def _calls(function: Callable[[], object]) -> None:
    for _ in range(CALLS):
        function()


def _both(attention: Callable, inputs: Sequence[Tensor], grad: Tensor) -> object:
    return torch.autograd.grad(attention(*inputs), inputs, grad)


if __name__ == "__main__":
    print_tables(__doc__, run)
