"""Which heads can read attention outputs instead of values, in a softmax-trained model that is not trained further?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ka_attention.conversion.raising import set_gates
from ka_attention.harness.figures.drawing import line, look
from ka_attention.harness.figures.statistics import cell, changes, mean, percent_cell, seeds_of
from ka_attention.harness.models.arms import ArmResults
from ka_attention.harness.training import perplexity
from ka_attention.harness.training.trained import BATCH, Trained
from ka_attention.hf import KAConfig, attention_modules, use
from ka_attention.report.document import Figure, Section, Table

SHARES = 8  # points of the curve after 0
AIM = 1.0  # percent above the softmax model


@dataclass(frozen=True)
class Point:
    """PPL with the cheapest ``heads`` on the KA cache, a ``share`` of all."""

    heads: int
    share: float
    ppl: float


@dataclass(frozen=True)
class Heads:
    """``cost``, ``[layers][heads]``: loss that each head alone adds, in nats; ``curve``: PPL from none to all."""

    cost: tuple[tuple[float, ...], ...]
    curve: tuple[Point, ...]


def run(trained: Trained) -> Heads | None:
    """Of a model trained with plain softmax attention."""
    if not trained.is_plain_softmax:
        return None
    sample = trained.sample
    return evaluate(trained.model, trained.text.train[: len(sample)], sample, batch_size=BATCH)


def costs(model: Any, sequences: Tensor, *, batch_size: int) -> Tensor:
    """What it costs to put one head at a time on the KA cache: added loss in nats per token, ``[layers, heads]``.

    A fixed gate per head, 1 for the one and 0 for the others, makes each head one parallel pass.
    """
    shape = (len(attention_modules(model)), model.config.get_text_config(decoder=True).num_attention_heads)
    found = torch.zeros(shape, dtype=torch.float64)
    with use(model, KAConfig(gate="head", gate_init=0.0)):
        base = perplexity.evaluate(model, sequences, batch_size=batch_size).loss
        for layer, head in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
            gates = torch.zeros(shape)
            gates[layer, head] = 1.0
            set_gates(model, gates)
            found[layer, head] = perplexity.evaluate(model, sequences, batch_size=batch_size).loss - base
    return found


def cheapest(cost: Tensor, count: int) -> Tensor:
    """Gates ``[layers, heads]`` that put the ``count`` cheapest heads on the KA cache and keep the others on V."""
    gates = torch.zeros(cost.numel())
    gates[cost.flatten().argsort(stable=True)[:count]] = 1.0
    return gates.view(cost.shape)


def evaluate(model: Any, train: Tensor, sequences: Tensor, *, batch_size: int) -> Heads:
    """Each head's cost on ``train``, and the PPL on ``sequences`` against the share of heads on the KA cache.

    The heads are chosen on other text than they are judged on.
    """
    cost = costs(model, train, batch_size=batch_size)
    points = min(SHARES, cost.numel())
    curve = []
    with use(model, KAConfig(gate="head", gate_init=0.0)):
        for count in sorted({round(cost.numel() * point / points) for point in range(points + 1)}):
            set_gates(model, cheapest(cost, count))
            ppl = perplexity.evaluate(model, sequences, batch_size=batch_size).ppl
            curve.append(Point(count, count / cost.numel(), ppl))
    return Heads(tuple(map(tuple, cost.tolist())), tuple(curve))


def sections(arms: Sequence[ArmResults[Heads]]) -> list[Section]:
    """What each head costs, and PPL against the share of heads on the KA cache."""
    arm, seeds = arms[0], seeds_of(arms[:1])
    curve = arm.seeds[0].curve
    ppl = [[found.curve[i].ppl for found in arm.seeds] for i in range(len(curve))]
    within = [point for point, numbers in zip(curve, ppl, strict=True) if mean(changes(numbers, ppl[0])) <= AIM][-1]
    words = [
        "Each head's cost is what it adds to the loss on training text when it alone reads attention outputs. The "
        "cheapest heads move to the KA cache first; the others keep reading values. Nothing is trained.",
        (
            f"Within {AIM:.0f} % of the softmax PPL up to {100 * within.share:.0f} % of the heads"
            if within.heads
            else f"Already the cheapest {curve[1].heads} of {curve[-1].heads} heads cost more than {AIM:.0f} % of PPL"
        )
        + f"; all of them cost {percent_cell(changes(ppl[-1], ppl[0]))}.",
    ]
    layers = range(len(arm.seeds[0].cost))
    cost = [[mean([found.cost[i][j] for found in arm.seeds]) for j in range(len(arm.seeds[0].cost[i]))] for i in layers]
    tables = [
        Table(
            f"PPL against the share of heads on KA ({seeds})",
            ["heads", "share", "PPL", "against softmax"],
            [
                [str(point.heads), f"{100 * point.share:.0f} %", cell(numbers), percent_cell(changes(numbers, ppl[0]))]
                for point, numbers in zip(curve, ppl, strict=True)
            ],
        ),
        Table(
            f"Added loss of one head on KA, nats per token ({seeds}; head numbers above)",
            ["layer", *(str(j) for j in range(len(cost[0])))],
            [[str(i), *(f"{value:+.3f}" for value in row)] for i, row in enumerate(cost)],
        ),
    ]

    def draw(ax: Any) -> None:
        line(ax, [100 * point.share for point in curve], ppl, **look(arm.arm))
        ax.set_xlabel("heads on the KA cache (%)")
        ax.set_ylabel("validation PPL")

    figure = Figure("ppl_by_heads", f"PPL against the share of heads on KA, cheapest first ({seeds})", draw)
    return [Section("Which heads", words, tables, [figure])]
