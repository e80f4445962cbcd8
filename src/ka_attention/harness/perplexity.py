"""Validation perplexity, whole and by position, from one parallel forward pass over whole sequences."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ka_attention.harness.statistics import arms_with, cell, deviation, mean, seeds_of, signed, values
from ka_attention.report.document import Figure, Section, Table

BUCKET = 16  # positions


@torch.inference_mode()
def evaluate(model: Any, sequences: Tensor, *, batch_size: int) -> dict[str, Any]:
    """Perplexity of ``model`` on ``sequences`` (token ids, int64 [N, T]) with the attention it has.

    Position i predicts token i + 1, so T − 1 tokens of a sequence are scored; the loss is their mean negative
    log-likelihood in nats, taken in float32 and averaged in float64. ``by_position`` gives the perplexity of each run
    of 16 predicting positions, ``first`` and ``last`` included.
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
    return {
        "loss": loss,
        "ppl": math.exp(loss),
        "tokens": len(sequences) * len(by_position),
        "by_position": [
            {"first": start, "last": start + len(run) - 1, "ppl": math.exp(run.mean().item())}
            for start, run in zip(range(0, len(by_position), BUCKET), by_position.split(BUCKET), strict=True)
        ],
    }


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats (float64) of ``targets`` (int64 [...]) under ``logits`` [..., vocabulary]."""
    losses = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    return losses.double().view(targets.shape)


def sections(results: dict[str, Any]) -> list[Section]:
    """Validation perplexity by position for every arm."""
    arms = list(arms_with(results, "perplexity"))
    if not arms:
        return []
    runs = {label: _by_position(arm) for label, arm in arms}
    positions = next(iter(runs.values()))
    first, last = positions[0][0], positions[-1][0]
    paragraphs = [
        f"Perplexity (PPL) of the validation tokens, grouped by the position that predicts them ({first} to {last}, "
        f"{BUCKET} positions a group). More context should help; an error that accumulates along the sequence would "
        "show as a curve that turns up, or that falls behind the others towards the end.",
    ]
    if len(positions) > 1:
        paragraphs.append(_against_first_arm(runs))
    table = Table(
        f"Validation PPL by position ({seeds_of(arms)})",
        ["positions", *runs],
        [[name, *(cell(run[row][1]) for run in runs.values())] for row, (name, _) in enumerate(positions)]
        + [["all", *(cell(values(arm, "perplexity", "ppl")) for _, arm in arms)]],
    )

    def draw(ax: Any) -> None:
        for label, run in runs.items():
            means, spread = ([function(numbers) for _, numbers in run] for function in (mean, deviation))
            ax.errorbar(range(len(run)), means, yerr=spread if any(spread) else None, capsize=2, label=label)
        ax.set_xticks(range(len(positions)), [name for name, _ in positions], rotation=45, ha="right")
        ax.set_xlabel("position in the sequence (tokens)")
        ax.set_ylabel("validation PPL")
        ax.legend()

    figure = Figure("ppl_by_position", f"Validation PPL by position, lower is better ({seeds_of(arms)})", draw)
    return [Section("Perplexity by position", paragraphs, [table], [figure])]


def _by_position(arm: dict[str, Any]) -> list[tuple[str, list[float]]]:
    """("0–15", one PPL a seed) for each run of positions."""
    per_seed = [seed["perplexity"]["by_position"] for seed in arm["seeds"]]
    return [
        (f"{runs[0]['first']}–{runs[0]['last']}", [run["ppl"] for run in runs]) for runs in zip(*per_seed, strict=True)
    ]


def _against_first_arm(runs: dict[str, list[tuple[str, list[float]]]]) -> str:
    """How each arm's distance to the first one moves from the first positions to the last."""
    (base_label, base), *others = runs.items()
    sentences = [f"{base_label}: PPL {mean(base[0][1]):,.1f} at the start, {mean(base[-1][1]):,.1f} at the end."]
    for label, run in others:
        start, end = (100 * (mean(run[i][1]) / mean(base[i][1]) - 1) for i in (0, -1))
        sentences.append(f"{label} against {base_label}: {signed(start)} at the start, {signed(end)} at the end.")
    return " ".join(sentences)
