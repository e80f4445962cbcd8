"""Token files: what they hold, resuming after a kill, text larger than what is held, the order of batches."""

import json
import lzma
import tracemalloc

import numpy as np
import pytest

from ka_attention.errors import UserError
from ka_attention.harness.text.tokenizer import train
from ka_attention.harness.text.tokens import Order, enough, prepare, tokenise

TEXTS = [f"document {i}: the quick brown fox jumps over {i * i} lazy dogs" for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return train(TEXTS, 300)


def stream(tokenizer, texts=TEXTS):
    return [n for text in texts for n in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]


def test_the_file_is_the_stream_of_documents(tokenizer, tmp_path):
    file = tokenise(lambda: TEXTS, tokenizer, tmp_path / "a.bin", characters=200)
    assert file.array().tolist() == stream(tokenizer)
    assert (tmp_path / "a.bin").stat().st_size == 2 * file.tokens
    rows = file.rows(np.array([3, 0]), 16)
    assert rows.tolist() == [stream(tokenizer)[48:65], stream(tokenizer)[:17]]
    assert file.sequences(16) == (file.tokens - 1) // 16
    few = tokenise(lambda: TEXTS, tokenizer, tmp_path / "b.bin", most=100, characters=200)
    assert few.array().tolist() == stream(tokenizer)[: few.tokens]
    assert 100 <= few.tokens < 150
    assert few.fingerprint() != file.fingerprint()


def test_a_killed_call_goes_on_where_it_was(tokenizer, tmp_path):
    def killed():
        yield from TEXTS[:25]
        raise KeyboardInterrupt

    path = tmp_path / "a.bin"
    with pytest.raises(KeyboardInterrupt):
        tokenise(killed, tokenizer, path, characters=200)
    notes = json.loads((tmp_path / "a.bin.json").read_text())
    assert 0 < notes["documents"] < 25
    with path.open("ab") as file:
        file.write(b"left by a kill before its notes")
    assert tokenise(lambda: TEXTS, tokenizer, path).array().tolist() == stream(tokenizer)
    finished = tokenise(lambda: pytest.fail("a finished file is only opened"), tokenizer, path)
    assert finished.array().tolist() == stream(tokenizer)


def test_a_damaged_file_and_another_tokenizer_are_refused(tokenizer, tmp_path):
    path = tmp_path / "a.bin"
    tokenise(lambda: TEXTS, tokenizer, path)
    with pytest.raises(UserError, match="another tokenizer"):
        tokenise(lambda: TEXTS, train(TEXTS, 280), path)
    path.write_bytes(b"12")
    with pytest.raises(UserError, match="damaged"):
        tokenise(lambda: TEXTS, tokenizer, path)


def test_memory_stays_flat_for_a_text_that_is_larger(tokenizer, tmp_path):
    def texts(count):
        return lambda: (f"generated document {i} " + "lorem ipsum " * 200 for i in range(count))

    def peak(count):
        tracemalloc.start()
        tokenise(texts(count), tokenizer, tmp_path / f"{count}.bin", characters=20_000)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(8)
    assert peak(400) < 1.5 * peak(40)


def test_a_folder_of_shards_is_read_one_document_after_another(tmp_path):
    for name, texts in (("train-00", TEXTS[:20]), ("train-01", TEXTS[20:36]), ("valid", TEXTS[36:])):
        with lzma.open(tmp_path / f"{name}.jsonl.xz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    out = tmp_path / "out"
    found = prepare(str(tmp_path), "train", 300, out, train_tokens=10_000, validation_tokens=10_000)
    kept = train(TEXTS[:36], 300)
    assert found.train.array().tolist() == stream(kept, TEXTS[:36])
    assert found.validation.array().tolist() == stream(kept, TEXTS[36:])
    again = prepare(str(tmp_path), "train", 300, out, train_tokens=10_000, validation_tokens=10_000)
    assert again.description == found.description
    with pytest.raises(UserError, match=r"--data: the validation split holds \d+ sequences"):
        enough(found.validation, "validation", 16, 1000)


def test_an_epoch_reads_every_sequence_once_and_the_next_in_another_order():
    order = Order(10, 4, seed=3)
    read = np.concatenate([order[step] for step in range(5)])
    assert sorted(read[:10]) == sorted(read[10:]) == list(range(10))
    assert read[:10].tolist() != read[10:].tolist()
    assert np.concatenate([Order(10, 4, seed=3)[step] for step in range(5)]).tolist() == read.tolist()
    assert Order(10, 4, seed=4)[0].tolist() != order[0].tolist()
    assert order.epochs(5) == 2


def test_a_tokenizer_that_is_too_large_is_refused(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: {"a": 70_000})
    with pytest.raises(UserError, match="65,536"):
        tokenise(lambda: TEXTS, tokenizer, tmp_path / "a.bin")
