"""`ka adapt`: an adapter, with which a saved softmax model decodes with a KA cache."""

from __future__ import annotations

from pathlib import Path

from ka_attention.commands.checkpoint import open_run, open_softmax
from ka_attention.errors import UserError
from ka_attention.evaluations.adapters import BATCH, METHODS, fit
from ka_attention.harness.run.records import Json
from ka_attention.harness.training import perplexity
from ka_attention.hf import save_adapter, use


def command(
    checkpoint: str,
    *,
    data: str,
    tokens: int,
    length: int,
    method: str,
    out: Path,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Json]:
    """Fit one adapter to a saved softmax model and save it in ``out``; PPL of the model, the swap and the adapter."""
    if method not in METHODS:
        raise UserError(f"--method: expected one of {', '.join(METHODS)}, got {method!r}")
    model, text = open_softmax(
        checkpoint, data, tokens, length, tokenizer=tokenizer, trust_remote_code=trust_remote_code
    )
    settings = {"checkpoint": checkpoint, "tokens": tokens, "length": length, "method": method}

    def ppl() -> float:
        return perplexity.evaluate(model, text.validation, batch_size=16).ppl

    def work() -> dict[str, Json]:
        found = {"base": ppl()}
        with use(model):
            found["swap"] = ppl()
        adapters, used = fit(model, text.train, method, max(1, len(text.train) // BATCH))
        with use(model, adapter=adapters):
            save_adapter(model, out)
            return {**found, "adapted": ppl(), "tokens": used}

    return open_run("adapt", settings, text, out).part("adapter", work)
