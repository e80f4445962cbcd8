"""Perplexity: the loss that transformers computes, split by position."""

import math

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ka_attention.studies import perplexity


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return GPTNeoXForCausalLM(config).double()


@pytest.fixture(scope="module")
def sequences():
    return torch.randint(0, 97, (5, 40), generator=torch.Generator().manual_seed(1))


def test_loss_is_the_models_own(model, sequences):
    with torch.no_grad():
        loss = model(input_ids=sequences, labels=sequences).loss.item()
    found = perplexity.evaluate(model, sequences, batch_size=5)
    assert found["loss"] == pytest.approx(loss, rel=1e-6)  # losses are taken in float32
    assert found["ppl"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["tokens"] == 5 * 39


def test_positions_partition_the_sequence(model, sequences):
    found = perplexity.evaluate(model, sequences, batch_size=2)
    runs = found["by_position"]
    assert [(run["first"], run["last"]) for run in runs] == [(0, 15), (16, 31), (32, 38)]
    pooled = sum(math.log(run["ppl"]) * (run["last"] - run["first"] + 1) for run in runs) / 39
    assert pooled == pytest.approx(found["loss"], rel=1e-9)


def test_a_position_is_that_of_the_token_that_predicts(model, sequences):
    before = perplexity.evaluate(model, sequences, batch_size=5)["by_position"]
    changed = sequences.clone()
    changed[:, 33] = (changed[:, 33] + 1) % 97  # predicted from position 32: touches the third run only
    after = perplexity.evaluate(model, changed, batch_size=5)["by_position"]
    assert after[:2] == before[:2]
    assert after[2] != before[2]


def test_batches_do_not_matter_and_the_mode_is_kept(model, sequences):
    model.train()
    whole = perplexity.evaluate(model, sequences, batch_size=5)
    assert model.training
    model.eval()
    assert perplexity.evaluate(model, sequences, batch_size=2)["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert not model.training
