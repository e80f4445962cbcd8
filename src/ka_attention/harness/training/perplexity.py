"""Perplexity, whole and by position, from one parallel forward pass over whole sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BUCKET = 16  # positions


@dataclass(frozen=True)
class Run:
    """The perplexity of the tokens that positions ``first`` to ``last`` predict."""

    first: int
    last: int
    ppl: float

    @property
    def name(self) -> str:
        return f"{self.first}–{self.last}"


@dataclass(frozen=True)
class Perplexity:
    """Of ``tokens`` predicted tokens: mean ``loss`` in nats, ``ppl`` = exp(loss), and PPL of every 16 positions."""

    loss: float
    ppl: float
    tokens: int
    by_position: tuple[Run, ...]

    def by_octave(self) -> list[Run]:
        """Positions 0–15, 16–31, 32–63, 64–127, …"""
        octaves: dict[int, list[Run]] = {}
        for run in self.by_position:
            octaves.setdefault((run.first // BUCKET).bit_length(), []).append(run)
        found = []
        for group in octaves.values():
            sizes = [run.last - run.first + 1 for run in group]
            loss = sum(size * math.log(run.ppl) for size, run in zip(sizes, group, strict=True)) / sum(sizes)
            found.append(Run(group[0].first, group[-1].last, math.exp(loss)))
        return found


@torch.inference_mode()
def evaluate(model: Any, sequences: Tensor, *, batch_size: int) -> Perplexity:
    """Perplexity of ``model`` on ``sequences`` (token ids, int64 [N, T]) with the attention it has.

    Position i predicts token i + 1, so T − 1 tokens of a sequence are scored; the loss is their mean negative
    log-likelihood in nats, taken in float32 and averaged in float64.
    """
    training = model.training
    model.eval()
    by_position = torch.zeros(sequences.shape[1] - 1, dtype=torch.float64)
    for batch in sequences.split(batch_size):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        by_position += token_losses(logits, batch[:, 1:]).sum(0).cpu()
    model.train(training)
    by_position /= len(sequences)
    loss = by_position.mean().item()
    starts = range(0, len(by_position), BUCKET)
    runs = zip(starts, by_position.split(BUCKET), strict=True)
    return Perplexity(
        loss=loss,
        ppl=math.exp(loss),
        tokens=len(sequences) * len(by_position),
        by_position=tuple(Run(start, start + len(run) - 1, math.exp(run.mean().item())) for start, run in runs),
    )


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats (float64) of ``targets`` (int64 [...]) under ``logits`` [..., vocabulary]."""
    losses = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    return losses.double().view(targets.shape)
