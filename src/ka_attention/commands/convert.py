"""`ka convert`: a saved softmax model becomes a KA model as its gates are raised in training."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ka_attention.commands.checkpoint import open_run, open_softmax
from ka_attention.conversion.raising import Conversion, convert
from ka_attention.errors import UserError
from ka_attention.harness.run import progress
from ka_attention.harness.run.records import Json
from ka_attention.harness.text.data import Sequences
from ka_attention.harness.training import perplexity
from ka_attention.harness.training.trainer import save


def command(
    checkpoint: str,
    *,
    data: str,
    tokens: int,
    length: int,
    plan: Conversion,
    seed: int,
    out: Path,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> list[dict[str, Json]]:
    """Convert a saved softmax model by ``plan`` (its steps are those of ``tokens``) and save the KA model in ``out``.

    Returns rows of tokens, gate and PPL from 0 to 100 % of the budget. A stopped run goes on from its last tenth.
    """
    model, text = open_softmax(
        checkpoint, data, tokens, length, tokenizer=tokenizer, trust_remote_code=trust_remote_code
    )
    steps = len(text.train) // plan.batch_size
    if not steps:
        raise UserError(f"--tokens: expected at least a batch of {plan.batch_size} × {length} tokens, got {tokens}")
    plan = replace(plan, steps=steps)
    store = open_run("convert", {"checkpoint": checkpoint, "seed": seed, **asdict(plan)}, text, out)

    def ppl(of: Any) -> float:
        return perplexity.evaluate(of, text.validation, batch_size=16).ppl

    def work() -> list[dict[str, Json]]:
        rows = [{"step": 0, "gate": 0.0, "ppl": ppl(model)}]
        with progress.bar("converting", steps) as advance:
            rows += convert(
                model,
                Sequences(text.train),
                plan,
                out / "checkpoints",
                seed=seed,
                evaluations=10,
                perplexity=ppl,
                on_step=lambda: advance(1),
            )
        save(model, text.tokenizer, out)
        shutil.rmtree(out / "checkpoints")
        return [{"tokens": row.pop("step") * plan.batch_size * length, **row} for row in rows]

    return store.part("conversion", work)
