import gzip
import json
from dataclasses import replace

import pytest
import torch

from ka_attention.errors import UserError
from ka_attention.harness.run.settings import TextSettings
from ka_attention.harness.text import data
from ka_attention.harness.text import tokenizer as tokenizers

DOCUMENTS = [f"Document {i}: " + "alpha beta gamma. " * (3 + i % 5) for i in range(30)]


def write(path, documents=DOCUMENTS):
    name = path.name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in documents))
    elif name.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": documents}), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress("\n".join(documents).encode()))
    else:
        path.write_text("\n".join(documents))
    return path


def test_the_standard_library_is_split_by_document_without_tests_or_repeats():
    corpus = data.corpus("stdlib")
    everything = corpus.train + corpus.validation
    assert len(everything) > 300
    assert len(set(everything)) == len(everything)
    share = sum(map(len, corpus.validation)) / sum(map(len, everything))
    assert 0.1 <= share < 0.2
    import argparse
    import inspect

    assert inspect.getsource(argparse) in everything
    assert not any("class TestCase(unittest.TestCase)" in text for text in everything)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_of_records_is_a_document_a_record(tmp_path, name):
    corpus = data.corpus(str(write(tmp_path / name)))
    assert sorted(corpus.train + corpus.validation) == sorted(DOCUMENTS)
    assert corpus.validation
    assert corpus.source == name


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_plain_text_is_one_document_whose_end_is_validation(tmp_path, name):
    corpus = data.corpus(str(write(tmp_path / name)))
    assert corpus.train[0] + corpus.validation[0] == "\n".join(DOCUMENTS)
    assert len(corpus.validation[0]) == len("\n".join(DOCUMENTS)) // 10


def test_a_wikitext_file_is_a_document_an_article(tmp_path):
    articles = [f" = Title {i} = \n \n Text {i} . \n \n = = Section = = \n \n More {i} . \n" for i in range(25)]
    (tmp_path / "wiki.txt").write_text(" \n" + "".join(articles))
    corpus = data.corpus(str(tmp_path / "wiki.txt"))
    assert sorted(corpus.train + corpus.validation) == sorted(articles)


def test_wikitext_2_trains_on_train_and_validates_on_valid(shared_data):
    corpus = data.corpus(str(shared_data / "wikitext-2"))
    assert (len(corpus.train), len(corpus.validation)) == (600, 60)
    assert all(text.startswith(" = ") for text in corpus.train + corpus.validation)


def test_a_folder_is_a_document_a_file_unless_it_has_splits(tmp_path):
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    whole = data.corpus(str(tmp_path))
    assert sorted(whole.train + whole.validation) == sorted(DOCUMENTS)
    write(tmp_path / "train.jsonl", DOCUMENTS[:20])
    write(tmp_path / "validation.jsonl", DOCUMENTS[15:30])
    corpus = data.corpus(str(tmp_path))
    assert sorted(corpus.validation) == sorted(DOCUMENTS[15:30])
    assert sorted(corpus.train) == sorted(DOCUMENTS[:15]), "a document of both splits is validated on only"


def test_a_dataset_folder_is_read_through_datasets(tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", DOCUMENTS[:20])
    write(tmp_path / "set" / "validation.jsonl", DOCUMENTS[20:])
    corpus = data.corpus(f"hf:{tmp_path / 'set'}")
    assert sorted(corpus.train) == sorted(DOCUMENTS[:20])
    assert sorted(corpus.validation) == sorted(DOCUMENTS[20:])
    with pytest.raises(UserError, match="--data: cannot load hf:"):
        data.corpus(f"hf:{tmp_path / 'absent'}")


def test_names_and_configurations_of_hub_datasets(tmp_path):
    assert data._hub_name("wikitext") == ("wikitext", None)
    assert data._hub_name("user/set") == ("user/set", None)
    assert data._hub_name("user/set/config") == ("user/set", "config")
    assert data._hub_name(f"{tmp_path}/config") == (str(tmp_path), "config")
    assert data._hub_name(str(tmp_path)) == (str(tmp_path), None)


def test_the_order_does_not_depend_on_where_documents_lie(tmp_path):
    first = data.corpus(str(write(tmp_path / "a.jsonl")))
    second = data.corpus(str(write(tmp_path / "b.jsonl", DOCUMENTS[::-1])))
    assert (first.train, first.validation) == (second.train, second.validation)
    assert first.train != sorted(first.train)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n", "holds no text"),
        ("binary.txt", b"\x00\x01\x02", "is binary"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "is not UTF-8"),
        ("broken.txt.gz", b"not gzip", "cannot read"),
        ("cut.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "cannot read"),
        ("damaged.txt.gz", gzip.compress(b"text", mtime=0)[:10] + b"\xff" * 20, "cannot read"),
        ("broken.jsonl", b'{"text": 1}', "line 1"),
        ("broken2.jsonl", b'{"text": "a"}\n{"text"', "line 2 is not JSON"),
        ("broken.parquet", b"PAR1", "is not a parquet file"),
        ("picture.png", b"x", "is none of .txt, .jsonl (either also .gz, .xz or .zst), .parquet"),
    ],
)
def test_bad_data_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="--data: ") as error:
        data.corpus(str(tmp_path / name))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_data_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="--data: no file or folder 'nowhere'"):
        data.corpus("nowhere")
    with pytest.raises(UserError, match=r"--data: .* holds no file of \.txt"):
        data.corpus(str(tmp_path))


