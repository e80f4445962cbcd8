"""How few tokens turn a softmax-trained model into a KA model: PPL against conversion tokens, gates and windows."""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ka_attention.errors import UserError
from ka_attention.hf import KAConfig, attention_modules, use
from ka_attention.hf.convert import Conversion, convert
from ka_attention.studies import perplexity, progress
from ka_attention.studies.checkpoint import open_run, open_softmax
from ka_attention.studies.data import Sequences
from ka_attention.studies.store import Json

SHARES = (0.01, 0.02, 0.05, 0.10)  # of the tokens that the softmax model was trained on
SIDE = 0.02  # the share for the side questions: free gates and windows
WINDOWS = (8, 16, 32)


def steps_for(share: float, original_tokens: int, length: int, batch: int = Conversion.batch_size) -> int:
    """Steps of ``batch`` sequences that read ``share`` of the original training tokens."""
    return max(1, round(share * original_tokens / (batch * length)))


def evaluate(
    model: Any,
    train: Tensor,
    sequences: Tensor,
    *,
    original_tokens: int,
    learning_rate: float,
    batch_size: int,
    seed: int = 0,
) -> dict[str, Json]:
    """Conversions of copies of a softmax ``model``, each from the start with a budget of its own, and their controls.

    ``runs``: KA by share of the original tokens, ``control``, the same training without KA-attention on the text alone
    (nothing to follow), and ``learned``, with free gates. ``windows``: for each window the conversions to KA-attention
    and to softmax attention in it, and what either gives ``untrained``.
    """

    def ppl(of: Any) -> float:
        return perplexity.evaluate(of, sequences, batch_size=batch_size)["ppl"]

    def untrained(ka: KAConfig) -> float:
        with use(model, ka):
            return ppl(model)

    def run(plan: Conversion) -> dict[str, Json]:
        converted = copy.deepcopy(model)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            convert(converted, Sequences(train), plan, Path(folder), seed=seed, evaluations=0)
        return {
            "steps": plan.steps,
            "tokens": plan.steps * plan.batch_size * train.shape[1],
            "seconds": time.perf_counter() - start,
            "ppl": ppl(converted),
            "gates": [m.ka_gate(None).tolist() for m in attention_modules(converted) if hasattr(m, "ka_gate")],
        }

    def plan(share: float, **settings: Any) -> Conversion:
        steps = steps_for(share, original_tokens, train.shape[1])
        return Conversion(steps=steps, learning_rate=learning_rate, **settings)

    return {
        "original_tokens": original_tokens,
        "shares": list(SHARES),
        "base": ppl(model),
        "swap": untrained(KAConfig()),
        "runs": {
            **{f"{share:g}": run(plan(share)) for share in SHARES},
            "control": run(plan(SHARES[-1], target="softmax", stage_one=0.0)),
            "learned": run(plan(SIDE, target="learned", stage_one=0.0)),
        },
        "windows": [
            {
                "window": window,
                "ka": {"untrained": untrained(KAConfig(window=window)), **run(plan(SIDE, window=window))},
                "softmax": {
                    "untrained": untrained(KAConfig(window=window, gate_init=0.0)),
                    **run(plan(SIDE, window=window, target="softmax")),
                },
            }
            for window in WINDOWS
        ],
    }


def command(
    checkpoint: str, *, data: str, tokens: int, length: int, plan: Conversion, seed: int, out: Path
) -> list[dict[str, Json]]:
    """Convert a saved softmax model by ``plan`` (its steps are those of ``tokens``) and save the KA model in ``out``.

    Returns rows of tokens, gate and PPL from 0 to 100 % of the budget. A stopped run goes on from its last tenth.
    """
    model, text = open_softmax(checkpoint, data, tokens, length)
    steps = len(text.train) // plan.batch_size
    if not steps:
        raise UserError(f"--tokens: expected at least a batch of {plan.batch_size} × {length} tokens, got {tokens}")
    plan = replace(plan, steps=steps)
    store = open_run("convert", {"checkpoint": checkpoint, "seed": seed, **asdict(plan)}, text, out)

    def ppl(of: Any) -> float:
        return perplexity.evaluate(of, text.validation, batch_size=16)["ppl"]

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
        model.save_pretrained(out)
        text.tokenizer.save_pretrained(out)
        shutil.rmtree(out / "checkpoints")
        return [{"tokens": row.pop("step") * plan.batch_size * length, **row} for row in rows]

    return store.part("conversion", work)
