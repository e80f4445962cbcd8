"""Files of text and their documents, one after another: formats, compression, and which file is which split.

A document is a str without lone surrogates. What cannot be read is a UserError that names ``--data``, the file and the
place.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from ka_attention.errors import UserError
from ka_attention.files import shown

PIECE = 2**18  # characters that are tokenised at once: a token takes some hundred bytes on the way
# Where a text can be cut without a change of its tokens: before a single space, or else after a single end of a line.
CUTS = (re.compile(r"(?<=\S)(?= \S)"), re.compile(r"(?<=\S\n)(?=\S)"))

WIKITEXT_TITLE = re.compile(r"^ = [^=].*[^=] = $(?=\n \n)", re.MULTILINE)
# A whole word, as a folder or as a file's name; a file may add the number of its shard: train-00000-of-00008.
SPLIT_NAMES = {
    "train": re.compile(r"(train|training)([-_.]?\d+([-_.]of[-_.]\d+)?)?", re.IGNORECASE),
    "validation": re.compile(r"(validation|valid|val|dev)([-_.]?\d+([-_.]of[-_.]\d+)?)?", re.IGNORECASE),
    "test": re.compile(r"(test|testing)([-_.]?\d+([-_.]of[-_.]\d+)?)?", re.IGNORECASE),
}
BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's, so it is looked for first
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Splits(NamedTuple):
    """Files of a folder: those to train on, those to validate on (None: no such split), and in words what is left."""

    train: list[Path]
    validation: list[Path] | None
    left_out: list[str]


def read(path: Path) -> Iterator[str]:
    """The documents of a file, one at a time."""
    reader = _reader(path)
    if reader is None:
        raise UserError(f"--data: {shown(path.name)} is none of {FORMATS}")
    try:
        for document in reader(path):
            yield checked(document, path)
    except UnicodeDecodeError as error:
        raise UserError(f"--data: {shown(path)} is not {error.encoding.upper()} text") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"--data: cannot read {shown(path)}: {' '.join(str(error).split())}") from None


def read_all(paths: Iterable[Path]) -> Iterator[str]:
    """The documents of all ``paths``, one at a time."""
    for path in paths:
        yield from read(path)


def checked(document: str, source: Path | str) -> str:
    """``document``; UserError where half a surrogate pair, which JSON can hold, makes it no text."""
    try:
        document.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(document[error.start]):04X}"
        raise UserError(f"--data: {shown(source)} holds half a surrogate pair ({half}), which is no text") from None
    return document


def strings(values: Iterable[Any], source: str) -> Iterator[str]:
    """The strings of a column, rows without a value left aside; UserError for a column of anything else."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif value is not None:
            raise UserError(f'--data: {source}: column "text" holds {type(value).__name__}, expected strings')


