"""Which heads can read attention outputs instead of values, in a softmax-trained model that is not trained further?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ka_attention.conversion.raising import set_gates
from ka_attention.harness import perplexity
from ka_attention.harness.store import Json
from ka_attention.hf import KAConfig, attention_modules, use

SHARES = 8  # points of the curve after 0


def costs(model: Any, sequences: Tensor, *, batch_size: int) -> Tensor:
    """What it costs to put one head at a time on the KA cache: added loss in nats a token, ``[layers, heads]``.

    A fixed gate a head, 1 for the one and 0 for the others, makes each head one parallel pass.
    """
    shape = (len(attention_modules(model)), model.config.get_text_config(decoder=True).num_attention_heads)
    found = torch.zeros(shape, dtype=torch.float64)
    with use(model, KAConfig(gate="head", gate_init=0.0)):
        base = perplexity.evaluate(model, sequences, batch_size=batch_size)["loss"]
        for layer, head in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
            gates = torch.zeros(shape)
            gates[layer, head] = 1.0
            set_gates(model, gates)
            found[layer, head] = perplexity.evaluate(model, sequences, batch_size=batch_size)["loss"] - base
    return found


def cheapest(cost: Tensor, count: int) -> Tensor:
    """Gates ``[layers, heads]`` that put the ``count`` cheapest heads on the KA cache and keep the others on V."""
    gates = torch.zeros(cost.numel())
    gates[cost.flatten().argsort(stable=True)[:count]] = 1.0
    return gates.view(cost.shape)


def evaluate(model: Any, train: Tensor, sequences: Tensor, *, batch_size: int) -> dict[str, Json]:
    """Each head's cost on ``train``, and the PPL on ``sequences`` against the share of heads on the KA cache.

    The heads are chosen on other text than they are judged on.
    """
    cost = costs(model, train, batch_size=batch_size)
    points = min(SHARES, cost.numel())
    curve = []
    with use(model, KAConfig(gate="head", gate_init=0.0)):
        for count in sorted({round(cost.numel() * point / points) for point in range(points + 1)}):
            set_gates(model, cheapest(cost, count))
            ppl = perplexity.evaluate(model, sequences, batch_size=batch_size)["ppl"]
            curve.append({"heads": count, "share": count / cost.numel(), "ppl": ppl})
    return {"cost": cost.tolist(), "curve": curve}
