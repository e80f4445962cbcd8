"""`ka inspect`: what each head of a model attends to in a text, and where its output really comes from."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ka_attention.errors import UserError
from ka_attention.harness.models.attending import Call, attending, exact
from ka_attention.harness.models.saved import (
    is_softmax,
    load_model_and_tokenizer,
    own_config,
    prompt,
    require_length,
    require_supported,
)
from ka_attention.harness.run.progress import quiet_libraries
from ka_attention.hf import KAConfig, use
from ka_attention.ops import walk
from ka_attention.report.inspect import Inspection, write

LONGEST = 128  # tokens of an inspected text: the page holds two matrices a head


def command(
    source: str, text: str, out: Path, *, tokenizer: str | None = None, trust_remote_code: bool = False
) -> None:
    """Write the page about the model of a folder or Hub name on ``text``; it replaces ``out``."""
    quiet_libraries()
    model = load_model_and_tokenizer(source, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    require_supported(model[0], "MODEL")
    page = inspect(*model, text, Path(source).name)
    try:
        write(page, out)
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror}") from None


@torch.inference_mode()
def inspect(model: Any, tokenizer: Any, text: str, name: str) -> Inspection:
    """W, R and hops of every layer and head of ``model``, called ``name``, on ``text`` of 2 to 128 tokens.

    Of a softmax model R and hops are those of its weights read as KA-attention: what a KA cache would make of a layer.
    """
    ids = prompt(tokenizer, text, "TEXT")["input_ids"]
    count = ids.shape[1]
    if not 2 <= count <= LONGEST:
        raise UserError(f"TEXT: expected 2 to {LONGEST} tokens, got {count}")
    require_length(model, count, "TEXT", f"it has {count}")
    ka = own_config(model)
    softmax = is_softmax(ka)
    weights: list[np.ndarray] = []
    walks: list[Any] = []

    def record(call: Call) -> Tensor:
        options = call.options if not softmax else call.options | {"gate": 1.0}
        weights.append(walk(call.q, call.k, **call.options | {"gate": 0.0}).matrix[0].float().cpu().numpy())
        walks.append(walk(call.q, call.k, **options))
        return exact(call)

    with nullcontext() if ka else use(model, KAConfig(gate_init=0.0)), attending(record):
        model(input_ids=ids.to(model.device), use_cache=False)
    return Inspection(
        title=f"Where the output of {name} comes from",
        note="It is a softmax model: R and hops show what a KA cache would make of each layer." if softmax else "",
        tokens=[_shown(tokenizer, i) for i in ids[0].tolist()],
        layers=[_described(ka, layer) for layer in range(len(weights))],
        weights=np.stack(weights),
        sources=np.stack([w.matrix[0].float().cpu().numpy() for w in walks]),
        hops=np.stack([w.hops[0].float().cpu().numpy() for w in walks]),
    )


def _shown(tokenizer: Any, token: int) -> str:
    text = tokenizer.decode([token])
    return tokenizer.convert_ids_to_tokens(token) if "�" in text else text  # a part of a character


def _described(ka: KAConfig | None, layer: int) -> str:
    if ka is None or not ka.enabled(layer):
        return "softmax"
    words = "KA" if ka.caches_outputs(layer) else "softmax"
    if words == "KA" and ka.gate != "fixed":
        words += f", gate per {ka.gate}"
    window = ka.window_of(layer)
    return words + (f", window {window}" if window else "")
