"""Files of text: formats, compression, encodings, and which file of a folder is which split."""

import gzip
import json
import lzma
import os
import random
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet

from ka_attention.errors import UserError
from ka_attention.harness.run.settings import TextSettings
from ka_attention.harness.text import data, documents
from ka_attention.harness.text import tokenizer as tokenizers

TEXTS = [f"Document {i}: " + "alpha beta gamma. " * (3 + i % 5) for i in range(30)]


def zstd(content):
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def xz(content):
    return lzma.compress(content, preset=0)  # a preset of 6 takes 8 MB to read


PACKED = {".gz": gzip.compress, ".xz": xz, ".zst": zstd}


def read(path):
    return list(documents.read(path))


@pytest.mark.parametrize("packed", PACKED)
def test_compressed_text_and_records_are_read_in_pieces_that_were_put_together(tmp_path, packed):
    """Two compressed streams one after another are one file, as gzip, xz and zstd say."""
    lines = [json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)]
    halves = "".join(lines[:15]).encode(), "".join(lines[15:]).encode()
    (tmp_path / f"a.jsonl{packed}").write_bytes(b"".join(map(PACKED[packed], halves)))
    assert read(tmp_path / f"a.jsonl{packed}") == TEXTS
    (tmp_path / f"A.TXT{packed.upper()}").write_bytes(PACKED[packed]("Grüße\n".encode()))
    assert read(tmp_path / f"A.TXT{packed.upper()}") == ["Grüße\n"]
    (tmp_path / f"cut.txt{packed}").write_bytes(PACKED[packed](os.urandom(999))[:-200])
    with pytest.raises(UserError, match=r"--data: cannot read .*cut\.txt"):
        read(tmp_path / f"cut.txt{packed}")


@pytest.mark.parametrize("packed", ["", *PACKED])
def test_records_are_read_one_at_a_time(tmp_path, packed):
    lines = b"".join(json.dumps({"text": f"{i} " + "x" * 10_000}).encode() + b"\n" for i in range(1_000))
    (tmp_path / f"a.jsonl{packed}").write_bytes(PACKED.get(packed, bytes)(lines))
    tracemalloc.start()
    for count, text in enumerate(documents.read(tmp_path / f"a.jsonl{packed}")):
        assert text.startswith(f"{count} ")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 999
    assert peak < len(lines) / 5


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_how_text_is_written_and_is_no_part_of_it(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("Grüße 日本語\n", encoding=encoding)
    assert read(tmp_path / "a.txt") == ["Grüße 日本語\n"]
    (tmp_path / "a.jsonl").write_text('{"text": "Grüße"}\n{"text": "日本語"}\n', encoding=encoding)
    assert read(tmp_path / "a.jsonl") == ["Grüße", "日本語"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "text".encode("utf-16-le"), "is binary"),
        ("a.txt", b"\xff\xfet", "is not UTF-16-LE text"),
        ("a.txt", b"\xef\xbb\xbf\xff", "is not UTF-8 text"),
        ("a.jsonl", rb'{"text": "\ud800 x"}', "half a surrogate pair (U+D800)"),
        ("a.jsonl", b"[" * 200_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"text": ["a"]}', 'line 1: expected an object with a string "text"'),
        ("a.jsonl", b'{"text": 12}', 'line 1: expected an object with a string "text"'),
        ("a.txt.zst", b"no zstd", "cannot read"),
        ("a.txt.xz", b"no xz", "cannot read"),
    ],
)
def test_what_is_no_text_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"^--data: ") as error:
        data.corpus(str(tmp_path / name))
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_numbers_beside_the_text_may_have_any_length(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": ' + "9" * 10_000 + "}\n")
    assert read(tmp_path / "a.jsonl") == ["a"]


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pyarrow.array([b"a", b"b"]), "bytes"),
        (pyarrow.array([["a"], ["b"]]), "list"),
        (pyarrow.array([1, 2]), "int"),
        (pyarrow.array([{"x": "a"}]), "dict"),
    ],
)
def test_a_column_of_no_strings_is_refused(tmp_path, column, kind):
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=f'column "text" holds {kind}, expected strings'):
        data.corpus(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=f'column "text" holds {kind}, expected strings'):
        data.corpus(f"hf:{tmp_path}")


