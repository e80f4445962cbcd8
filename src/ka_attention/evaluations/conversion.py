"""How few tokens turn a softmax-trained model into a KA model: PPL against conversion tokens, gates and windows."""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from ka_attention.conversion.raising import Conversion, convert
from ka_attention.harness import perplexity
from ka_attention.harness.data import Sequences
from ka_attention.harness.store import Json
from ka_attention.hf import KAConfig, attention_modules, use

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
