"""Can a small map from attention outputs back to values repair a softmax-trained model that decodes with a KA cache?"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from ka_attention.conversion.fitting import fit_gradient, fit_ridge, new_adapters
from ka_attention.harness import perplexity
from ka_attention.harness.store import Json
from ka_attention.hf import use

GATES = (0.0, 0.25, 0.5, 0.75, 1.0)
# name: (label, kind of adapter, loss, closed form). Those by gradient start at the identity, which is the swap.
METHODS = {
    "ridge-value": ("linear, ridge regression on V", "linear", "value", True),
    "ridge-output": ("linear, ridge regression on outputs", "linear", "output", True),
    "linear-output": ("linear, trained on outputs", "linear", "output", False),
    "mlp-output": ("bottleneck MLP, trained on outputs", "mlp", "output", False),
    "linear-lm": ("linear, trained end to end", "linear", "lm", False),
}
BATCH = 8
SHARE = 0.05  # of the model's training tokens
END_TO_END = 3  # a step through the token loop is slow, so end-to-end training gets a third of the steps
LEARNING_RATE = {"linear": 1e-2, "mlp": 3e-3}


def fit(model: Any, sequences: Tensor, method: str, steps: int, seed: int = 0) -> tuple[dict[int, nn.Module], int]:
    """Adapters for a frozen softmax ``model`` and the tokens they were fitted on; ``steps`` batches of 8 sequences."""
    _, kind, loss, closed = METHODS[method]
    if closed:
        used = sequences[: steps * BATCH]
        return fit_ridge(model, used, loss=loss), used.numel()  # type: ignore[arg-type]
    torch.manual_seed(seed)
    adapters = new_adapters(model, kind)
    steps = max(1, steps // END_TO_END) if loss == "lm" else steps
    fit_gradient(
        model,
        sequences,
        adapters,
        loss=loss,  # type: ignore[arg-type]
        steps=steps,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE[kind],
        seed=seed,
    )
    return adapters, steps * BATCH * sequences.shape[1]


def evaluate(model: Any, train: Tensor, sequences: Tensor, *, steps: int, batch_size: int) -> dict[str, Json]:
    """PPL on ``sequences`` of a softmax model: its own, at every gate without training, and with each adapter."""

    def ppl() -> float:
        return perplexity.evaluate(model, sequences, batch_size=batch_size)["ppl"]

    gates = []
    for gate in GATES:
        with use(model, gate=gate):
            gates.append({"gate": gate, "ppl": ppl()})
    methods = {}
    for name, (label, *_) in METHODS.items():
        start = time.perf_counter()
        adapters, tokens = fit(model, train, name, steps)
        seconds = time.perf_counter() - start
        with use(model, adapter=adapters):
            methods[name] = {
                "label": label,
                "ppl": ppl(),
                "tokens": tokens,
                "seconds": seconds,
                "parameters": sum(p.numel() for adapter in adapters.values() for p in adapter.parameters()),
            }
    return {"base": gates[0]["ppl"], "swap": gates[-1]["ppl"], "gates": gates, "methods": methods}