def test_strings_of_every_arrow_type_are_read_and_rows_without_one_are_not(tmp_path):
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        parquet.write_table(pyarrow.table({"text": pyarrow.array(["a", None, "b"]).cast(kind)}), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == ["a", "b"]


def tree(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name} " * 9)


def found(folder):
    """The names of the files of each split, and what is left out in words."""
    train, validation, left_out = documents.splits(folder)
    names = [
        None if paths is None else sorted(path.relative_to(folder).as_posix() for path in paths)
        for paths in (train, validation)
    ]
    return (*names, left_out)


def test_a_split_is_a_whole_name(tmp_path):
    books = ["train_spotting.txt", "valley.txt", "developers.txt", "testament.txt", "training-days.txt"]
    tree(tmp_path, *books)
    assert found(tmp_path) == (sorted(books), None, [])
    tree(tmp_path, "validation.txt")
    assert found(tmp_path) == (sorted(books), ["validation.txt"], [])
    tree(tmp_path, "Train.txt", "TEST.txt", "picture.png", ".hidden.txt", ".git/x.txt")
    assert found(tmp_path) == (
        ["Train.txt"],
        ["validation.txt"],
        [
            "1 file of the test split (TEST.txt)",
            "5 files of no split (developers.txt, testament.txt, train_spotting.txt, …)",
            "1 file of other types (picture.png)",
        ],
    )


def test_shards_and_folders_are_splits_too(tmp_path):
    train = ["train-00000-of-00002.txt", "train-00001-of-00002.txt", "train_3.txt", "more/train.4.txt"]
    tree(tmp_path, *train, "valid-01.txt", "test-00000-of-00001.txt")
    assert found(tmp_path)[:2] == (sorted(train), ["valid-01.txt"])
    folders = tmp_path / "folders"
    tree(folders, *(f"{split}/{i}.txt" for split in ("train", "validation", "test") for i in range(3)))
    tree(folders, "train/valley.txt", "train/test.txt", "dev/deep/below/train.txt")
    assert found(folders) == (
        [f"train/{name}.txt" for name in (0, 1, 2, "test", "valley")],
        ["dev/deep/below/train.txt", "validation/0.txt", "validation/1.txt", "validation/2.txt"],
        ["3 files of the test split (test/0.txt, test/1.txt, test/2.txt)"],
    )


def test_where_names_leave_nothing_to_train_on_they_mean_nothing(tmp_path):
    tree(tmp_path / "test", "test.txt")
    assert found(tmp_path / "test") == (["test.txt"], None, [])
    tree(tmp_path / "dev", "dev.txt", "test.txt")
    assert found(tmp_path / "dev") == (["dev.txt", "test.txt"], None, [])


def test_what_is_left_out_is_said(tmp_path, capsys):
    tree(tmp_path, "a.txt", "test.txt", "[bold]x[/red].png")
    settings = TextSettings(data=str(tmp_path), sequence_length=4, train_samples=2, validation_samples=1)
    data.prepare(settings, 300)
    said = capsys.readouterr().out
    assert said == ("--data: left out 1 file of the test split (test.txt); 1 file of other types ([bold]x[/red].png)\n")


@pytest.mark.parametrize("name", ["pipe", "~nobody-of-this-name/x", "a\0b"])
def test_what_is_no_file_is_refused_at_once(tmp_path, name):
    path = name
    if name == "pipe":
        path = str(tmp_path / name)
        os.mkfifo(path)
    with pytest.raises(UserError, match="--data: "):
        data.corpus(path)
    with pytest.raises(UserError, match="--tokenizer: "):
        tokenizers.load(path, [], 300)


def test_a_name_that_is_not_utf_8_can_be_said(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))
    path.write_bytes(b"\0")
    with pytest.raises(UserError) as error:
        data.corpus(str(tmp_path))
    assert r"\xff.txt is binary" in str(error.value)


def test_long_texts_are_tokenised_in_pieces_with_the_same_tokens(monkeypatch):
    """A token takes some hundred bytes while a text is tokenised: 20 MB in one line took 3.9 GB."""
    monkeypatch.setattr(documents, "PIECE", 2_000)
    draw = random.Random(0)
    text = "".join(draw.choice("a bc de. \n\n\t é") for _ in range(20_000))
    parts = list(documents.pieces(text))
    assert "".join(parts) == text
    assert len(parts) >= 10
    assert max(map(len, parts)) <= 2_000
    tokenizer = tokenizers.train([text], 300)
    at_once = []
    encode = tokenizers.encode
    monkeypatch.setattr(tokenizers, "encode", lambda t, texts: at_once.append(sum(map(len, texts))) or encode(t, texts))
    ids = torch.cat(list(data.token_ids([text, "short"], tokenizer)))
    expected = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id, *tokenizer("short")["input_ids"]]
    assert ids.tolist() == [*expected, tokenizer.eos_token_id]
    assert max(at_once) < 2 * 2_000
    assert [len(part) for part in documents.pieces("x" * 2_001)] == [2_000, 1]
