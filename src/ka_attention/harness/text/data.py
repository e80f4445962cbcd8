"""From text to sequences of tokens: corpora, their split by document, and the tensors that a study reads."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ka_attention.errors import UserError
from ka_attention.files import shown, user_path
from ka_attention.harness.run import hub
from ka_attention.harness.run.progress import console
from ka_attention.harness.text import documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ka_attention.harness.run.settings import TextSettings

VALIDATION_SHARE = 0.1
FEW_DOCUMENTS = 20
SPREAD = 8
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Documents of text in a fixed order, training and validation apart; no document is in both.

    left_out: in words, what ``source`` holds and neither has.
    """

    source: str
    train: list[str]
    validation: list[str]
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Description:
    """Which text was read, and how much of it; ``fingerprint`` is the SHA-256 of all its tokens."""

    source: str
    train_documents: int
    validation_documents: int
    train_tokens: int
    validation_tokens: int
    tokenizer_size: int
    fingerprint: str


@dataclass(frozen=True)
class Text:
    """What a study reads: ``train`` and ``validation`` are int64 ``[N, sequence_length]``."""

    tokenizer: PreTrainedTokenizerFast
    train: Tensor
    validation: Tensor
    description: Description


class Sequences(Dataset):
    """A torch dataset of ``{"input_ids", "labels"}``; labels are the tokens unless given (−100: no loss)."""

    def __init__(self, input_ids: Tensor, labels: Tensor | None = None) -> None:
        self.input_ids, self.labels = input_ids, input_ids if labels is None else labels

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


def prepare(
    settings: TextSettings,
    vocab_size: int,
    *,
    tokenizer: Any = None,
    fewest_validation: int | None = None,
    fewer: str = "--set {split}_samples={held}",
) -> Text:
    """Corpus, tokenizer and sequences of ``settings`` for a model with ``vocab_size`` embeddings.

    Writes nothing; prints what of the source is left out. ``tokenizer`` is one that is loaded already.

    Validation takes fewer sequences than ``validation_samples`` where there are not so many, but ``fewest_validation``
    at least (None: all of them). ``fewer`` is the option with which a user takes fewer, for the error.

    Raises UserError for missing, empty, binary or too short data and for a tokenizer larger than the model.
    """
    from ka_attention.harness.text import tokenizer as tokenizers

    if tokenizer is not None:
        tokenizers.require_end(tokenizer, "--tokenizer", settings.tokenizer)
    text = corpus(settings.data)
    if text.left_out:
        console.print(f"--data: left out {'; '.join(text.left_out)}", markup=False, soft_wrap=True)
    if tokenizer is None:
        tokenizer = tokenizers.load(settings.tokenizer, text.train, vocab_size)
    length = settings.sequence_length
    train = sequences("train", text.train, tokenizer, length, settings.train_samples, fewer=fewer)
    count = settings.validation_samples
    validation = sequences("validation", text.validation, tokenizer, length, count, fewest_validation, fewer)
    description = Description(
        source=text.source,
        train_documents=len(text.train),
        validation_documents=len(text.validation),
        train_tokens=train.numel(),
        validation_tokens=validation.numel(),
        tokenizer_size=len(tokenizer),
        fingerprint=hashlib.sha256(train.numpy().tobytes() + validation.numpy().tobytes()).hexdigest(),
    )
    return Text(tokenizer, train, validation, description)


