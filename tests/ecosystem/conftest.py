"""A KA model as a user has it in a folder, for the libraries around transformers."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ka_attention.hf import KAConfig, attach, attention_modules

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]


def softmax_model():
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(**settings, num_key_value_heads=2, vocab_size=len(WORDS), initializer_range=0.3, pad_token_id=0)
    ).eval()


def ka_model(gate="head"):
    model = attach(softmax_model(), KAConfig(gate=gate, gate_init=0.5))
    for module in attention_modules(model) if gate == "head" else []:
        nn.init.uniform_(module.ka_gate.bias)
    return model


def logits(model):
    ids = torch.arange(4, 16)[None]
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def save_words(folder, **settings):
    """Write a tokenizer of single letters."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names, **settings).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    """A saved KA model with a tokenizer."""
    save_words(tmp_path / "ka")
    ka_model().save_pretrained(tmp_path / "ka")
    return str(tmp_path / "ka")
