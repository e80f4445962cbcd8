"""Tiny random models of the supported families, built from configurations."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from ka_attention.hf import register

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GQA = {"num_key_value_heads": 2}

FAMILIES: dict[str, dict] = {
    "gpt_neox": {},
    "llama": GQA,
    "qwen3": {**GQA, "head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gemma": {**GQA, "head_dim": 8},
    "gemma2": {**GQA, "head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**GQA, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8, "sliding_window_pattern": 3},
    "mistral": {**GQA, "sliding_window": 5},
    "phi3": {**GQA, "sliding_window": 5},
    "olmo2": GQA,
    "gpt2": {},
}


def make(family: str, seed: int = 0, attention: str | None = None, **settings) -> PreTrainedModel:
    """A tiny model in float64, where caches and parallel forms agree to rounding, with weights that are not tiny."""
    register()
    size = dict(SMALL, **FAMILIES[family])
    if family == "gpt2":
        size = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 97, "n_positions": 128, "pad_token_id": 0}
        size |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": None}
    config = AutoConfig.for_model(family, **{**size, "initializer_range": 0.3, **settings})
    torch.manual_seed(seed)
    options = {} if attention is None else {"attn_implementation": attention}
    return AutoModelForCausalLM.from_config(config, **options).double().eval()


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
