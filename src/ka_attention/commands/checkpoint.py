"""A saved softmax model and the text for it: where `ka adapt` and `ka convert` start."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ka_attention.errors import UserError
from ka_attention.harness.models.saved import load_model_and_tokenizer, require_length, require_supported
from ka_attention.harness.run.progress import quiet_libraries
from ka_attention.harness.run.records import Json
from ka_attention.harness.run.settings import TextSettings
from ka_attention.harness.run.store import Store
from ka_attention.harness.run.study import SCHEMA_VERSION
from ka_attention.harness.text.data import Text, prepare
from ka_attention.hf import is_attached

VALIDATION = 64  # sequences, or all that there are


def open_softmax(
    checkpoint: str,
    data: str,
    tokens: int,
    length: int,
    *,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Text]:
    """The model of a folder or Hub name in float32, and its tokenizer's sequences: ``tokens`` of them to train on.

    In float32 whatever the checkpoint's precision: in bfloat16 most steps are too small to change a weight, and in
    float16 losses overflow.
    """
    quiet_libraries()
    if length < 2:
        raise UserError(f"--length: expected at least 2 tokens, got {length}")
    if tokens < length:
        raise UserError(f"--tokens: expected at least one sequence of {length} tokens, got {tokens}")
    model, found = load_model_and_tokenizer(
        checkpoint, "CHECKPOINT", tokenizer=tokenizer, dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    if is_attached(model):
        raise UserError(f"CHECKPOINT: {checkpoint} is a KA model already")
    require_supported(model, "CHECKPOINT")
    require_length(model, length, "--length", f"got {length:,}")
    settings = TextSettings(
        data=data,
        tokenizer=tokenizer or checkpoint,
        sequence_length=length,
        train_samples=math.ceil(tokens / length),
        validation_samples=VALIDATION,
    )
    text = prepare(settings, len(found), tokenizer=found, fewest_validation=1, fewer="--tokens {tokens}")
    return model, text


def open_run(name: str, settings: dict[str, Json], text: Text, out: Path) -> Store:
    """The store of one run of ``ka adapt`` or ``ka convert``."""
    return Store(out, {"schema_version": SCHEMA_VERSION, "study": name, "recipe": settings, "data": text.description})
