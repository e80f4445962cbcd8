"""The facts and their perplexities."""

import math

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ka_attention.evaluations import caches, reversal
from ka_attention.harness.text import tokenizer
from ka_attention.hf import KAConfig, attach


def texts():
    return [text for tellings in reversal.sentences().values() for group in tellings.values() for text in group]


@pytest.fixture(scope="module")
def words():
    return tokenizer.train(texts(), 400)


def own(found):
    """All facts under the model's own attention."""
    return found.by_cache[found.own]["all"]


def build(ka=None):
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.3,
    )
    model = GPTNeoXForCausalLM(config).eval()
    return attach(model, ka) if ka else model


def test_at_least_forty_facts_half_of_them_real():
    told = reversal.sentences()
    assert len(told["real"]["forward"]) == len(told["fictitious"]["forward"]) >= 20
    assert len(set(texts())) == len(texts())


def test_shuffled_facts_use_the_same_words_and_are_never_true():
    for tellings in reversal.sentences().values():
        for order in ("forward", "backward"):
            true, shuffled = tellings[order], tellings[f"{order}_shuffled"]
            assert not set(true) & set(shuffled)
            assert sorted(" ".join(true)) == sorted(" ".join(shuffled))
    real = reversal.sentences()["real"]
    assert real["forward"][0] == "Paris is the capital of France."
    assert real["backward"][0] == "France's capital is Paris."
    assert real["forward_shuffled"][0] == "Paris is the capital of Japan."


def test_perplexity_is_that_of_all_tokens_with_the_first_entity(words):
    model = build()
    found = reversal.evaluate(model, words, max_length=128)
    nll, tokens = 0.0, 0
    for tellings in reversal.sentences().values():
        for sentence in tellings["backward"]:
            ids = torch.tensor([[words.eos_token_id, *words(sentence)["input_ids"]]])
            with torch.no_grad():
                nll += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    # Alone and padded in a batch, in float32.
    assert own(found).backward_ppl == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert own(found).ratio == own(found).forward_ppl / own(found).backward_ppl
    assert found.sentences == 48


def test_both_caches(words):
    softmax, ka = (reversal.evaluate(build(config), words, max_length=128) for config in (None, KAConfig()))
    assert (softmax.own, ka.own) == ("kv", "ka")
    # The same weights: the swap of one is the other.
    assert softmax.by_cache["ka"]["real"].ratio == pytest.approx(ka.by_cache["ka"]["real"].ratio, rel=1e-5)
    assert abs(own(softmax).ratio - own(ka).ratio) > 1e-3


def test_is_deterministic_and_leaves_the_model_as_it_was(words):
    model = build().train()
    assert reversal.evaluate(model, words, max_length=16) == reversal.evaluate(model, words, max_length=16)
    assert model.training
    assert caches.own_cache(model) == "kv"


def test_long_sentences_are_cut(words):
    model = build()
    firsts = [words(text)["input_ids"][0] for group in reversal.sentences().values() for text in group["forward"]]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[words.eos_token_id]])).logits[0, 0]
    loss = -logits.log_softmax(-1)[firsts].mean().item()
    found = reversal.evaluate(model, words, max_length=2)  # end of text and one token
    assert own(found).forward_ppl == pytest.approx(math.exp(loss), rel=1e-5)