def splits(folder: Path) -> Splits:
    """Which files in ``folder`` and below are which split; hidden ones and links to folders are no part of it.

    The first name on the way from ``folder`` to a file that is a split's counts. Without files named ``train`` all
    that have no split's name are trained on. Where names leave no text to train on, they mean nothing.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
    texts = [path for path in files if _reader(path)]
    if not texts:
        raise UserError(f"--data: {shown(folder)} holds no file of {FORMATS}")
    others = [path for path in files if not _reader(path)]
    named: dict[str | None, list[Path]] = {"train": [], "validation": [], "test": [], None: []}
    for path in texts:
        named[_split(path, folder)].append(path)
    train, rest = named["train"] or named[None], named[None] if named["train"] else []
    if not train:  # a folder whose only file is called test.txt, say
        return Splits(texts, None, _listed(folder, "of other types", others))
    left = [
        *_listed(folder, "of the test split", named["test"]),
        *_listed(folder, "of no split", rest),
        *_listed(folder, "of other types", others),
    ]
    return Splits(train, named["validation"] or None, left)


def _split(path: Path, folder: Path) -> str | None:
    *folders, name = path.relative_to(folder).parts
    suffix = next(suffix for suffix in READERS if name.lower().endswith(suffix))
    for part in (*folders, name[: -len(suffix)]):
        for split, pattern in SPLIT_NAMES.items():
            if pattern.fullmatch(part):
                return split
    return None


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _listed(folder: Path, what: str, paths: list[Path]) -> list[str]:
    if not paths:
        return []
    names = ", ".join(shown(path.relative_to(folder)) for path in paths[:3])
    more = ", …" if len(paths) > 3 else ""
    return [f"{len(paths)} file{'s' if len(paths) > 1 else ''} {what} ({names}{more})"]


def _reader(path: Path) -> Callable[[Path], Iterator[str]] | None:
    return next((read for suffix, read in READERS.items() if path.name.lower().endswith(suffix)), None)


def _open(path: Path) -> IO[str]:
    """The text of a file: decompressed, and decoded as its byte order mark says, else as UTF-8."""
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".zst": _open_zstd}
    buffered = io.BufferedReader(openers.get(path.suffix.lower(), open)(path, "rb"))
    begin = buffered.peek(4)
    encoding = next((name for mark, name in BOMS if begin.startswith(mark)), "utf-8")
    return io.TextIOWrapper(buffered, encoding=encoding)


def _open_zstd(path: Path, _: str) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


def _text(path: Path) -> Iterator[str]:
    """One article a document in WikiText's layout; any other text file is one document."""
    with _open(path) as file:
        text = file.read()
    if "\0" in text:
        raise UserError(f"--data: {shown(path)} is binary, expected UTF-8 text")
    begin = 0
    for title in WIKITEXT_TITLE.finditer(text):
        yield text[begin : title.start()]
        begin = title.start()
    yield text[begin:]


def _jsonl(path: Path) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line, parse_int=_no_number)
            except (ValueError, RecursionError):
                raise UserError(f"--data: {shown(path)} line {number} is not JSON") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise UserError(f'--data: {shown(path)} line {number}: expected an object with a string "text"')
            yield record["text"]


def _no_number(_: str) -> int:
    """Numbers beside the text may be longer than Python reads."""
    return 0


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            require_text(file.schema_arrow.names, shown(path))
            for batch in file.iter_batches(columns=["text"], batch_size=1024):
                yield from strings(batch.column("text").to_pylist(), shown(path))
    except pyarrow.ArrowException as error:
        reason = "is not a parquet file" if isinstance(error, pyarrow.ArrowInvalid) else f"cannot be read: {error}"
        raise UserError(f"--data: {shown(path)} {' '.join(reason.split())}") from None


def require_text(columns: Iterable[str], source: str) -> None:
    """UserError unless one of ``columns``, and one alone, is called text."""
    columns = list(columns)
    if columns.count("text") != 1:
        many = "no" if "text" not in columns else "more than one"
        raise UserError(f'--data: {source} has {many} column "text", only {", ".join(columns)}')


FORMATS = ".txt, .jsonl (either also .gz, .xz or .zst), .parquet"


def pieces(text: str) -> Iterator[str]:
    """``text`` in pieces of at most ``PIECE`` characters, cut between words where there are such places."""
    begin = 0
    while len(text) - begin > PIECE:
        middle, limit = begin + PIECE // 2, begin + PIECE
        end = next((cut for pattern in CUTS if (cut := _last(pattern, text, middle, limit))), limit)
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _last(pattern: re.Pattern[str], text: str, begin: int, end: int) -> int | None:
    last = None
    for last in pattern.finditer(text, begin, end):  # noqa: B007 (read after the loop)
        pass
    return last.start() if last else None


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    **{f".txt{packed}": _text for packed in ("", ".gz", ".xz", ".zst")},
    **{f".jsonl{packed}": _jsonl for packed in ("", ".gz", ".xz", ".zst")},
    ".parquet": _parquet,
}
