"""Text as one file of token numbers beside the run: made once, resumable, memory-mapped, of any size."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ka_attention.errors import UserError
from ka_attention.files import read_object, user_path, write_atomically
from ka_attention.harness.run.progress import bar
from ka_attention.harness.run.records import Json
from ka_attention.harness.text import data, documents
from ka_attention.harness.text import tokenizer as tokenizers

BATCH_CHARACTERS = 4_000_000  # tokenised at once
TOKENIZER_CHARACTERS = 32_000_000  # that a tokenizer is trained on
HASHED_AT_ONCE = 1 << 24  # bytes


@dataclass(frozen=True)
class TokenFile:
    """A stream of documents, each followed by the end-of-text token: little-endian uint16 numbers in ``path``."""

    path: Path
    tokens: int

    def array(self) -> np.ndarray:
        """The tokens, mapped from the file and not read."""
        return np.memmap(self.path, dtype="<u2", mode="r", shape=(self.tokens,))

    def sequences(self, length: int) -> int:
        """How many sequences of ``length`` tokens, each with the token after it, the stream holds side by side."""
        return max(0, (self.tokens - 1) // length)

    def rows(self, numbers: np.ndarray, length: int) -> Tensor:
        """Sequences by number, each with the token after it: int64 ``[len(numbers), length + 1]``."""
        stream = self.array()
        return torch.from_numpy(np.stack([stream[n * length : (n + 1) * length + 1] for n in numbers]).astype(np.int64))

    def fingerprint(self) -> str:
        """SHA-256 of the tokens."""
        digest, left = hashlib.sha256(), 2 * self.tokens
        with self.path.open("rb") as file:
            while chunk := file.read(min(HASHED_AT_ONCE, left)):
                digest.update(chunk)
                left -= len(chunk)
        return digest.hexdigest()


def tokenise(
    texts: Callable[[], Iterable[str]],
    tokenizer: Any,
    path: Path,
    *,
    most: int | None = None,
    label: str = "tokenising",
    characters: int = BATCH_CHARACTERS,
) -> TokenFile:
    """Write the documents' tokens to ``path``, or go on where a stopped call was; a finished file is only opened.

    texts:      gives the documents in the same order at every call. They are read one after another and never held.
    tokenizer:  of transformers, with an end-of-text token and at most 65,536 entries; else UserError.
    most:       stop after the document with which the stream holds so many tokens.
    characters: of text tokenised at once; after each such batch the file and its notes are on disk.

    Beside ``path`` stand its notes, ``path`` + ".json": documents and tokens so far, the tokenizer, whether it is done.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= 1 << 16:
        raise UserError(f"--tokenizer: expected at most 65,536 entries, got {largest + 1:,}")
    notes_path = path.with_name(f"{path.name}.json")
    made_by = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    notes: dict[str, Any] = {"documents": 0, "tokens": 0, "done": False, "tokenizer": made_by}
    if notes_path.exists():
        notes = read_object(notes_path, "--out")
        if notes.get("tokenizer") != made_by:
            raise UserError(f"--out: {path} was made with another tokenizer; delete it, and it is made again")
    if not notes["done"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file, bar(label, most or 0) as advance:
            file.truncate(2 * notes["tokens"])  # what a killed call wrote after its last notes
            advance(notes["tokens"])
            rest = islice(iter(texts()), notes["documents"], None)
            for batch in _batches(rest, characters):
                if most is not None and notes["tokens"] >= most:
                    break
                ids = tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
                lengths = np.fromiter((len(each) + 1 for each in ids), np.int64, len(ids))
                ends = notes["tokens"] + lengths.cumsum()
                kept = len(ids) if most is None else int(np.searchsorted(ends, most)) + 1
                stream = [number for each in ids[:kept] for number in (*each.ids, tokenizer.eos_token_id)]
                np.array(stream, dtype="<u2").tofile(file)
                file.flush()
                os.fsync(file.fileno())
                notes |= {
                    "documents": notes["documents"] + min(kept, len(ids)),
                    "tokens": notes["tokens"] + len(stream),
                }
                advance(len(stream))
                write_atomically(notes_path, json.dumps(notes))
        notes["done"] = True
        write_atomically(notes_path, json.dumps(notes))
    if not path.exists() or path.stat().st_size != 2 * notes["tokens"]:
        raise UserError(f"--out: {path} is damaged: delete it and {notes_path.name}, and they are made again")
    return TokenFile(path, notes["tokens"])


@dataclass(frozen=True)
class TokenText:
    """Training and validation text as files of tokens; ``description`` says what they hold."""

    train: TokenFile
    validation: TokenFile
    description: dict[str, Json]


def prepare(
    source: str, tokenizer: str, vocab_size: int, folder: Path, *, train_tokens: int, validation_tokens: int
) -> TokenText:
    """Tokenise ``source`` (``--data``) into ``folder``, or open what is there; each split up to so many tokens.

    A folder of files with a validation split is read document by document and never held; any other source as
    `data.corpus` reads it. The tokenizer "train" is trained on the first documents of the training split, and kept in
    ``folder``. UserError where a split holds fewer tokens than its sequences need, see `enough`.
    """
    splits = _streams(source)
    kept = folder / "tokenizer.json"
    if tokenizer == "train" and kept.exists():
        tokenizer = str(kept)
    sample = list(_first(splits[0](), TOKENIZER_CHARACTERS)) if tokenizer == "train" else []
    found = tokenizers.load(tokenizer, sample, vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    found.backend_tokenizer.save(str(kept), pretty=False)
    files = [
        tokenise(texts, found, folder / f"{split}.bin", most=most, label=f"tokenising ({split})")
        for split, texts, most in zip(("train", "validation"), splits, (train_tokens, validation_tokens), strict=True)
    ]
    description = {
        "source": source if source == "stdlib" or source.startswith("hf:") else Path(source).name,
        "tokenizer_size": len(found),
        "train_tokens": files[0].tokens,
        "validation_tokens": files[1].tokens,
        "fingerprint": [file.fingerprint() for file in files],
    }
    return TokenText(files[0], files[1], description)


class Order:
    """Batches of sequence numbers: a new permutation of all sequences every epoch, drawn from ``seed`` alone."""

    def __init__(self, sequences: int, batch: int, seed: int) -> None:
        self.sequences, self.batch, self.seed = sequences, batch, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, step: int) -> np.ndarray:
        """The sequences of a step; the last ones of an epoch may stand beside the first of the next."""
        numbers = range(step * self.batch, (step + 1) * self.batch)
        return np.array([self._at(*divmod(number, self.sequences)) for number in numbers])

    def _at(self, epoch: int, rank: int) -> int:
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.sequences)
        return int(self._permutation[rank])

    def epochs(self, steps: int) -> float:
        """How often ``steps`` steps read each sequence, on average."""
        return steps * self.batch / self.sequences


def _streams(source: str) -> tuple[Callable[[], Iterable[str]], Callable[[], Iterable[str]]]:
    """What gives the training documents, and what gives those for validation."""
    path = user_path(source)
    if source != "stdlib" and not source.startswith("hf:") and path.is_dir():
        found = documents.splits(path)
        if found.validation:
            validation = found.validation
            return lambda: documents.read_all(found.train), lambda: documents.read_all(validation)
    corpus = data.corpus(source)
    return lambda: corpus.train, lambda: corpus.validation


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    """The first texts, of so many characters together."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters < 0:
            return


def _batches(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def enough(file: TokenFile, split: str, length: int, sequences: int) -> None:
    """UserError where a file holds fewer than ``sequences`` sequences."""
    if file.sequences(length) < sequences:
        raise UserError(
            f"--data: the {split} split holds {file.sequences(length)} sequences of {length} tokens, expected at least "
            f"{sequences} ({sequences * length + 1:,} tokens, it has {file.tokens:,}); give more text"
        )
