"""Text from a model, through its KV cache, its KA cache, or both side by side."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from ka_attention.errors import UserError
from ka_attention.harness.models import saved
from ka_attention.harness.models.saved import NAMES, attention, load_model_and_tokenizer, own_cache, require_length
from ka_attention.harness.run.progress import quiet_libraries


def command(
    source: str,
    prompt: str,
    *,
    cache: str | None,
    max_new_tokens: int,
    compare: bool,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> None:
    """Continue ``prompt`` greedily with the model of a folder or Hub name, and print the text as it comes.

    cache:   "kv" reads values, "ka" outputs; the one that is not the model's own is a swap without training.
    compare: both caches, in two columns, the first token that differs marked.
    """
    quiet_libraries()
    if cache is not None and cache not in NAMES:
        raise UserError(f"--cache: expected kv or ka, got {cache!r}")
    if compare and cache is not None:
        raise UserError("--compare shows both caches; leave --cache out")
    model, words = load_model_and_tokenizer(source, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    inputs = saved.prompt(words, prompt, "PROMPT").to(model.device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise UserError("PROMPT: expected at least one token, got none")
    got = f"PROMPT has {length:,}, got {max_new_tokens:,}"
    require_length(model, length + max_new_tokens, "--max-new-tokens", got)
    if compare or cache not in (None, own_cache(model)):
        saved.require_supported(model, "MODEL")
    if compare:
        both = {kind: continuation(model, inputs, kind, max_new_tokens) for kind in NAMES}
        (console or Console()).print(side_by_side(words, both, own_cache(model)))
        return
    continuation(model, inputs, cache or own_cache(model), max_new_tokens, TextStreamer(words))


@torch.inference_mode()
def continuation(model: Any, inputs: Any, kind: str, max_new_tokens: int, streamer: Any = None) -> list[int]:
    """Token ids that ``model`` adds to the prompt greedily through a ``kind`` cache, from the first token on."""
    with attention(model, kind):
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            streamer=streamer,
        )
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def first_difference(one: list[int], other: list[int]) -> int | None:
    """The first index at which two continuations differ; None where they are equal."""
    if one == other:
        return None
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def side_by_side(tokenizer: Any, both: dict[str, list[int]], own: str) -> Table:
    """Two columns of text; the first differing token is set apart as ⟦token⟧, so that it shows without colours too."""
    at = first_difference(*both.values())
    caption = "the same tokens with both caches" if at is None else f"first difference: token {at + 1}"
    table = Table(caption=caption, expand=True)
    cells = []
    for kind, ids in both.items():
        table.add_column(f"{NAMES[kind]} cache ({'own' if kind == own else 'swap'})", ratio=1)
        cut = len(ids) if at is None else at
        text = Text(tokenizer.decode(ids[:cut]))
        if ids[cut:]:
            text.append(f"⟦{tokenizer.decode(ids[cut : cut + 1])}⟧", style="bold red")
        cells.append(text.append(tokenizer.decode(ids[cut + 1 :])))
    table.add_row(*cells)
    return table
