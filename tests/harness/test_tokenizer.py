import pytest

from ka_attention.errors import UserError
from ka_attention.harness.text import tokenizer as tokenizers

TEXTS = ["def f(x):\n    return x\n" * 20, "Grüße, naïve 日本語 text\t\r\n" * 20]


def test_a_trained_tokenizer_is_lossless_deterministic_and_small_enough():
    first, second = (tokenizers.load("train", TEXTS, 290) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert 257 < len(first) <= 290
    assert first.eos_token == "<|endoftext|>"
    for text in [*TEXTS, "never seen: \u2603 \x00"]:
        assert first.decode(first(text)["input_ids"]) == text


def test_a_saved_tokenizer_is_loaded_from_its_file_and_its_folder(tmp_path):
    trained = tokenizers.train(TEXTS, 290)
    trained.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = tokenizers.load(str(source), [], 290)
        assert loaded(TEXTS[0])["input_ids"] == trained(TEXTS[0])["input_ids"]
        assert loaded.eos_token_id == trained.eos_token_id


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path):
    tokenizers.train(TEXTS, 290).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"--tokenizer: the tokenizer of .* has 290 entries, the model 289; give --set vocab_size=290"
    ):
        tokenizers.load(str(tmp_path / "tokenizer.json"), [], 289)


def test_the_pythia_tokenizer_fits_pythia(shared_data):
    tokenizer = tokenizers.load(str(shared_data / "tokenizer" / "20B_tokenizer.json"), [], 50_304)
    assert tokenizer("Hello world")["input_ids"] == [12092, 1533]
    assert tokenizer.eos_token_id == 0


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json file"):
        tokenizers.load(str(tmp_path / "tokenizer.json"), [], 300)
    with pytest.raises(UserError, match="--tokenizer: no file or folder"):
        tokenizers.load(str(tmp_path / "empty" / "x"), [], 300)
    with pytest.raises(UserError, match=r"--tokenizer: .* holds no tokenizer"):
        tokenizers.load(str(tmp_path.parent), [], 300)
    with pytest.raises(UserError, match="--set vocab_size: expected at least 257"):
        tokenizers.load("train", TEXTS, 200)
