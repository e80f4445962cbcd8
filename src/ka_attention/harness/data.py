"""From text to sequences of tokens: corpora, their split by document, and the tensors that a study reads."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ka_attention.errors import UserError
from ka_attention.harness import hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ka_attention.harness.settings import TextSettings

VALIDATION_SHARE = 0.1
FEW_DOCUMENTS = 20
SPREAD = 8
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
WIKITEXT_TITLE = re.compile(r"^ = [^=].*[^=] = $(?=\n \n)", re.MULTILINE)
TRAIN_NAME = re.compile(r"^train", re.IGNORECASE)
VALIDATION_NAME = re.compile(r"^(valid|val|dev)", re.IGNORECASE)


@dataclass(frozen=True)
class Corpus:
    """Documents of text in a fixed order, training and validation apart; no document is in both."""

    source: str
    train: list[str]
    validation: list[str]


@dataclass(frozen=True)
class Text:
    """What a study reads: ``train`` and ``validation`` are int64 ``[N, sequence_length]``."""

    tokenizer: PreTrainedTokenizerFast
    train: Tensor
    validation: Tensor
    description: dict[str, Any]


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
    fewest_validation: int | None = None,
    fewer: str = "--set {split}_samples={held}",
) -> Text:
    """Corpus, tokenizer and sequences of ``settings`` for a model with ``vocab_size`` embeddings; writes nothing.

    Validation takes fewer sequences than ``validation_samples`` where there are not so many, but ``fewest_validation``
    at least (None: all of them). ``fewer`` is the option with which a user takes fewer, for the error.

    Raises UserError for missing, empty, binary or too short data and for a tokenizer larger than the model.
    """
    from ka_attention.harness import tokenizer as tokenizers

    text = corpus(settings.data)
    tokenizer = tokenizers.load(settings.tokenizer, text.train, vocab_size)
    length = settings.sequence_length
    train = sequences("train", text.train, tokenizer, length, settings.train_samples, fewer=fewer)
    count = settings.validation_samples
    validation = sequences("validation", text.validation, tokenizer, length, count, fewest_validation, fewer)
    description = {
        "source": text.source,
        "train_documents": len(text.train),
        "validation_documents": len(text.validation),
        "train_tokens": train.numel(),
        "validation_tokens": validation.numel(),
        "tokenizer_size": len(tokenizer),
        "fingerprint": hashlib.sha256(train.numpy().tobytes() + validation.numpy().tobytes()).hexdigest(),
    }
    return Text(tokenizer, train, validation, description)


def sequences(
    split: str,
    documents: Sequence[str],
    tokenizer: Any,
    length: int,
    count: int,
    fewest: int | None = None,
    fewer: str = "",
) -> Tensor:
    """``count`` sequences ``[count, length]``, evenly spread over the documents' token stream.

    Where they hold less, all that they hold; UserError below ``fewest`` (None: ``count``), advising ``fewer``.

    Each document is followed by the end-of-text token; the stream is cut every ``length`` tokens, so that a sequence
    may begin within a document and reach into the next. Documents are read until they hold ``SPREAD`` times what is
    asked for: a few long ones would be a poor sample, and all of a large corpus takes long to tokenise.
    """
    stream: list[int] = []
    for start in range(0, len(documents), 64):
        for ids in tokenizer(list(documents[start : start + 64]), add_special_tokens=False)["input_ids"]:
            stream += [*ids, tokenizer.eos_token_id]
        if len(stream) >= SPREAD * count * length:
            break
    held = len(stream) // length
    fewest = count if fewest is None else fewest
    if held < fewest:
        advice = f" or {fewer.format(split=split, held=held, tokens=held * length)}" if held and fewer else ""
        raise UserError(
            f"--data: the {split} split holds {held} sequences of {length} tokens, expected at least {fewest} "
            f"({fewest * length:,} tokens, it has {len(stream):,}); give more text{advice}"
        )
    count = min(count, held)
    return torch.tensor(stream[: held * length]).view(held, length)[torch.arange(count) * held // count]


def corpus(source: str) -> Corpus:
    """The documents of ``source``: "stdlib", "hf:NAME[/CONFIG]", or the path of a file or folder.

    Documents are ordered by the SHA-256 of their text, a shuffle that needs no seed; repeated ones are dropped. Where
    the source has no validation split, a tenth of the text, in whole documents, is it; of fewer than 20 documents the
    last tenth of each.
    """
    if source == "stdlib":
        return _split(source, _standard_library())
    if source.startswith("hf:"):
        return _hub(source)
    path = Path(source).expanduser()
    if not source or not path.exists():
        raise UserError(f"--data: no file or folder {source!r}; allowed are stdlib, a path, or hf:NAME[/CONFIG]")
    if path.is_dir():
        return _folder(path)
    return _split(path.name, _read(path))


def _split(source: str, train: Iterable[str], validation: Iterable[str] | None = None) -> Corpus:
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
    return Corpus(source, train, validation)


def _shuffled(documents: Iterable[str]) -> list[str]:
    unique = {hashlib.sha256(text.encode()).digest(): text for text in documents if text.strip()}
    return [unique[digest] for digest in sorted(unique)]


def _standard_library() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in root.rglob("*.py") if NOT_LIBRARY.isdisjoint(path.relative_to(root).parts))
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def _folder(folder: Path) -> Corpus:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and _reader(path))
    if not paths:
        raise UserError(f"--data: {folder} holds no {', '.join(READERS)} file")
    train = [path for path in paths if TRAIN_NAME.match(path.name)]
    validation = [path for path in paths if VALIDATION_NAME.match(path.name)]
    if train and validation:
        return _split(folder.name, _read_all(train), _read_all(validation))
    return _split(folder.name, _read_all(train or paths))


def _read_all(paths: Iterable[Path]) -> list[str]:
    return [text for path in paths for text in _read(path)]


def _reader(path: Path) -> Callable[[Path], list[str]] | None:
    return next((read for suffix, read in READERS.items() if path.name.lower().endswith(suffix)), None)


def _read(path: Path) -> list[str]:
    read = _reader(path)
    if read is None:
        raise UserError(f"--data: {path.name} is none of {', '.join(READERS)}")
    try:
        return read(path)
    except UnicodeDecodeError:
        raise UserError(f"--data: {path} is not UTF-8 text") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"--data: cannot read {path}: {error}") from None


def _text(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        text = file.read()
    if "\0" in text:
        raise UserError(f"--data: {path} is binary, expected UTF-8 text")
    starts = [title.start() for title in WIKITEXT_TITLE.finditer(text)]
    # One article a document in WikiText's layout; any other text file is one document.
    bounds = [0, *starts, len(text)]
    return [text[begin:end] for begin, end in pairwise(bounds)]


def _jsonl(path: Path) -> list[str]:
    documents = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                raise UserError(f"--data: {path} line {number} is not JSON") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise UserError(f'--data: {path} line {number}: expected an object with a string "text"')
            documents.append(record["text"])
    return documents


def _parquet(path: Path) -> list[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid:
        raise UserError(f"--data: {path} is not a parquet file") from None
    return _column(str(path), table.column_names, lambda name: table[name].to_pylist())


def _column(source: str, names: Sequence[str], values: Callable[[str], list[Any]]) -> list[str]:
    if "text" not in names:
        raise UserError(f'--data: {source} has no column "text", only {", ".join(names)}')
    return [text for text in values("text") if isinstance(text, str)]


def _hub(source: str) -> Corpus:
    import datasets

    name, config = _hub_name(source.removeprefix("hf:"))
    hub.require("--data", name, "dataset")
    try:
        splits = datasets.load_dataset(name, config)
    except Exception as error:  # the library's own errors have no common type: any of them means that it cannot be read
        raise UserError(f"--data: cannot load {source}: {str(error).splitlines()[0]}") from error
    if "train" not in splits:
        raise UserError(f"--data: {source} has no train split, only {', '.join(splits)}")

    def documents(split: str) -> list[str]:
        return _column(source, splits[split].column_names, lambda column: list(splits[split][column]))

    return _split(source, documents("train"), documents("validation") if "validation" in splits else None)


def _hub_name(text: str) -> tuple[str, str | None]:
    """NAME and CONFIG of NAME[/CONFIG], where NAME is an existing folder, ``user/name`` or a bare name."""
    if Path(text).is_dir() or text.count("/") < 1:
        return text, None
    name, config = text.rsplit("/", 1)
    return (name, config) if Path(name).is_dir() or text.count("/") == 2 else (text, None)


READERS: dict[str, Callable[[Path], list[str]]] = {
    ".txt": _text,
    ".txt.gz": _text,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
