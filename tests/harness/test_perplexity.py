"""Perplexity: the loss that transformers computes, split by position."""

import math

import pytest
import torch
from matplotlib.figure import Figure
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ka_attention.evaluations import perplexity as evaluation
from ka_attention.harness.models.arms import ArmResults, arm
from ka_attention.harness.training import perplexity
from ka_attention.harness.training.perplexity import Perplexity, Run


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout=0.1,
    )
    return GPTNeoXForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def sequences():
    return torch.randint(0, 97, (5, 40), generator=torch.Generator().manual_seed(1))


def test_loss_is_the_models_own(model, sequences):
    with torch.no_grad():
        loss = model(input_ids=sequences, labels=sequences).loss.item()
    found = perplexity.evaluate(model, sequences, batch_size=5)
    assert found.loss == pytest.approx(loss, rel=1e-6)  # losses are taken in float32
    assert found.ppl == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.tokens == 5 * 39


def test_positions_partition_the_sequence(model, sequences):
    found = perplexity.evaluate(model, sequences, batch_size=2)
    runs = found.by_position
    assert [(run.first, run.last) for run in runs] == [(0, 15), (16, 31), (32, 38)]
    pooled = sum(math.log(run.ppl) * (run.last - run.first + 1) for run in runs) / 39
    assert pooled == pytest.approx(found.loss, rel=1e-9)


def test_a_position_is_that_of_the_token_that_predicts(model, sequences):
    before = perplexity.evaluate(model, sequences, batch_size=5).by_position
    changed = sequences.clone()
    changed[:, 33] = (changed[:, 33] + 1) % 97  # predicted from position 32: touches the third run only
    after = perplexity.evaluate(model, changed, batch_size=5).by_position
    assert after[:2] == before[:2]
    assert after[2] != before[2]


def test_batches_do_not_matter_and_the_mode_is_kept(model, sequences):
    model.train()
    whole = perplexity.evaluate(model, sequences, batch_size=5)
    assert model.training
    model.eval()
    assert perplexity.evaluate(model, sequences, batch_size=2).loss == pytest.approx(whole.loss, rel=1e-6)
    assert not model.training


def test_losses_are_taken_in_float32_and_returned_in_float64():
    logits = (10 * torch.randn(3, 4, 97)).bfloat16()
    targets = torch.randint(0, 97, (3, 4))
    losses = perplexity.token_losses(logits, targets)
    assert losses.dtype == torch.float64
    truth = -logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(losses, truth, rtol=1e-5, atol=1e-5)


def test_octaves():
    ppl = [2.0, 3.0, 4.0, 9.0, 5.0, 5.0, 5.0, 20.0]
    runs = [Run(16 * i, 16 * i + 15, p) for i, p in enumerate(ppl)]
    runs[-1] = Run(112, 126, 20.0)  # the last position predicts nothing
    found = Perplexity(0.0, 1.0, 127, tuple(runs)).by_octave()
    assert [run.name for run in found] == ["0–15", "16–31", "32–63", "64–126"]
    last = math.exp((48 * math.log(5) + 15 * math.log(20)) / 63)
    assert [run.ppl for run in found] == pytest.approx([2.0, 3.0, 6.0, last])


def results(name, seeds):
    """Perplexity of an arm; ``seeds`` holds the PPL of positions 0–15, 16–30 and of all, a row a seed."""
    bounds = ((0, 15), (16, 30))
    return ArmResults(
        arm(name),
        tuple(
            Perplexity(
                math.log(row[-1]), row[-1], 31, tuple(Run(*at, ppl) for at, ppl in zip(bounds, row[:-1], strict=False))
            )
            for row in seeds
        ),
    )


def test_the_section_says_draws_and_lists_each_position_of_each_arm():
    arms = [results("softmax", [(100, 50, 70), (102, 50, 72)]), results("ka", [(110, 45, 71), (112, 45, 73)])]
    (section,) = evaluation.sections(arms)
    assert section.paragraphs[-1] == (
        "softmax: PPL 101.0 at the start, 50.0 at the end. KA against softmax: +9.9 % at the start, −10.0 % at the end."
    )
    assert [list(row) for row in section.tables[0].rows] == [
        ["0–15", "101.0 ± 1.4", "111.0 ± 1.4"],
        ["16–30", "50.0 ± 0.0", "45.0 ± 0.0"],
        ["all", "71.0 ± 1.4", "72.0 ± 1.4"],
    ]
    axes = Figure().subplots()
    section.figures[0].draw(axes)
    lines = {drawn.get_label(): drawn for drawn in axes.containers}
    assert lines["softmax"][0].get_ydata().tolist() == [101, 50]
    (bars,) = lines["KA"][2]
    lengths = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
    assert lengths == pytest.approx([2 * math.sqrt(2), 0])


def test_one_run_of_positions_has_no_start_and_end():
    (section,) = evaluation.sections([results("softmax", [(100, 70)])])
    assert "at the start" not in " ".join(section.paragraphs)
