"""Training steps of a Llama-like model: what each part of the fast loop gives, and how fast each mixer trains.

`python -m benchmarks.hybrid [--json FILE] [RECIPE …]`: recipes of `ka study hybrid`, 47m by default. A step reads one
batch of random tokens: forward, backward, clipping, AdamW. MFU: 6 operations a weight that multiplies and 12 a channel
and pair attended, a token, over the datasheet's dense bfloat16 rate.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import machine
from ka_attention.harness.models.passes import Passes
from ka_attention.harness.run.timing import now
from ka_attention.harness.training.pretraining import adamw, numerics, operations, utilisation
from ka_attention.studies.hybrid.models import arm, build
from ka_attention.studies.hybrid.recipes import RECIPES, HybridRecipe
from ka_attention.studies.hybrid.study import attended

STEPS = 8
MIXERS = ("full-gated", "3to1-ka-head-w4-gated", "3to1-softmax-w4-gated", "3to1-none-gated", "3to1-conv-gated")


def run(names: tuple[str, ...] = ("47m",), path: Path | None = None) -> Iterator[str]:
    """One line a measurement, as it comes; ``path`` gets all of them."""
    rows: list[dict[str, Any]] = []
    for recipe in (RECIPES[name] for name in names):
        for what, name, passes, fused in cases():
            row = {"recipe": recipe.name, "what": what, "arm": name, **measure(recipe, name, passes, fused)}
            rows.append(row)
            if path:
                path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
            mfu = "" if row["mfu"] is None else f", MFU {100 * row['mfu']:.1f} %"
            yield (
                f"{recipe.name:5} {what:28} {name:26} {row['tokens_per_s']:>10,.0f} tokens/s{mfu}"
                f", first step {row['first']:.1f} s"
            )


def cases() -> Iterator[tuple[str, str, Passes | None, bool]]:
    """(what, arm, passes, whether AdamW is fused): the stock model and what is added to it, then every mixer."""
    cuda = torch.cuda.is_available()
    plain, compiled, graphs = (Passes(compiled=cuda and n > 0, graphs=cuda and n > 1) for n in range(3))
    yield "stock model and AdamW", "full-gated", None, False
    yield "and AdamW fused", "full-gated", None, True
    yield "and the loss in chunks", "full-gated", plain, True
    yield "and compiled around mixers", "full-gated", compiled, True
    for name in MIXERS:
        yield "and steps as CUDA graphs", name, graphs, True


def stock(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
    """The loss that transformers computes, with all logits in memory."""
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def measure(recipe: HybridRecipe, name: str, passes: Passes | None, fused: bool) -> dict[str, Any]:
    """Tokens a second over STEPS steps, MFU, and the seconds until the first step is done, compilation included."""
    device: Any = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = build(arm(name), recipe, recipe.sequence_length, 0).to(device)
    optimizer = adamw(model, recipe, fused=fused)
    tokens = torch.randint(recipe.vocab_size, (recipe.batch_size, recipe.sequence_length + 1), device=device)

    def work(ids: Tensor) -> Tensor:
        with numerics(device):
            loss = (passes.loss if passes else stock)(model, ids[:, :-1], ids[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    began = time.perf_counter()
    step = partial(passes.ready(work, tokens) if passes else work, tokens)
    step()
    first = now(device) - began
    for _ in range(2):
        step()
    began = now(device)
    for _ in range(STEPS):
        step()
    speed = STEPS * recipe.batch_size * recipe.sequence_length / (now(device) - began)
    return {
        "tokens_per_s": speed,
        "mfu": utilisation(speed * operations(model, attended(arm(name), recipe))),
        "first": first,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=["47m"], choices=list(RECIPES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for line in run(tuple(arguments.recipes), arguments.json):
        print(line, flush=True)