def sequences(
    split: str,
    texts: Sequence[str],
    tokenizer: Any,
    length: int,
    count: int,
    fewest: int | None = None,
    fewer: str = "",
) -> Tensor:
    """``count`` sequences ``[count, length]``, evenly spread over the token stream of the documents ``texts``.

    Where they hold less, all that they hold; UserError below ``fewest`` (None: ``count``), advising ``fewer``.

    Each document is followed by the end-of-text token; the stream is cut every ``length`` tokens, so that a sequence
    may begin within a document and reach into the next. Documents are read until they hold ``SPREAD`` times what is
    asked for: a few long ones would be a poor sample, and all of a large corpus takes long to tokenise.
    """
    parts: list[Tensor] = []
    total = 0
    for start in range(0, len(texts), 64):
        found = list(token_ids(texts[start : start + 64], tokenizer))
        parts += found
        total += sum(map(len, found))
        if total >= SPREAD * count * length:
            break
    held = total // length
    fewest = count if fewest is None else fewest
    if held < fewest:
        advice = f" or {fewer.format(split=split, held=held, tokens=held * length)}" if held and fewer else ""
        raise UserError(
            f"--data: the {split} split holds {held} sequences of {length} tokens, expected at least {fewest} "
            f"({fewest * length:,} tokens, it has {total:,}); give more text{advice}"
        )
    count = min(count, held)
    return torch.cat(parts)[: held * length].view(held, length)[torch.arange(count) * held // count].long()


def token_ids(texts: Iterable[str], tokenizer: Any) -> Iterator[Tensor]:
    """The stream of tokens of ``texts``, each followed by the end-of-text token, in parts (int32, one dimension)."""
    from ka_attention.harness.text.tokenizer import encode

    end = torch.tensor([tokenizer.eos_token_id], dtype=torch.int32)
    batch: list[str] = []
    ends: list[bool] = []

    def encoded() -> Iterator[Tensor]:
        for ids, last in zip(encode(tokenizer, batch), ends, strict=True):
            yield torch.tensor(ids, dtype=torch.int32)
            if last:
                yield end
        batch.clear()
        ends.clear()

    waiting = 0
    for text in texts:
        parts = list(documents.pieces(text))
        for number, piece in enumerate(parts, start=1):
            batch.append(piece)
            ends.append(number == len(parts))
            waiting += len(piece)
            if waiting >= documents.PIECE:
                yield from encoded()
                waiting = 0
    yield from encoded()


def corpus(source: str) -> Corpus:
    """The documents of ``source``: "stdlib", "hf:NAME[/CONFIG]", or the path of a file or folder.

    Documents are ordered by the SHA-256 of their text, a shuffle that needs no seed; repeated ones are dropped. Where
    the source has no validation split, a tenth of the text, in whole documents, is it; of fewer than 20 documents the
    last tenth of each.
    """
    if source == "stdlib":
        return _divided(source, _standard_library())
    if source.startswith("hf:"):
        return _hub(source)
    path = user_path(source)
    if not source or not path.exists():
        raise UserError(f"--data: no file or folder {source!r}; allowed are stdlib, a path, or hf:NAME[/CONFIG]")
    if path.is_dir():
        train, validation, left_out = documents.splits(path)
        held_out = None if validation is None else documents.read_all(validation)
        return _divided(shown(path.name), documents.read_all(train), held_out, left_out)
    if not path.is_file():
        raise UserError(f"--data: {shown(path)} is no regular file; save the text in one, or name a folder")
    return _divided(shown(path.name), documents.read(path))


def _divided(
    source: str, train: Iterable[str], validation: Iterable[str] | None = None, left_out: Sequence[str] = ()
) -> Corpus:
    train = _shuffled(train)
    if validation is None and len(train) < FEW_DOCUMENTS:
        cuts = [(text, len(text) - int(len(text) * VALIDATION_SHARE)) for text in train]
        train, validation = [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts]
    elif validation is None:
        wanted, taken = VALIDATION_SHARE * sum(map(len, train)), 0
        for count, text in enumerate(train, start=1):  # noqa: B007 (count is read after the loop)
            taken += len(text)
            if taken >= wanted:
                break
        train, validation = train[count:], train[:count]
    else:
        validation = _shuffled(validation)
        known = set(validation)
        train = [text for text in train if text not in known]
    if not train or not validation:
        raise UserError(f"--data: {source} holds no text" + (" in one of its splits" if train or validation else ""))
    return Corpus(source, train, validation, list(left_out))


def _shuffled(texts: Iterable[str]) -> list[str]:
    unique = {hashlib.sha256(text.encode()).digest(): text for text in texts if text.strip()}
    return [unique[digest] for digest in sorted(unique)]


def _standard_library() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in root.rglob("*.py") if NOT_LIBRARY.isdisjoint(path.relative_to(root).parts))
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def _hub(source: str) -> Corpus:
    import datasets

    name, config = _hub_name(source.removeprefix("hf:"))
    hub.require("--data", name, "dataset")
    try:
        found = datasets.load_dataset(name, config)
    except Exception as error:  # the library's own errors have no common type: any of them means that it cannot be read
        raise UserError(f"--data: cannot load {source}: {hub.first_line(error)}") from error
    if "train" not in found:
        raise UserError(f"--data: {source} has no train split, only {', '.join(found)}")
    left_out = [f"split {split}" for split in found if split not in ("train", "validation")]

    def read(split: str) -> Iterator[str]:
        documents.require_text(found[split].column_names, source)
        for batch in found[split].select_columns(["text"]).iter(1000):
            for text in documents.strings(batch["text"], source):
                yield documents.checked(text, source)

    return _divided(source, read("train"), read("validation") if "validation" in found else None, left_out)


def _hub_name(text: str) -> tuple[str, str | None]:
    """NAME and CONFIG of NAME[/CONFIG], where NAME is an existing folder, ``user/name`` or a bare name."""
    if Path(text).is_dir() or text.count("/") < 1:
        return text, None
    name, config = text.rsplit("/", 1)
    return (name, config) if Path(name).is_dir() or text.count("/") == 2 else (text, None)
