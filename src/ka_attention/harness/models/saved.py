"""A saved model, the two ways in which it can decode, through a KV cache and through a KA cache, and their bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from ka_attention.errors import UserError
from ka_attention.harness.run import hub
from ka_attention.harness.text import tokenizer as tokenizers
from ka_attention.hf import KAConfig, is_attached, reconfigure, use
from ka_attention.hf.cache.caches import layer_plan
from ka_attention.hf.heads import Heads

NAMES = {"kv": "KV", "ka": "KA"}


def load_model_and_tokenizer(
    source: str,
    argument: str = "MODEL",
    *,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or Hub name, softmax or KA, in evaluation mode.

    The tokenizer is the model's own, or that of the file, folder or Hub name ``tokenizer``. Raises UserError, naming
    the command's ``argument``, if there is no model or tokenizer, or the tokenizer is larger than the model.
    """
    model = hub.load_model(argument, source, dtype=dtype, trust_remote_code=trust_remote_code)
    named = (argument, source) if tokenizer is None else ("--tokenizer", tokenizer)
    advice = "; give --tokenizer, a tokenizer.json file, a folder or a Hub name"
    found = tokenizers.find(*named, trust_remote_code=trust_remote_code, advice=advice if tokenizer is None else "")
    size = model.get_input_embeddings().weight.shape[0]
    tokenizers.require_size(found, size, *named, "--tokenizer with one of at most that size")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), found


def require_supported(model: Any, argument: str) -> None:
    """UserError where KA-attention cannot run in ``model``."""
    try:
        with nullcontext() if is_attached(model) else use(model, KAConfig(gate_init=0.0)):
            pass
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"{argument}: {error}") from None


def require_length(model: Any, length: int, argument: str, what: str) -> None:
    """UserError where ``length`` tokens are more than ``model`` has positions."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(f"{argument}: the model reads at most {limit:,} tokens, {what}")


def prompt(tokenizer: Any, text: str, argument: str) -> Any:
    """``text`` as a tokenizer gives it to a model; UserError where it cannot write it."""
    try:
        return tokenizer(text, return_tensors="pt")
    except Exception as error:  # bare Exception, for instance without an entry for the unknown
        raise UserError(f"{argument}: the tokenizer cannot read it: {hub.first_line(error)}") from None


def own_config(model: Any) -> KAConfig | None:
    """The KA configuration that ``model`` runs with; None for a stock softmax model."""
    return KAConfig.of(model.config) if model.config._attn_implementation == "ka" else None


def is_softmax(ka: KAConfig | None) -> bool:
    """Whether a model with this configuration computes softmax attention in every layer."""
    return ka is None or (ka.gate == "fixed" and ka.gate_init == 0)


def decoding(ka: KAConfig | None, kind: str) -> KAConfig:
    """The configuration with which a model trained with ``ka`` decodes through a ``kind`` cache.

    "kv" is softmax attention over cached keys and values, "ka" is KA-attention over cached keys and outputs. One of
    them is the model's own; the other keeps its layers and window and swaps the gate: 0 on a KA-trained model, 1 on a
    softmax-trained one.
    """
    own = ka or KAConfig(gate_init=0.0)
    if is_softmax(own) == (kind == "kv"):
        return own
    return replace(own, gate="fixed", gate_init=float(kind == "ka"), gate_range=(0.0, 1.0))


def own_cache(model: Any) -> str:
    """The kind of cache that belongs to the attention ``model`` runs with: "kv" or "ka"."""
    return "kv" if is_softmax(own_config(model)) else "ka"


@contextmanager
def attention(model: Any, kind: str) -> Iterator[None]:
    """Let ``model`` attend as it does through a ``kind`` cache (``decoding``), without changing its weights."""
    own = own_config(model)
    if kind == own_cache(model):
        yield
    elif own is None:
        with use(model, decoding(own, kind)):
            yield
    else:  # attached already, perhaps with learned gates, which stay in the model and are not asked
        reconfigure(model, decoding(own, kind))
        try:
            yield
        finally:
            reconfigure(model, own)


def cache_size(model_config: Any, ka: KAConfig | None, kind: str, tokens: int) -> int:
    """Bytes that the ``kind`` cache of one sequence of ``tokens`` tokens takes in all layers of a model with ``ka``.

    A layer stores, for each token it keeps, Hkv keys and Hkv values, or Hkv keys and Hq outputs where it caches
    outputs, of D elements in the model's dtype. A layer with a window w keeps the last w − 1 tokens.
    """
    config = copy.copy(model_config)
    config.ka_config = decoding(ka, kind).to_dict()
    heads, element = Heads.of(config), (config.dtype or torch.float32).itemsize
    return sum(
        (tokens if window is None else min(tokens, window - 1)) * heads.key * (1 + groups) * heads.dim * element
        for groups, window in layer_plan(config)
    )
