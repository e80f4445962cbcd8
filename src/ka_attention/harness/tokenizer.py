"""The tokenizer of a run: a byte-level BPE trained on its training split, or one that the user names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ka_attention.errors import UserError
from ka_attention.harness import hub

END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>")


def load(source: str, documents: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer ``source``: "train" (on ``documents``), a ``tokenizer.json`` file, a folder or a Hub name.

    It has an end-of-text token and at most ``vocab_size`` entries; UserError otherwise.
    """
    if source == "train":
        return train(documents, vocab_size)
    path = Path(source).expanduser()
    tokenizer: Any
    if path.is_file():
        tokenizer = _from_file(path)
    else:
        hub.require("--tokenizer", source)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path) if path.exists() else source)
        except (OSError, ValueError):
            raise UserError(f"--tokenizer: {source} holds no tokenizer") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"--tokenizer: {source} has no end-of-text token")
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(
            f"--tokenizer: {source} has {largest + 1} entries, the model {vocab_size}; "
            f"give --set vocab_size={largest + 1}"
        )
    return tokenizer


def train(documents: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``vocab_size`` entries: the 256 bytes, the end-of-text token, and merges."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(
            f"--set vocab_size: expected at least {len(alphabet) + 1} (bytes and end of text), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def _from_file(path: Path) -> PreTrainedTokenizerFast:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise UserError(f"--tokenizer: {path} is not a tokenizer.json file") from error
    end = next((token for token in ENDS if tokenizer.token_to_id(token) is not None), None)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)