def test_a_record_without_text_is_refused_with_the_columns(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match='no column "text", only body'):
        data.corpus(str(tmp_path / "a.parquet"))


def test_sequences_are_the_cut_stream_of_documents_with_ends_between():
    tokenizer = tokenizers.train(DOCUMENTS, 300)
    stream = [token for text in DOCUMENTS for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    held = len(stream) // 16
    whole = data.sequences("train", DOCUMENTS, tokenizer, 16, held)
    assert whole.flatten().tolist() == stream[: 16 * held]
    few = data.sequences("train", DOCUMENTS, tokenizer, 16, 4)
    assert few.tolist() == whole[[0, held // 4, held // 2, held * 3 // 4]].tolist(), "spread over all documents"


def test_a_large_corpus_is_read_as_far_as_eight_times_what_is_asked_for():
    class OneToken:
        """Document n is the token n; counts what it reads."""

        eos_token_id = 0
        read = 0

        def __call__(self, documents, **_):
            self.read += len(documents)
            return {"input_ids": [[int(text)] for text in documents]}

    tokenizer = OneToken()
    found = data.sequences("train", [str(number) for number in range(1, 5_001)], tokenizer, 8, 16)
    assert tokenizer.read == 8 * 16 * 8 / 2  # a token and an end each
    assert found[:, 0].tolist() == [1 + 32 * sequence for sequence in range(16)]


def test_too_little_text_is_refused_with_what_is_needed(tmp_path):
    path = str(write(tmp_path / "a.jsonl"))
    settings = TextSettings(data=path, sequence_length=16, train_samples=9_999, validation_samples=4)
    with pytest.raises(UserError, match=r"the train split holds (\d+) .*or --set train_samples=\1$"):
        data.prepare(settings, 300)
    with pytest.raises(UserError, match=r"or --tokens (\d+)$") as error:
        data.prepare(settings, 300, fewer="--tokens {tokens}")
    tokens = int(str(error.value).split()[-1])
    assert len(data.prepare(replace(settings, train_samples=tokens // 16), 300).train) == tokens // 16
    none = replace(settings, sequence_length=5_000, train_samples=2)
    with pytest.raises(UserError, match=r"holds 0 sequences of 5000 tokens, expected at least 2 \(10,000 .* text$"):
        data.prepare(none, 300)


def test_validation_takes_what_there_is_where_it_may(tmp_path):
    path = str(write(tmp_path / "a.jsonl"))
    settings = TextSettings(data=path, sequence_length=16, train_samples=4, validation_samples=9_999)
    with pytest.raises(UserError, match=r"the validation split holds (\d+) .*--set validation_samples=\1$") as error:
        data.prepare(settings, 300)
    held = int(str(error.value).split("=")[-1])
    assert len(data.prepare(settings, 300, fewest_validation=1).validation) == held
    with pytest.raises(UserError, match="holds 0 sequences of 4000 tokens, expected at least 1"):
        data.prepare(replace(settings, sequence_length=4_000, train_samples=1), 300, fewest_validation=1)


def test_prepare_gives_the_same_tokens_twice_and_another_fingerprint_for_other_data(tmp_path):
    path = write(tmp_path / "a.jsonl")
    settings = TextSettings(data=str(path), sequence_length=16, train_samples=20, validation_samples=4)
    first, second = data.prepare(settings, 300), data.prepare(settings, 300)
    assert torch.equal(first.train, second.train)
    assert first.description == second.description
    assert (first.train.shape, first.validation.shape) == ((20, 16), (4, 16))
    write(path, [text.replace("gamma", "delta") for text in DOCUMENTS])
    assert data.prepare(settings, 300).description.fingerprint != first.description.fingerprint


def test_the_fingerprint_is_of_training_and_validation(tmp_path):
    tokenizers.train(DOCUMENTS, 300).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = TextSettings(
        data=str(write(tmp_path / "a.jsonl")),
        tokenizer=str(tmp_path / "tokenizer.json"),
        sequence_length=16,
        train_samples=20,
        validation_samples=4,
    )
    others = replace(settings, train_samples=19), replace(settings, validation_samples=3)
    assert len({data.prepare(each, 300).description.fingerprint for each in (settings, *others)}) == 3


def test_of_a_few_documents_the_last_tenth_of_each_is_validation(tmp_path):
    texts = [f"{number}".ljust(100 * number, ".") for number in range(1, 20)]
    few = data.corpus(str(write(tmp_path / "few.jsonl", texts)))
    assert sorted(map(len, few.validation)) == [10 * number for number in range(1, 20)]
    assert sorted(a + b for a, b in zip(few.train, few.validation, strict=True)) == sorted(texts)
    enough = data.corpus(str(write(tmp_path / "enough.jsonl", [*texts, "more"])))
    assert sorted(enough.train + enough.validation) == sorted([*texts, "more"])


def test_labels_are_the_tokens_unless_given():
    tokens = torch.arange(12).view(3, 4)
    assert torch.equal(data.Sequences(tokens)[1]["labels"], tokens[1])
    labels = tokens.masked_fill(tokens < 6, -100)
    item = data.Sequences(tokens, labels)[1]
    assert item["labels"].tolist() == [-100, -100, 6, 7]
    assert item["input_ids"].tolist() == [4, 5, 6, 7]
