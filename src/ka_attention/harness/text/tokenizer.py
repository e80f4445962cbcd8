"""The tokenizer of a run: a byte-level BPE trained on its training split, or one that the user names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ka_attention.errors import UserError
from ka_attention.files import user_path
from ka_attention.harness.run import hub
from ka_attention.harness.text.documents import pieces

END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>")


def load(
    source: str, documents: Sequence[str], vocab_size: int, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerFast:
    """The tokenizer ``source``: "train" (on ``documents``), a ``tokenizer.json`` file, a folder or a Hub name.

    It has an end-of-text token and at most ``vocab_size`` entries; UserError otherwise.
    """
    if source == "train":
        return train(documents, vocab_size)
    tokenizer = find("--tokenizer", source, trust_remote_code=trust_remote_code)
    require_end(tokenizer, "--tokenizer", source)
    require_size(tokenizer, vocab_size, "--tokenizer", source, "--set vocab_size={size}")
    return tokenizer


def find(argument: str, source: str, *, trust_remote_code: bool = False, advice: str = "") -> Any:
    """The tokenizer of a ``tokenizer.json`` file, a folder or a Hub name; UserError that names ``argument``."""
    hub.require(argument, source)
    path = user_path(source)
    if path.is_file():
        return _from_file(path, argument)
    name = str(path) if path.exists() else source
    try:
        found = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # of a damaged file: the libraries' errors have no common type
        hub.refuse_remote_code(argument, source, error)
        raise UserError(f"{argument}: {source} holds no tokenizer{advice} ({hub.first_line(error)})") from None
    if not set(found.get_vocab()) - set(found.all_special_tokens):  # made of the model's type, without any file
        raise UserError(f"{argument}: {source} holds no tokenizer{advice}")
    return found


def require_end(tokenizer: Any, argument: str, source: str, advice: str = "") -> None:
    """UserError unless there is an end-of-text token, which stands between documents."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"{argument}: the tokenizer of {source} has no end-of-text token{advice}")


def require_size(tokenizer: Any, vocab_size: int, argument: str, source: str, advice: str) -> None:
    """UserError where a token of ``tokenizer`` is beyond the ``vocab_size`` embeddings of the model."""
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > vocab_size:
        raise UserError(
            f"{argument}: the tokenizer of {source} has {size} entries, the model {vocab_size}; "
            f"give {advice.format(size=size)}"
        )


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text without special ones; UserError for a text that the tokenizer cannot write."""
    if not texts:
        return []
    try:
        found = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    except Exception as error:  # the library raises bare Exception, for instance without an entry for the unknown
        raise UserError(f"--tokenizer: it cannot read the text: {hub.first_line(error)}") from None
    if any(None in ids for ids in found):
        raise UserError("--tokenizer: it cannot read the text: it has no entry for what it does not know")
    return found


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
    tokenizer.train_from_iterator((piece for text in documents for piece in pieces(text)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def _from_file(path: Path, argument: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise UserError(f"{argument}: {path} is not a tokenizer.json file") from error
    end = next((token for token in ENDS if tokenizer.token_to_id(token) is not None), None)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)
