"""A saved softmax model and the text for it: where `ka adapt` and `ka convert` start."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ka_attention.errors import UserError
from ka_attention.harness.data import Text, prepare
from ka_attention.harness.models import load_model
from ka_attention.harness.progress import quiet_libraries
from ka_attention.harness.records import Json
from ka_attention.harness.settings import TextSettings
from ka_attention.harness.store import Store
from ka_attention.harness.study import SCHEMA_VERSION
from ka_attention.hf import attention_modules, check_supported, is_attached

VALIDATION = 64  # sequences, or all that there are


def open_softmax(checkpoint: str, data: str, tokens: int, length: int) -> tuple[Any, Text]:
    """The model of a folder or Hub name, and its own tokenizer's sequences: ``tokens`` of them to train on."""
    quiet_libraries()
    if length < 2:
        raise UserError(f"--length: expected at least 2 tokens, got {length}")
    if tokens < length:
        raise UserError(f"--tokens: expected at least one sequence of {length} tokens, got {tokens}")
    model, _ = load_model(checkpoint, "CHECKPOINT")
    if is_attached(model):
        raise UserError(f"CHECKPOINT: {checkpoint} is a KA model already")
    try:
        check_supported(model)
    except ValueError as error:
        raise UserError(f"CHECKPOINT: {error}") from None
    settings = TextSettings(
        data=data,
        tokenizer=checkpoint,
        sequence_length=length,
        train_samples=math.ceil(tokens / length),
        validation_samples=VALIDATION,
    )
    vocab_size = attention_modules(model)[0].config.vocab_size
    return model, prepare(settings, vocab_size, fewest_validation=1, fewer="--tokens {tokens}")


def open_run(name: str, settings: dict[str, Json], text: Text, out: Path) -> Store:
    """The store of one run of ``ka adapt`` or ``ka convert``."""
    return Store(out, {"schema_version": SCHEMA_VERSION, "study": name, "recipe": settings, "data": text.description})
