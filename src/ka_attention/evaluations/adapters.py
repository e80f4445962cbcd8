"""Can a small map from attention outputs back to values repair a softmax-trained model that decodes with a KA cache?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ka_attention.conversion.fitting import fit_gradient, fit_ridge, new_adapters
from ka_attention.harness.figures.statistics import cell, changes, judged, mean, percent_cell, seeds_of
from ka_attention.harness.models.arms import ArmResults
from ka_attention.harness.training import perplexity
from ka_attention.harness.training.trained import BATCH as READ
from ka_attention.harness.training.trained import Trained, steps_for
from ka_attention.hf import use
from ka_attention.report.document import Section, Table

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


@dataclass(frozen=True)
class Gate:
    """PPL with every gate at ``gate``, without training."""

    gate: float
    ppl: float


@dataclass(frozen=True)
class Method:
    """One kind of adapter: PPL with it, the tokens and seconds of fitting it, its size."""

    label: str
    ppl: float
    tokens: int
    seconds: float
    parameters: int


@dataclass(frozen=True)
class Adapters:
    """PPL of a softmax model: its own (``base``), at every gate (1 is the ``swap``), and with each adapter."""

    base: float
    swap: float
    gates: tuple[Gate, ...]
    methods: dict[str, Method]


def run(trained: Trained) -> Adapters | None:
    """Of a model trained with plain softmax attention."""
    if not trained.is_plain_softmax:
        return None
    steps = steps_for(SHARE, trained.tokens, trained.settings.sequence_length, BATCH)
    return evaluate(trained.model, trained.text.train, trained.sample, steps=steps, batch_size=READ)


def evaluate(model: Any, train: Tensor, sequences: Tensor, *, steps: int, batch_size: int) -> Adapters:
    """PPL on ``sequences`` of a softmax model; adapters are fitted on ``steps`` batches of ``train``."""

    def ppl() -> float:
        return perplexity.evaluate(model, sequences, batch_size=batch_size).ppl

    gates = []
    for gate in GATES:
        with use(model, gate=gate):
            gates.append(Gate(gate, ppl()))
    methods = {}
    for name, (label, *_) in METHODS.items():
        start = time.perf_counter()
        adapters, tokens = fit(model, train, name, steps)
        seconds = time.perf_counter() - start
        parameters = sum(p.numel() for adapter in adapters.values() for p in adapter.parameters())
        with use(model, adapter=adapters):
            methods[name] = Method(label, ppl(), tokens, seconds, parameters)
    return Adapters(gates[0].ppl, gates[-1].ppl, tuple(gates), methods)


def sections(arms: Sequence[ArmResults[Adapters]]) -> list[Section]:
    """The swap, every gate without training, and each adapter."""
    arm, seeds = arms[0], seeds_of(arms[:1])
    base, swap = arm.each(lambda found: found.base), arm.each(lambda found: found.swap)
    methods = arm.seeds[0].methods
    ppl = {name: [found.methods[name].ppl for found in arm.seeds] for name in methods}
    best = min(ppl, key=lambda name: mean(ppl[name]))
    helped = [methods[name].label for name in methods if mean(ppl[name]) < mean(swap)]
    against_swap = changes(ppl[best], swap)
    words = [
        "Expected: a learned map A → V̂ repairs part of the damage, at most as far as an output still contains its own "
        "token's value: A_j = Σ W_jk V_k holds V_j with the weight W_jj only.",
        f"What came: the swap alone stands at {percent_cell(changes(swap, base))} PPL against softmax attention. "
        + (f"Better than the swap: {'; '.join(helped)}. " if helped else "No adapter is better than the swap. ")
        + f"The best is **{methods[best].label}** with {percent_cell(changes(ppl[best], base))} against softmax, "
        f"{judged(against_swap)} against the swap.",
        *_regression(methods, ppl),
    ]
    rows = [["softmax, own KV cache", cell(base), "–", "–", "–"], ["swap", cell(swap), _change(swap, base), "0", "0"]]
    for name, method in methods.items():
        seconds = [found.methods[name].seconds for found in arm.seeds]
        change = _change(ppl[name], base)
        rows.append([method.label, cell(ppl[name]), change, f"{method.tokens:,}", f"{mean(seconds):,.1f}"])
    gates = [(gate.gate, [found.gates[i].ppl for found in arm.seeds]) for i, gate in enumerate(arm.seeds[0].gates)]
    tables = [
        Table(f"Adapters, base frozen ({seeds})", ["method", "PPL", "against softmax", "tokens", "seconds"], rows),
        Table(
            f"Without training, every gate at g ({seeds})",
            ["g", "PPL", "against softmax"],
            [[f"{gate:g}", cell(numbers), _change(numbers, base)] for gate, numbers in gates],
        ),
    ]
    return [Section("Adapters", words, tables)]


def _regression(methods: dict[str, Method], ppl: dict[str, list[float]]) -> list[str]:
    """Whether the map that regresses values best also decodes best."""
    regressed, trained = "ridge-value", "linear-lm"
    if not {regressed, trained} <= methods.keys() or mean(ppl[trained]) >= mean(ppl[regressed]):
        return []
    return [
        f"A map that regresses V best in the mean is not the one that decodes best (PPL {cell(ppl[regressed])} against "
        f"{cell(ppl[trained])} of the same map trained end to end): its errors feed back through every later output."
    ]


def _change(numbers: list[float], base: list[float]) -> str:
    return percent_cell(changes(numbers, base))
